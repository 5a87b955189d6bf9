"""Which training samples are labelled."""

import torch
from torch import Tensor


def split_labels(targets: Tensor, num_classes: int, num_labels: int, split: int) -> Tensor:
    """Labels of a semi-supervised split: the same number of labelled samples in each class, drawn at random.

    Args:
        targets: int64 ``[M]``, the true classes, on the CPU; −1 where nobody knows it, and such a sample is never drawn.
        num_classes: N.
        num_labels: labelled samples in all, a multiple of ``num_classes``.
        split: number of the split; the draw depends on it alone, so that runs of one split share their labels.

    Returns:
        int64 ``[M]``: the class of a labelled sample, −1 for an unlabelled one.

    Raises:
        ValueError: ``num_labels`` is no multiple of ``num_classes``, or more than some class has samples of known class.
    """
    per_class = num_labels // num_classes
    if num_labels < 1 or num_labels % num_classes:
        raise ValueError(f"num_labels is {num_labels}; it must be a positive multiple of the {num_classes} classes")
    # In order of class, then of sample: each class is a stretch, those of unknown class the one before all.
    order = torch.argsort(targets, stable=True)
    counts = torch.bincount(targets[targets >= 0], minlength=num_classes)
    smallest = int(counts.min())
    if per_class > smallest:
        raise ValueError(
            f"num_labels {num_labels} asks for {per_class} samples of each class, but class {int(counts.argmin())} has only "
            f"{smallest} whose class is known; accepted: up to {smallest * num_classes}"
        )
    generator = torch.Generator().manual_seed(split)
    labels = torch.full_like(targets, -1)
    for c, members in enumerate(order[len(targets) - int(counts.sum()) :].split(counts.tolist())):
        labels[members[torch.randperm(len(members), generator=generator)[:per_class]]] = c
    return labels
