"""The steps that the doctor has each backend make: every size, dtype and class loss, and the inputs that break kernels."""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r2d2fast import PseudoLabelBank
from r2d2fast._backends.common import DTYPES
from r2d2fast.options import CLASS_LOSSES
from r2d2fast.testing import make_bank

SPREAD = 3.0
"""Standard deviation of random logits."""
HUGE_GAP = 1e4
LABEL_LR = 40.0
"""With D_u = 1, so that every update is far larger than a rounding error, at any number of classes."""
SAME = tuple((dtype, dtype) for dtype in DTYPES)
MIXED = tuple(product(DTYPES, DTYPES))


class StepInputs(NamedTuple):
    """One step's inputs; equal ones give equal tensors on every device."""

    kind: str
    batch: int
    classes: int
    class_loss: str = "kl_reverse"
    logits_dtype: torch.dtype = torch.float32
    bank_dtype: torch.dtype = torch.float32

    def bank(self, device: torch.device) -> PseudoLabelBank:
        return make_bank(
            2 * self.batch,
            self.classes,
            scale=HUGE_GAP if self.kind == "gaps of 1e4" else 2.0,
            dtype=self.bank_dtype,
            rounding="stochastic" if self.kind == "stochastic rounding" else "nearest",
            seed=7,
            device=device,
        )

    def options(self, device: torch.device) -> dict[str, Any]:
        """Of the step, by name."""
        values: dict[str, Any] = {"alpha": 0.1, "beta": 0.03, "label_lr": LABEL_LR}
        if self.kind == "scalars in tensors":
            values = {name: torch.tensor(value, device=device) for name, value in values.items()}
        return {
            **values,
            "class_loss": self.class_loss,
            "update_normalizer": 1.0,
            "update": self.kind != "update off",
        }

    def batch_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Logits ``[batch, classes]`` and sample numbers ``[batch]``."""
        generator = torch.Generator().manual_seed(self.batch * 9176 + self.classes)
        samples = 2 * self.batch
        index = torch.randperm(samples, generator=generator)[: self.batch]
        if self.kind == "duplicates":
            index = torch.randint(max(samples // 8, 2), (self.batch,), generator=generator)
        elif self.kind == "labelled rows":
            index = index // 3 * 3
        logits = torch.randn(self.batch, self.classes + 3, generator=generator)
        logits = (logits * (HUGE_GAP if self.kind == "gaps of 1e4" else SPREAD)).to(self.logits_dtype)
        if self.kind == "rows not finite":
            for row, column, bad in ((0, 1, "nan"), (self.batch // 2, self.classes, "inf"), (-1, 1, "-inf")):
                logits[row, column] = float(bad)
        logits, index = logits.to(device), index.to(device)
        if self.kind == "unaligned views":  # rows that start anywhere, sample numbers that are not neighbours
            return logits[:, 1 : 1 + self.classes], index.int().repeat_interleave(2)[::2]
        return logits[:, 1 : 1 + self.classes].contiguous(), index

    @property
    def summary(self) -> str:
        logits, bank = (str(dtype).removeprefix("torch.") for dtype in (self.logits_dtype, self.bank_dtype))
        return f"{self.batch} x {self.classes}, {logits} logits, {bank} bank, {self.class_loss}"

    def __str__(self) -> str:
        return f"{self.kind}, {self.summary}"


def step_inputs(quick: bool) -> Iterator[StepInputs]:
    """All of them; ``quick`` a tenth."""
    sizes: tuple[int, ...] = (
        (10, 127, 1001) if quick else (2, 3, 7, 10, 17, 31, 64, 65, 100, 127, 257, 1000, 1001, 2053, 5000)
    )
    for classes, class_loss, dtypes in product(sizes, CLASS_LOSSES, SAME if quick else MIXED):
        yield StepInputs("random", 37, classes, class_loss, *dtypes)
    wide = ((5, 21_841),) if quick else ((5, 21_841), (5, 50_257), (3, 262_144))
    for shape, class_loss, dtypes in product(wide, CLASS_LOSSES, SAME[:1] if quick else SAME):
        yield StepInputs("random", *shape, class_loss, *dtypes)
    for shape in ((4001, 10), (1501, 100)) if quick else ((20_011, 2), (20_011, 10), (6007, 100), (2053, 1000)):
        yield StepInputs("large batch", *shape)
    hard = ("duplicates", "labelled rows", "rows not finite", "gaps of 1e4", "unaligned views", "scalars in tensors")
    sizes = (10, 1001) if quick else (2, 10, 33, 100, 1001, 5000)
    losses = ("kl_reverse",) if quick else CLASS_LOSSES
    for kind, classes, class_loss, dtypes in product(hard, sizes, losses, SAME[:2] if quick else SAME):
        yield StepInputs(kind, 23, classes, class_loss, *dtypes)
    for classes, dtypes in product(sizes, SAME):
        yield StepInputs("update off", 23, classes, "kl_reverse", *dtypes)
    for classes, (logits_dtype, bank_dtype) in product(sizes, MIXED):
        if bank_dtype != torch.float32 and (logits_dtype == torch.float32 or not quick):
            yield StepInputs("stochastic rounding", 37, classes, "kl_reverse", logits_dtype, bank_dtype)
