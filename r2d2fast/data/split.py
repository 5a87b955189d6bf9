"""Which training samples are labelled."""

from collections.abc import Sequence

import torch
from torch import Tensor

from r2d2fast.data.errors import DataError


def split_labels(targets: Tensor, num_classes: int, num_labels: int | Sequence[int], split: int) -> Tensor:
    """Labels of a semi-supervised split: so many labelled samples in each class, drawn at random.

    Args:
        targets: int64 ``[M]``, the true classes, on the CPU; −1 where nobody knows it, and such a sample is never drawn.
        num_classes: N.
        num_labels: labelled samples in all: of a multiple of ``num_classes`` the same of each class, of another number by the
            shares of the classes (:func:`proportional_counts`). Or a sequence, N numbers, one for each class.
        split: number of the split; the draw depends on it alone, so that runs of one split share their labels.

    Returns:
        int64 ``[M]``: the class of a labelled sample, −1 for an unlabelled one.

    Raises:
        ValueError: ``num_labels`` is below the number of classes, is not one number for each of them, or asks for more samples
            than a class has whose class is known.
    """
    counts = torch.bincount(targets[targets >= 0], minlength=num_classes).tolist()
    wanted = _wanted(counts, num_labels)
    # In order of class, then of sample: each class is a stretch, those of unknown class the one before all.
    order = torch.argsort(targets, stable=True)
    lacking = [c for c in range(num_classes) if wanted[c] > counts[c]]
    if lacking:
        worst = min(lacking, key=lambda c: counts[c])
        accepted = f"up to {min(counts) * num_classes}, or other numbers by class, --num-labels-per-class"
        raise ValueError(
            f"num_labels {_shown(num_labels)} asks for {wanted[worst]} samples of class {worst}, which has only {counts[worst]} "
            "whose class is known" + (f"; accepted: {accepted}" if isinstance(num_labels, int) else "")
        )
    generator = torch.Generator().manual_seed(split)
    labels = torch.full_like(targets, -1)
    for c, members in enumerate(order[len(targets) - sum(counts) :].split(counts)):
        labels[members[torch.randperm(len(members), generator=generator)[: wanted[c]]]] = c
    return labels


def proportional_counts(counts: Sequence[int], num_labels: int) -> list[int]:
    """How many of ``num_labels`` samples each class gets by its share of all, ``counts`` ``[N]``, and at least one.

    Rounded down, and what is then left over goes to the largest remainders, the first classes first: as scikit-learn's stratified
    splits do, except that these draw among equal remainders, and may leave a rare class without a sample.
    """
    total = sum(counts)
    exact = [num_labels * count / total for count in counts]
    given = [max(int(share), 1) for share in exact]
    by_remainder = sorted(range(len(counts)), key=lambda c: given[c] - exact[c])
    while sum(given) < num_labels:
        for c in by_remainder[: num_labels - sum(given)]:
            given[c] += 1
    while sum(given) > num_labels:  # rare classes have had theirs from the most frequent
        given[max(range(len(counts)), key=lambda c: given[c] - exact[c] if given[c] > 1 else -1.0)] -= 1
    return given


def _wanted(counts: list[int], num_labels: int | Sequence[int]) -> list[int]:
    classes = len(counts)
    if not isinstance(num_labels, int):
        if len(num_labels) != classes or min(num_labels) < 1:
            raise ValueError(
                f"num_labels {_shown(num_labels)} has {len(num_labels)} numbers for {classes} classes; accepted: one for each, 1 "
                "or more"
            )
        return list(num_labels)
    if num_labels < classes:
        raise ValueError(f"num_labels is {num_labels}; it must be at least {classes}, one for each class")
    if num_labels % classes == 0 or not all(counts):
        return [-(-num_labels // classes)] * classes
    return proportional_counts(counts, num_labels)


def _shown(num_labels: int | Sequence[int]) -> str:
    return str(num_labels) if isinstance(num_labels, int) else ",".join(map(str, num_labels))


def check_test_fraction(test_fraction: float) -> None:
    """Raise DataError where so large a share of the labelled samples cannot be held out."""
    if not 0 <= test_fraction < 1:
        raise DataError(f"--test-fraction is {test_fraction}; accepted: at least 0, for no test images, and below 1")
