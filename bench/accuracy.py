"""``python -m bench.accuracy``: the error of the gradient against float64, ours as a share of eager PyTorch's."""

from collections.abc import Iterable

import torch
from torch import Tensor

from r2d2fast import PseudoLabelBank, d2_step, reference
from r2d2fast.tables import markdown_table

ROWS = 128
CLASSES = (2, 10, 33, 100, 1000, 4099)
SEEDS = range(5)


def _eager(logits: Tensor, pseudo_logits: Tensor, class_loss: str) -> Tensor:
    leaf = logits.clone().requires_grad_()
    loss = reference.d2_loss(leaf, pseudo_logits, alpha=0.1, beta=0.03, class_loss=class_loss, normalizer=1.0)
    return torch.autograd.grad(loss, leaf)[0]


def error_ratio(class_loss: str, dtype: torch.dtype, classes: Iterable[int]) -> float:
    """Geometric mean over sizes and seeds of our mean error over eager PyTorch's, both in ``dtype``.

    The error of a row is its largest; logits are normal with deviation 3, pseudo-logits 0.8 times them plus noise.
    """
    logs = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        for count in classes:
            logits = (torch.randn(ROWS, count) * 3).to(dtype)
            pseudo = (logits.float() * 0.8 + torch.randn(ROWS, count)).to(dtype)
            exact = _eager(logits.double(), pseudo.double(), class_loss)
            bank = PseudoLabelBank(torch.full((ROWS,), -1), count, dtype=dtype)
            bank.pseudo_logits.copy_(pseudo)
            ours = d2_step(logits, torch.arange(ROWS), bank, class_loss=class_loss, normalizer=1.0, update=False)[1]
            theirs = _eager(logits, pseudo, class_loss)
            errors = [(grad.double() - exact).abs().amax(1).mean() for grad in (ours, theirs)]
            logs.append((errors[0] / errors[1]).log())
    return float(torch.stack(logs).mean().exp())


def main(classes: Iterable[int] = CLASSES) -> None:
    names = ("float32", "bfloat16", "float16")
    rows = [
        (class_loss, *(f"{error_ratio(class_loss, getattr(torch, name), classes):.2f}" for name in names))
        for class_loss in ("kl_reverse", "kl", "mse")
    ]
    print(markdown_table(("class loss", *names), rows))


if __name__ == "__main__":
    main()
