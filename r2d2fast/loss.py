"""The D2 loss: :class:`FusedD2Loss` and :func:`d2_loss` for training loops with autograd, :func:`d2_step` for those without."""

import copy
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling

from r2d2fast import compiled
from r2d2fast._backends import choose
from r2d2fast._backends.checks import apart, check_bank, check_batch, check_memory, check_out
from r2d2fast._backends.common import STATISTICS
from r2d2fast.bank import PseudoLabelBank
from r2d2fast.errors import BankError
from r2d2fast.options import StepOptions, warn_of_small_alpha


def _step(
    backend: ModuleType,
    logits: Tensor,
    index: Tensor,
    bank: PseudoLabelBank,
    options: StepOptions,
    statistics: Tensor | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient, in eager mode."""
    options.check(bank.pseudo_logits)
    if out is not None:
        check_memory(out, logits, index, bank, statistics)
    result = backend.step(apart(logits, bank), index, bank, options, statistics, out)
    # In-place writes that autograd cannot see by itself; torch.autograd.graph.increment_version() in fewer calls.
    if out is not None:
        torch._C._increment_version((out,))
    if options.update:
        if not (bank.sharded or bank.warned_of_ranks):
            _warn_of_ranks(bank)
        torch._C._increment_version((bank.pseudo_logits,))
    return result


def _warn_of_ranks(bank: PseudoLabelBank) -> None:
    """Once for each bank, when it is first updated: of several processes, each of which would move its own copy."""
    bank.warned_of_ranks = True
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            f"{dist.get_world_size()} processes train, and this bank has all rows on each: every process moves its own copy by "
            "its own batches, and they diverge. Share the samples out with r2d2fast.ShardedBatchSampler and "
            "ShardedPseudoLabelBank; or, if each process has a bank of samples that are its alone, set bank.sharded = True",
            stacklevel=4,
        )


class _D2Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, logits, index, bank, options, statistics, inplace):  # type: ignore[no-untyped-def]
        # A view of the logits that has their version: whoever changes them before backward is told.
        out = logits.detach() if inplace else None
        loss, grad = _step(backend, logits, index, bank, options, statistics, out)
        in_tensor = isinstance(options.grad_scale, Tensor)
        ctx.save_for_backward(grad, options.grad_scale if in_tensor else None)
        ctx.grad_scale = None if in_tensor else options.grad_scale
        ctx.scale_gradient = backend.scale_gradient
        return loss

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("FusedD2Loss has no second derivative; use r2d2fast.reference.d2_loss for one")
        grad, scale = ctx.saved_tensors
        if grad_output.dim():  # the losses of the rows
            factor = grad_output / (ctx.grad_scale if scale is None else scale)
            return None, (grad * factor[:, None]).to(grad.dtype), None, None, None, None, None
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        grad = ctx.scale_gradient(grad, grad_output, ctx.grad_scale if scale is None else scale, keep)
        return None, grad, None, None, None, None, None


def _loss(
    logits: Tensor,
    index: Tensor,
    bank: PseudoLabelBank,
    options: StepOptions,
    statistics: Tensor | None,
    backend: str,
    sample_weight: Tensor | None,
    inplace: bool,
) -> Tensor:
    """The loss, with its derivative."""
    check_batch(logits, index, bank)
    inplace = inplace and logits.requires_grad and torch.is_grad_enabled()
    if inplace:
        check_out(logits, logits)
    if sample_weight is not None:
        return _weighted(logits, index, bank, options, statistics, backend, sample_weight, inplace)
    if bank.sharded:
        index = bank.localize(index)
    if is_compiling():
        loss, grad = compiled.step(logits, index, bank, options, statistics, backend)
        return compiled.attach(logits, loss, grad, options.grad_scale)
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "the D2 loss writes to its bank and cannot run inside torch.func transforms (grad, vmap, jvp); "
            "call loss.backward(), or r2d2fast.d2_step for the gradient in closed form"
        )
    module = choose(backend, logits, bank.pseudo_logits)
    return _D2Loss.apply(module, logits, index, bank, options, statistics, inplace)


def _weighted(
    logits: Tensor,
    index: Tensor,
    bank: PseudoLabelBank,
    options: StepOptions,
    statistics: Tensor | None,
    backend: str,
    sample_weight: Tensor,
    inplace: bool,
) -> Tensor:
    """The rows' losses times their weights, reduced."""
    if not isinstance(sample_weight, Tensor) or not sample_weight.is_floating_point():
        kind = sample_weight.dtype if isinstance(sample_weight, Tensor) else type(sample_weight).__name__
        raise TypeError(f"sample_weight is {kind}; pass a floating-point tensor, one weight a row of logits")
    if sample_weight.shape != index.shape or sample_weight.device != logits.device:
        raise ValueError(
            f"sample_weight is {list(sample_weight.shape)} on {sample_weight.device}; "
            f"pass {list(index.shape)} on {logits.device}, one weight a row of logits"
        )
    # As they were given: below they are others, and the operator is told of those alone.
    if is_compiling():
        options.check_reduction()
    else:
        options.check(bank.pseudo_logits)
    update_divisor = options.update_normalizer
    if update_divisor is None and options.normalizer is not None:
        update_divisor = options.normalizer * options.batches
    divisor: float = 1
    grad_scale: float | Tensor = options.grad_scale
    if options.reduction == "mean":
        divisor = max(len(index), 1) if options.normalizer is None else options.normalizer
        if is_compiling() and options.normalizer is None and not isinstance(grad_scale, Tensor):
            # A number made from the batch's size would make torch.compile recompile for every size; a tensor does not.
            grad_scale = torch.full((), grad_scale, dtype=torch.float32, device=logits.device)
        # float16 then holds the rows' gradients wherever it holds those of their mean; backward divides by it again.
        grad_scale = grad_scale / divisor
    unreduced = options._replace(
        grad_scale=grad_scale, reduction="none", normalizer=None, update_normalizer=update_divisor
    )
    losses = _loss(logits, index, bank, unreduced, statistics, backend, None, inplace) * sample_weight
    if options.reduction == "none":
        return losses
    return (losses.sum(dtype=torch.float64) / divisor).to(losses.dtype)


def d2_step(
    logits: Tensor,
    index: Tensor,
    bank: PseudoLabelBank,
    *,
    alpha: float | Tensor = 0.1,
    beta: float | Tensor = 0.03,
    label_lr: float | Tensor = 4000.0,
    class_loss: str = "kl_reverse",
    normalizer: float | None = None,
    update_normalizer: float | None = None,
    grad_scale: float | Tensor = 1.0,
    update: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One D2 step without autograd, for loops that call ``logits.backward(grad)``.

    Args:
        logits: ``[B, N]``, float32, bfloat16, float16 (or float64, by the reference).
        index: int64 or int32 ``[B]``, the sample number of each row.
        bank: its rows of the unlabelled samples are updated in place where ``update`` (Eq. 7).
        alpha, beta: weights of the class loss and of the entropy.
        label_lr: λ, the step size of the pseudo-logits.
        class_loss: ``"kl_reverse"`` KL(p̂‖p̃), ``"kl"`` KL(p̃‖p̂) or ``"mse"`` (Table 4).
        normalizer: D, what the summed loss is divided by; default B. Only with ``reduction="mean"``.
        update_normalizer: D_u, the same for the update; default D, or B where the reduction is another. With data
            parallelism: the global batch.
        grad_scale: multiplies the returned gradient, before it is rounded to the logits' dtype.
            alpha, beta, label_lr and grad_scale may be float32 tensors of shape [] on the logits' device: a captured CUDA
            graph then replays with the values they have by then, and ``torch.compile`` never recompiles for them.
        update: whether the pseudo-logits move.
        reduction: ``"mean"``, Σ_i L_i / D; ``"sum"``, Σ_i L_i; or ``"none"``, the L_i of all rows. The pseudo-logits move alike.
        backend: ``"auto"`` or a name in :func:`r2d2fast.backends`.
        out: where to write the gradient; by default to a new tensor. Contiguous, of the logits' shape, dtype and device. Either a
            tensor that shares no memory with logits, index or bank, or ``logits`` itself, which the gradient then overwrites:
            one tensor of the batch's size less. ``logits.backward(grad)`` is right wherever the operation that made the logits
            does not need them again: a linear layer does not, and of one that does autograd says so in a RuntimeError.

    Returns:
        The loss, a float32 scalar or, unreduced, ``[B]``, and its gradient with respect to the logits, ``[B, N]`` in their dtype:
        of row i, where the loss is not reduced, ∂L_i/∂ŷ_i. Where ``out`` is given the gradient is on its memory, detached. A row
        with a non-finite logit makes the loss and its own gradient NaN and leaves its pseudo-logits alone.

    Raises:
        IndexError: an index outside ``[0, M)``; nothing has been written. On a GPU, where the host does not wait for the
            kernel, such a row is treated as one that is not finite, and ``bank.check()`` raises.
        TypeError, ValueError: shapes, dtypes, devices or numbers that do not fit.
        BackendError: the backend asked for is not available.

    Warns:
        UserWarning: alpha <= beta, for which pseudo-labels do not follow the predictions (Theorem 1).
    """
    check_batch(logits, index, bank)
    if bank.sharded:
        index = bank.localize(index)
    options = StepOptions(
        alpha, beta, label_lr, grad_scale, class_loss, normalizer, update_normalizer, update, reduction, bank.ranks
    )
    if out is not None:
        out = check_out(out, logits)
    if is_compiling():
        return compiled.step(logits, index, bank, options, None, backend, out)
    result = _step(choose(backend, logits, bank.pseudo_logits), logits, index, bank, options, None, out)
    warn_of_small_alpha(alpha, beta, stacklevel=2)
    return result


def d2_loss(
    logits: Tensor,
    index: Tensor,
    bank: PseudoLabelBank,
    *,
    sample_weight: Tensor | None = None,
    alpha: float | Tensor = 0.1,
    beta: float | Tensor = 0.03,
    label_lr: float | Tensor = 4000.0,
    class_loss: str = "kl_reverse",
    normalizer: float | None = None,
    update_normalizer: float | None = None,
    grad_scale: float | Tensor = 1.0,
    update: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    inplace: bool = False,
) -> Tensor:
    """The D2 loss with its derivative for autograd: the functional form of :class:`FusedD2Loss`.

    Args:
        sample_weight: as in :meth:`FusedD2Loss.forward`; everything else as in :func:`d2_step`.
        update: whether the pseudo-logits move; they do so only where gradients are enabled.
        inplace: as of :class:`FusedD2Loss`.

    Returns:
        The loss, a float32 scalar or, with ``reduction="none"``, ``[B]``. Errors and warnings as in :func:`d2_step`.
    """
    check_bank(bank)
    update = update and torch.is_grad_enabled()
    options = StepOptions(
        alpha, beta, label_lr, grad_scale, class_loss, normalizer, update_normalizer, update, reduction, bank.ranks
    )
    loss = _loss(logits, index, bank, options, None, backend, sample_weight, inplace)
    if not is_compiling():
        warn_of_small_alpha(alpha, beta, stacklevel=2)
    return loss


class FusedD2Loss(torch.nn.Module):
    """The D2 loss α L_c + β L_e over a batch, with the pseudo-labels learned as a side effect (paper, section 3).

    One kernel computes both softmaxes, the loss, its gradient and the update ỹ ← ỹ − λ ∂L/∂ỹ. The update happens in the
    forward call, exactly once, if the module is in training mode and gradients are enabled; it depends on nothing that
    happens to the loss afterwards. In eval mode or under ``no_grad`` the bank is only read. Activation checkpointing runs a
    forward call twice: keep this call outside the checkpointed part.

    The bank is neither parameter nor buffer, so that optimizers, weight decay, DDP's broadcasts and averages of a model leave it
    alone. Yet it goes where the module goes: ``.to()`` and ``.cuda()``, of this module or of one that holds it, move bank and
    statistics. ``.half()`` and the like do not change the bank's dtype, which is what the bank was made with. One in pinned
    memory or a file stays where it is, with a warning. ``copy.deepcopy`` makes a module that shares the bank. ``state_dict()``
    carries bank and statistics as extra state.

    Args:
        bank, alpha, beta, label_lr, class_loss, normalizer, update_normalizer, backend, reduction: as in :func:`d2_step`.
        statistics: keep running sums over the batches, to be read by :meth:`read_statistics`.
        gradient_accumulation_steps: k, how many batches of equal size are accumulated before each step of the optimizer. D_u is
            then k·D, so that the pseudo-labels move as far as with one batch of all. The loss stays that of the batch: divide it
            by k where your framework does not (Lightning, Accelerate and Transformers do). Not with ``update_normalizer``, which
            says the same by itself.
        persistent: whether ``state_dict()`` carries the bank, as of a buffer. Without it save ``bank.state_dict()`` by yourself.
        inplace: the gradient overwrites the logits in the forward call, where they need one, instead of taking memory of its own.
            You must not read the logits afterwards. Where the operation that made the logits needs them for its own backward (a
            linear layer does not), autograd raises a RuntimeError in ``backward()``. Without effect under ``torch.compile``.

    Raises:
        TypeError: ``bank`` is no :class:`PseudoLabelBank`, or a number is none.
        ValueError: a number or name outside of what :func:`d2_step` takes; with ``inplace``, in the forward call, logits that are
            a leaf, a view of one (of a parameter, say), not contiguous, or memory of the bank.

    Warns:
        UserWarning: alpha <= beta, for which pseudo-labels do not follow the predictions (Theorem 1).

    Example:
        >>> criterion = FusedD2Loss(PseudoLabelBank(labels, num_classes=10))
        >>> loss = criterion(model(images), index)
        >>> loss.backward()
    """

    def __init__(
        self,
        bank: PseudoLabelBank,
        alpha: float | Tensor = 0.1,
        beta: float | Tensor = 0.03,
        label_lr: float | Tensor = 4000.0,
        class_loss: str = "kl_reverse",
        normalizer: float | None = None,
        update_normalizer: float | None = None,
        backend: str = "auto",
        statistics: bool = False,
        reduction: str = "mean",
        gradient_accumulation_steps: int = 1,
        persistent: bool = True,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        check_bank(bank)
        StepOptions(alpha, beta, label_lr, 1.0, class_loss, normalizer, update_normalizer, reduction=reduction).check(
            bank.pseudo_logits
        )
        if not isinstance(gradient_accumulation_steps, int) or gradient_accumulation_steps < 1:
            raise ValueError(f"gradient_accumulation_steps is {gradient_accumulation_steps!r}; it must be 1, 2, …")
        if gradient_accumulation_steps > 1 and update_normalizer is not None:
            raise ValueError(
                f"gradient_accumulation_steps={gradient_accumulation_steps} and update_normalizer={update_normalizer} both say "
                "how far pseudo-labels move; pass one of them"
            )
        warn_of_small_alpha(alpha, beta, stacklevel=2)
        self.bank = bank
        self.alpha = alpha
        self.beta = beta
        self.label_lr = label_lr
        self.class_loss = class_loss
        self.normalizer = normalizer
        self.update_normalizer = update_normalizer
        self.backend = backend
        self.reduction = reduction
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.persistent = persistent
        self.inplace = inplace
        self._statistics: Tensor | None = None
        if statistics:
            self._statistics = torch.zeros(len(STATISTICS), dtype=torch.float64, device=bank.device)

    def extra_repr(self) -> str:
        return f"{self.bank!r}, alpha={self.alpha}, beta={self.beta}, label_lr={self.label_lr}, class_loss={self.class_loss!r}"

    def forward(
        self, logits: Tensor, index: Tensor, grad_scale: float | Tensor = 1.0, sample_weight: Tensor | None = None
    ) -> Tensor:
        """The loss of a batch for ``logits`` ``[B, N]`` and sample numbers ``index`` ``[B]``: float32, a scalar or, with
        ``reduction="none"``, ``[B]``.

        Args:
            grad_scale: with float16 logits, the scale of a ``GradScaler``, so that the gradient is rounded only after it; it
                changes no result otherwise.
            sample_weight: ``[B]``, floating-point: each row's loss is multiplied by its weight; the mean is still over D, not
                over the weights. As any weight of a loss it leaves the pseudo-labels alone, which move as without it.

        Errors as in :func:`d2_step`.
        """
        options = self._options(grad_scale)
        return _loss(logits, index, self.bank, options, self.statistics, self.backend, sample_weight, self.inplace)

    def step(
        self, logits: Tensor, index: Tensor, grad_scale: float | Tensor = 1.0, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same without autograd, for loops that call ``logits.backward(grad)``: the loss and its gradient, as of
        :func:`d2_step`, times ``grad_scale``; ``out`` as there, for which ``inplace`` plays no part. The update happens as in
        :meth:`forward`."""
        check_batch(logits, index, self.bank)
        if out is not None:
            out = check_out(out, logits)
        if self.bank.sharded:
            index = self.bank.localize(index)
        options = self._options(grad_scale)
        if is_compiling():
            return compiled.step(logits, index, self.bank, options, self.statistics, self.backend, out)
        backend = choose(self.backend, logits, self.bank.pseudo_logits)
        return _step(backend, logits.detach(), index, self.bank, options, self.statistics, out)

    def _options(self, grad_scale: float | Tensor) -> StepOptions:
        return StepOptions(
            self.alpha,
            self.beta,
            self.label_lr,
            grad_scale,
            self.class_loss,
            self.normalizer,
            self.update_normalizer,
            self.training and torch.is_grad_enabled(),
            self.reduction,
            self.gradient_accumulation_steps * self.bank.ranks,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FusedD2Loss":
        """What ``.to()``, ``.cuda()``, ``.half()`` and the like of this module, or of one that holds it, come to."""
        super()._apply(fn, recurse)
        # Where it sends a tensor: one of integers, which no cast concerns.
        device = fn(torch.empty(0, dtype=torch.int64, device=self.bank.device)).device
        if self.bank.storage != "device" and device != self.bank.device:
            where = "pinned memory" if self.bank.storage == "pinned" else f"the file {self.bank.storage}"
            warnings.warn(
                f"the bank stays on {self.bank.device}, in {where}, while the module moves to {device}; pass logits on "
                f"{self.bank.device}, or make the bank with storage='device'",
                stacklevel=2,
            )
            return self
        self.bank.to(device)
        for name in ("alpha", "beta", "label_lr"):
            if isinstance(getattr(self, name), Tensor):
                setattr(self, name, getattr(self, name).to(device))
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedD2Loss":
        """A copy that shares the bank: averages of a model, which are deep copies, need no second one of gigabytes."""
        memo[id(self.bank)] = self.bank
        made = memo[id(self)] = self.__class__.__new__(self.__class__)
        made.__setstate__(copy.deepcopy(self.__dict__, memo))
        return made

    def get_extra_state(self) -> dict[str, Any] | Tensor:
        """Bank and statistics, as tensors that share their memory and plain values; an empty tensor if not ``persistent``."""
        if not self.persistent:
            return torch.empty(0)
        statistics = self.statistics
        return {"bank": self.bank.state_dict()} | ({} if statistics is None else {"statistics": statistics})

    def set_extra_state(self, state: dict[str, Any] | Tensor) -> None:
        """Take over what :meth:`get_extra_state` gave; nothing if not ``persistent``.

        Raises BankError for the state of other samples or classes, or for one without a bank.
        """
        if not self.persistent:
            return
        if not isinstance(state, dict):
            raise BankError(
                "this state was saved by a FusedD2Loss with persistent=False, without the bank: load it into one that has "
                "persistent=False, too, and fill the bank with bank.load_state_dict() or bank.predict_()"
            )
        self.bank.load_state_dict(state["bank"])
        statistics = self.statistics
        if statistics is not None and "statistics" in state:
            statistics.copy_(state["statistics"])

    @property
    def statistics(self) -> Tensor | None:
        """The running sums, float64 ``[7]``, on the bank's device: they move when the bank has moved. None without statistics."""
        if self._statistics is not None and self._statistics.device != self.bank.device:
            self._statistics = self._statistics.to(self.bank.device)
        return self._statistics

    def read_statistics(self) -> dict[str, float]:
        """Means over the unlabelled rows since the last call, which this resets; one copy from the device.

        ``rows`` (how many), ``class_loss``, ``entropy`` (nats), ``prediction_confidence`` (max p̂), ``pseudo_confidence``
        (max p̃), ``agreement`` (share with argmax ŷ = argmax ỹ), and ``skipped``, the number of rows that were not finite.
        """
        statistics = self.statistics
        if statistics is None:
            raise RuntimeError("this loss keeps no statistics; make it with FusedD2Loss(..., statistics=True)")
        sums = dict(zip(STATISTICS, statistics.tolist(), strict=True))
        statistics.zero_()
        rows = max(sums["rows"], 1.0)
        return {name: value if name in ("rows", "skipped") else value / rows for name, value in sums.items()}
