"""The README's programs run as they stand there; what .ci/run runs of it are the commands."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from r2d2fast import with_index
from r2d2fast.train.recipes import RECIPES, flags

TEXT = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def programs(heading: str) -> list[str]:
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def test_on_embeddings():
    (program,) = programs("Use it on embeddings")
    names: dict[str, Any] = {}
    exec(program, names)
    _, classes = load_digits(return_X_y=True)
    assert (names["labels"] != classes).mean() < 0.2


@pytest.fixture
def loop():
    """What the loss's program takes for granted: 64 samples, of which 16 are labelled."""
    labels = torch.where(torch.arange(64) < 16, torch.arange(64), -1)
    dataset = with_index(TensorDataset(torch.randn(64, 8)))
    model = nn.Linear(8, 1000)
    return {
        "labels": labels,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "loader_in_order": DataLoader(dataset, 16),
        "loader": DataLoader(dataset, 16, shuffle=True),
    }


def test_the_loss_in_a_loop(loop):
    _, program = programs("Use the loss")
    given, before = loop["labels"], loop["model"].weight.detach().clone()
    exec(program, loop)
    assert not torch.equal(loop["model"].weight, before)
    assert loop["bank"].updates == 4
    assert torch.equal(loop["labels"][:16], given[:16])
    assert ((loop["labels"] >= 0) & (loop["labels"] < 1000)).all()


def test_the_loss_before_is_that_of_after(loop):
    before, after = programs("Use the loss")
    making, _, _ = after.partition("for images")
    exec(making, loop)
    bank, index = loop["bank"], torch.arange(16, 32)
    bank.predict_(index, torch.randn(16, 1000))
    loop |= {"logits": torch.randn(16, 1000), "pseudo_logits": bank.logits(torch.arange(64)), "index": index}
    exec(before, loop)
    torch.testing.assert_close(loop["criterion"](loop["logits"], index), loop["loss"])


def test_the_trainer_has_each_flag_that_is_named():
    """Of other commands, which are named with theirs."""
    others = {"--nproc-per-node", "--dist", "--out", "--help", "--help-all"}
    known = {f"--{name}".replace("_", "-") for name in flags(RECIPES["digits"].config)} | others
    assert set(re.findall(r"(?<![-\w])--[a-z][\w.-]*", TEXT)) <= known
