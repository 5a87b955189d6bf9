"""The D2 loss: :class:`FusedD2Loss` for training loops with autograd, :func:`d2_step` for those without."""

import warnings
from types import ModuleType

import torch
from torch import Tensor

from r2d2fast import compiled
from r2d2fast._backends import choose
from r2d2fast._backends.checks import apart, check_batch
from r2d2fast._backends.common import STATISTICS
from r2d2fast.bank import PseudoLabelBank
from r2d2fast.options import StepOptions


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
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One D2 step without autograd, for loops that call ``logits.backward(grad)``.

    Args:
        logits: ``[B, N]``, float32, bfloat16, float16 (or float64, by the reference).
        index: int64 or int32 ``[B]``, the sample number of each row.
        bank: its rows of the unlabelled samples are updated in place where ``update`` (Eq. 7).
        alpha, beta: weights of the class loss and of the entropy.
        label_lr: λ, the step size of the pseudo-logits.
        class_loss: ``"kl_reverse"`` KL(p̂‖p̃), ``"kl"`` KL(p̃‖p̂) or ``"mse"`` (Table 4).
        normalizer: D, what the summed loss is divided by; default B.
        update_normalizer: D_u, the same for the update; default D. With data parallelism: the global batch.
        grad_scale: multiplies the returned gradient, before it is rounded to the logits' dtype.
            alpha, beta, label_lr and grad_scale may be float32 tensors of shape [] on the logits' device: a captured CUDA
            graph then replays with the values they have by then, and ``torch.compile`` never recompiles for them.
        backend: ``"auto"`` or a name in :func:`r2d2fast.backends`.

    Returns:
        The loss Σ_i L_i / D (float32 scalar) and its gradient with respect to the logits, ``[B, N]`` in their dtype. A row
        with a non-finite logit makes the loss and its own gradient NaN and leaves its pseudo-logits alone.

    Raises:
        IndexError: an index outside ``[0, M)``; nothing has been written. On a GPU, where the host does not wait for the
            kernel, such a row is treated as one that is not finite, and ``bank.check()`` raises.
        TypeError, ValueError: shapes, dtypes or devices that do not fit.
        BackendError: the backend asked for is not available.
    """
    check_batch(logits, index, bank)
    options = StepOptions(alpha, beta, label_lr, grad_scale, class_loss, normalizer, update_normalizer, update)
    if torch.compiler.is_compiling():
        return compiled.step(logits, index, bank, options, None, backend)
    return _step(choose(backend, logits, bank.pseudo_logits), logits, index, bank, options, None)


def _step(
    backend: ModuleType,
    logits: Tensor,
    index: Tensor,
    bank: PseudoLabelBank,
    options: StepOptions,
    statistics: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient, in eager mode."""
    options.check(bank.device)
    result = backend.step(apart(logits, bank), index, bank, options, statistics)
    if options.update:  # in-place writes that autograd cannot see by itself
        torch.autograd.graph.increment_version(bank.pseudo_logits)
    return result


class FusedD2Loss(torch.nn.Module):
    """The D2 loss α L_c + β L_e over a batch, with the pseudo-labels learned as a side effect (paper, section 3).

    One kernel computes both softmaxes, the loss, its gradient and the update ỹ ← ỹ − λ ∂L/∂ỹ. The update happens in the
    forward call, exactly once, if the module is in training mode and gradients are enabled; it depends on nothing that
    happens to the loss afterwards. In eval mode or under ``no_grad`` the bank is only read. Activation checkpointing runs a
    forward call twice: keep this call outside the checkpointed part.

    Args:
        bank, alpha, beta, label_lr, class_loss, normalizer, update_normalizer, backend: as in :func:`d2_step`.
        statistics: keep running sums over the batches, to be read by :meth:`read_statistics`.

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
    ) -> None:
        super().__init__()
        StepOptions(alpha, beta, label_lr, 1.0, class_loss, normalizer, update_normalizer).check(bank.device)
        if alpha <= beta:
            warnings.warn(
                f"alpha={alpha} <= beta={beta}: by Theorem 1 of the paper, p̃ = exp(-L/alpha) p̂^(1 - beta/alpha), so that "
                "pseudo-labels then no longer grow with the predictions; the paper uses alpha=0.1, beta=0.03",
                stacklevel=2,
            )
        self.bank = bank
        self.alpha = alpha
        self.beta = beta
        self.label_lr = label_lr
        self.class_loss = class_loss
        self.normalizer = normalizer
        self.update_normalizer = update_normalizer
        self.backend = backend
        self._statistics: Tensor | None = None
        if statistics:
            self._statistics = torch.zeros(len(STATISTICS), dtype=torch.float64, device=bank.device)

    def extra_repr(self) -> str:
        return f"{self.bank!r}, alpha={self.alpha}, beta={self.beta}, label_lr={self.label_lr}, class_loss={self.class_loss!r}"

    def forward(self, logits: Tensor, index: Tensor, grad_scale: float | Tensor = 1.0) -> Tensor:
        """Mean loss of a batch (scalar float32) for ``logits`` ``[B, N]`` and sample numbers ``index`` ``[B]``.

        ``grad_scale``: with float16 logits, the scale of a ``GradScaler``, so that the gradient is rounded only after it;
        it changes no result otherwise. Errors as in :func:`d2_step`.
        """
        check_batch(logits, index, self.bank)
        options = self._options(grad_scale)
        if torch.compiler.is_compiling():
            loss, grad = compiled.step(logits, index, self.bank, options, self.statistics, self.backend)
            return compiled.attach(logits, loss, grad, grad_scale)
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "FusedD2Loss writes to its bank and cannot run inside torch.func transforms (grad, vmap, jvp); "
                "call loss.backward(), or r2d2fast.d2_step for the gradient in closed form"
            )
        backend = choose(self.backend, logits, self.bank.pseudo_logits)
        return _D2Loss.apply(backend, logits, index, self.bank, options, self.statistics)

    def step(self, logits: Tensor, index: Tensor, grad_scale: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """The same without autograd, for loops that call ``logits.backward(grad)``: the loss and its gradient, as of
        :func:`d2_step`, times ``grad_scale``. The update happens as in :meth:`forward`."""
        check_batch(logits, index, self.bank)
        backend = choose(self.backend, logits, self.bank.pseudo_logits)
        return _step(backend, logits.detach(), index, self.bank, self._options(grad_scale), self.statistics)

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
        )

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


class _D2Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, logits, index, bank, options, statistics):  # type: ignore[no-untyped-def]
        loss, grad = _step(backend, logits, index, bank, options, statistics)
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
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        grad = ctx.scale_gradient(grad, grad_output, ctx.grad_scale if scale is None else scale, keep)
        return None, grad, None, None, None, None
