"""What the processes of test_examples.py do; here, where processes of their own can import it."""

import importlib
import os
from pathlib import Path

import torch


def run(arguments: list[str]) -> None:
    """Rank, processes, a port, the file to write, the example, and its own flags."""
    rank, processes, port, result, name, *flags = arguments
    torch.set_num_threads(1)
    if processes != "1":
        # As torchrun says it.
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "none",
        }
    network, bank = importlib.import_module(f"r2d2fast.examples.{name}").main(flags)
    own = bank.partition.samples
    torch.save({**network.state_dict(), "own": own, "rows": bank.logits(own)}, Path(result))
