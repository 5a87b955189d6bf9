"""Batch norm whose statistics are of parts of a batch, as the reference implementation's four GPUs see them, or are frozen."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that, in training, normalises ``groups`` contiguous parts of the batch each by its own mean and variance.

    What ``torch.nn.DataParallel`` over ``groups`` GPUs computes. Only the first part's statistics enter the running ones: each
    GPU works on a copy of the buffers, and only the first one's copy is the module's own. In stage 2, whose batches have the
    unlabelled samples first, a prediction in eval mode thus rests on statistics of unlabelled samples alone. In eval mode, and
    in its ``state_dict``, it is an ``nn.BatchNorm2d``.

    Sizes of parts differ by at most one, the larger first. A batch of fewer than 2·``groups`` samples has fewer parts, so
    that each has two samples at least: a channel with one value has no variance. (DataParallel would make the last part smaller,
    down to one sample. It has the same parts wherever they come out even, as in all batches of the reference implementation.)

    Args:
        norm: the layer whose parameters, running statistics and settings it takes over: the very same tensors.
        groups: number of parts.
    """

    def __init__(self, norm: nn.BatchNorm2d, groups: int) -> None:
        super().__init__(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta"
        )
        self.groups = groups
        self._parameters.update(norm._parameters)
        self._buffers.update(norm._buffers)
        # What timm's BatchNormAct2d does after the norm.
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())
        self.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        groups = min(self.groups, len(input) // 2) if self.training else 1
        if groups < 2:
            output = super().forward(input)
        else:
            first, *others = input.tensor_split(groups)
            parts = [super().forward(first)]
            parts += [F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps) for x in others]
            output = torch.cat(parts)
        return self.act(self.drop(output))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


def with_bn_groups(model: nn.Module, groups: int) -> nn.Module:
    """Replace every ``nn.BatchNorm2d`` in ``model``, in place, by a :class:`GroupedBatchNorm2d`; returns the model.

    Parameters stay the same objects and ``state_dict`` keys the same keys, so it may come before or after an optimizer and
    ``load_state_dict``. timm's ``BatchNormAct2d``, with an activation in it, is replaced likewise.

    Raises:
        ValueError: ``groups`` is below 1; or it is above 1 and the network has no ``nn.BatchNorm2d``, or one of a kind whose
            forward pass is not known.
    """
    if groups < 1:
        raise ValueError(f"bn_groups is {groups}; it must be at least 1, which is ordinary batch norm")
    if groups == 1:
        return model
    # With duplicates: a layer used in two places has to be replaced in both.
    modules = model.named_modules(remove_duplicate=False)
    norms = {name: module for name, module in modules if isinstance(module, nn.BatchNorm2d)}
    if not norms:
        raise ValueError(f"bn_groups is {groups}, but the network has no nn.BatchNorm2d; only 1 is accepted for it")
    for name, norm in norms.items():
        if type(norm) is not nn.BatchNorm2d and type(norm).__name__ != "BatchNormAct2d":
            raise ValueError(
                f"bn_groups is {groups}, but {name} is a {type(norm).__name__}, which cannot be grouped; take bn_groups 1, or a "
                "backbone with nn.BatchNorm2d"
            )
    for name, norm in norms.items():
        model.set_submodule(name, GroupedBatchNorm2d(norm, groups))
    return model


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """While it lasts batch norm leaves its running statistics as they are; in training it normalises by the batch as ever."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
