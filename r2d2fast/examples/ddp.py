"""Plain PyTorch: ``python -m r2d2fast.examples.ddp --directory DIR``, or with DistributedDataParallel
``torchrun --nproc-per-node=2 -m r2d2fast.examples.ddp --directory DIR``.

What matters: a ``ShardedBatchSampler`` and the bank that belongs to it, so that each process owns the pseudo-labels that its
batches move; ``set_epoch``; and a state_dict of the criterion, taken on all processes, in the checkpoint.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from r2d2fast import FusedD2Loss, ShardedPseudoLabelBank
from r2d2fast.examples.digits import (
    CLASSES,
    LABEL_LR,
    PROCESSES,
    Digits,
    learning_rate,
    options,
    predict,
    predicts,
    pretrained,
    sgd,
    shifted,
)


def main(arguments: list[str] | None = None) -> tuple[nn.Module, ShardedPseudoLabelBank]:
    chosen = options(arguments, __doc__)
    if PROCESSES > 1:
        dist.init_process_group("gloo")
    digits = Digits(chosen.seed)
    network = pretrained(digits, chosen.seed, chosen.stage1_epochs)
    model = DistributedDataParallel(network) if PROCESSES > 1 else network
    optimizer = sgd(network, learning_rate(0, chosen.epochs))
    sampler = digits.sampler(chosen.accumulate, chosen.seed)
    bank = ShardedPseudoLabelBank(sampler, CLASSES)
    criterion = FusedD2Loss(bank, label_lr=LABEL_LR, gradient_accumulation_steps=chosen.accumulate)
    loader = DataLoader(digits.train, batch_sampler=sampler)
    parts: dict[str, Any] = {"network": network, "criterion": criterion, "optimizer": optimizer}

    first, checkpoint = 0, chosen.directory / "checkpoint.pt"
    chosen.directory.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        first = state.pop("epoch")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for epoch in range(first, chosen.epochs):
        if predicts(epoch, chosen.epochs):
            predict(network, bank, digits, epoch)
        sampler.set_epoch(epoch)
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch, chosen.epochs)
        for step, (images, index) in enumerate(loader, 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=chosen.bf16):
                logits = model(shifted(images, epoch * len(loader) + step))
            (criterion(logits, index) / chosen.accumulate).backward()
            if step % chosen.accumulate == 0 or step == len(loader):
                optimizer.step()
                optimizer.zero_grad()
        state = {name: part.state_dict() for name, part in parts.items()} | {"epoch": epoch + 1}
        if int(os.environ.get("RANK", "0")) == 0:
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    print(f"test error {digits.test_error(network):.2f} %")
    if PROCESSES > 1:
        dist.destroy_process_group()
    return network, bank


if __name__ == "__main__":
    main()
