"""The D2 step in one launch: every logit and pseudo-logit read once, every result written once."""

import itertools

import triton
import triton.language as tl
from r2d2fast.kernels.batch import any_of, find_occurrences, is_finite, locate, value_of
from r2d2fast.kernels.rounding import to_bank
from r2d2fast.kernels.rows import below, derive, deviations_of, largest_of, losses_of, rebase, sums_of
from r2d2fast.kernels.tiles import alignment, options_of, tile_of
from torch import Tensor

from r2d2fast.reference import Bank

# Odd numbers, far from those before them, in the range of an int32.
_launches = ((n * 0x9E3779B2 + 1) % 2**31 for n in itertools.count())

# A value of 1 or one divisible by 16 is not worth a compilation of its own in these arguments.
_RUN_TIME = ["logits_stride", "size", "rows_stride", "samples", "seed", "launch"]


@triton.jit
def weights_of(alpha, beta, label_lr, grad_scale, normalizer, update_normalizer):
    """The scalars of a step, the last two over D and D_u, and 2 if one of them is not finite: no row may then be written."""
    alpha, beta = value_of(alpha), value_of(beta)
    grad_weight, label_rate = value_of(grad_scale) / normalizer, value_of(label_lr) / update_normalizer
    usable = is_finite(alpha) & is_finite(beta) & is_finite(grad_weight) & is_finite(label_rate)
    return alpha, beta, grad_weight, label_rate, tl.where(usable, 0, 2)


@triton.jit
def row_of(rows, number, stride, ALIGN: tl.constexpr):
    """Where row ``number`` begins: beyond 2^31 elements, perhaps."""
    # The compiler sees that ALIGN divides it. Told so by tl.multiple_of, Triton 3.9 fails on tiles of one row.
    return rows + number.to(tl.int64) * (stride // ALIGN) * ALIGN


@triton.jit
def load_logits(logits, position, stride, mask, columns, ALIGN: tl.constexpr):
    return tl.load(row_of(logits, position, stride, ALIGN) + columns, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def load_pseudo(row, slot, mask, columns, label_scale):
    """ỹ: rows of the bank, and K·onehot(label) less K, so that the largest is 0, for labelled samples, which own no row."""
    y = tl.load(row + columns, mask=mask & (slot >= 0), other=float("-inf")).to(tl.float32)
    return tl.where(mask & (slot < 0), tl.where(columns == -1 - slot, 0.0, -label_scale), y)


@triton.jit
def load_piece(
    logits, position, logits_stride, row, slot, due, begin, label_scale,
    CLASSES: tl.constexpr, BLOCK: tl.constexpr, LOGITS_ALIGN: tl.constexpr,
):  # fmt: skip
    """The columns of a long row from ``begin`` on, which of them it has, and their ŷ and ỹ."""
    columns = begin + tl.arange(0, BLOCK)[None, :]
    valid = due & (columns < CLASSES)
    x = load_logits(logits, position, logits_stride, valid, columns, LOGITS_ALIGN)
    return columns, valid, x, load_pseudo(row, slot, valid, columns, label_scale)


@triton.jit
def store_gradient(grad, position, gradient, sound, mask, columns, CLASSES: tl.constexpr):
    gradient = tl.where(sound, gradient, float("nan")).to(grad.dtype.element_ty)
    tl.store(grad + position.to(tl.int64) * CLASSES + columns, gradient, mask=mask)


@triton.jit
def report(
    results, size, position, due, sound, slot, agrees, p, q, pu, d, squared, alpha, beta,
    CLASS_LOSS: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """What a row adds to the ordered sums: the loss and, each a plane of ``results``, the statistics."""
    class_loss, entropy = losses_of(p, q, pu, d, squared, CLASS_LOSS)
    plane = results + position
    tl.store(plane, tl.where(sound, alpha * class_loss + beta * entropy, float("nan")), mask=due)
    if STATISTICS:
        counts = sound & (slot >= 0)
        tl.store(plane + size, tl.where(counts, 1.0, 0.0), mask=due)
        tl.store(plane + 2 * size, tl.where(counts, class_loss, 0.0), mask=due)
        tl.store(plane + 3 * size, tl.where(counts, entropy, 0.0), mask=due)
        tl.store(plane + 4 * size, tl.where(counts, 1 / p, 0.0), mask=due)  # the largest logit has e^u = 1
        tl.store(plane + 5 * size, tl.where(counts, 1 / q, 0.0), mask=due)
        tl.store(plane + 6 * size, tl.where(counts & agrees, 1.0, 0.0), mask=due)
        tl.store(plane + 7 * size, tl.where(sound, 0.0, 1.0), mask=due)


@triton.jit
def sum_up(results, size, normalizer, loss, statistics, updates, status, launch, UPDATE: tl.constexpr):
    """The program that is done last adds up what all have reported, always in the same order: the same bits on every run."""
    PLANES: tl.constexpr = 1 if statistics is None else 8
    UNROLL: tl.constexpr = 8 if statistics is None else 1
    # What it stays if no program finds itself to be the last; each program writes it before its ticket, since a branch for one of
    # them costs 36 spills at 8192 columns with Triton 3.6.
    tl.store(loss, float("nan"))
    tl.debug_barrier()  # one thread takes the ticket, after what the others have written
    # Each program adds the launch's own number. csrc/d2_cuda_batch.h says what that notices.
    if tl.atomic_add(status, launch, sem="acq_rel") + launch == launch * tl.num_programs(0):
        plane = tl.arange(0, PLANES)[:, None]
        total = tl.zeros([PLANES, 64], tl.float64)
        for begin in tl.range(0, size, 64, loop_unroll_factor=UNROLL):
            i = begin + tl.arange(0, 64)[None, :]
            # Past the L1 cache, which is not told what other programs write.
            total += tl.load(results + plane * size + i, mask=i < size, other=0, cache_modifier=".cg")
        sums = tl.sum(total, 1, keep_dims=True)
        tl.store(loss + plane, (sums / normalizer).to(tl.float32), mask=plane == 0)
        if statistics is not None:
            of = statistics + plane - 1
            tl.store(of, tl.load(of, mask=plane > 0) + sums, mask=plane > 0)
        if UPDATE:
            tl.store(updates, tl.load(updates) + 1)
        tl.store(status, 0)  # for the next launch


@triton.jit(do_not_specialize=_RUN_TIME)
def step_kernel(
    logits, logits_stride, index, size, rows, rows_stride, slots, samples, updates, status, label_scale, seed,
    launch, grad, loss, results, statistics, alpha, beta, label_lr, grad_scale, normalizer, update_normalizer,
    CLASSES: tl.constexpr, CLASS_LOSS: tl.constexpr, UPDATE: tl.constexpr, STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
    LOGITS_ALIGN: tl.constexpr, ROWS_ALIGN: tl.constexpr,
):  # fmt: skip
    """A tile of whole rows, which stay in registers."""
    position, inside, sample, known, slot = locate(index, size, slots, samples, status, ROWS)
    alpha, beta, grad_weight, label_rate, bad_scalars = weights_of(
        alpha, beta, label_lr, grad_scale, normalizer, update_normalizer
    )
    columns = tl.arange(0, BLOCK)[None, :]
    valid = columns < CLASSES
    # Both loads are under way while the program looks for other occurrences of its samples.
    x = load_logits(logits, position, logits_stride, inside & valid, columns, LOGITS_ALIGN)
    row = row_of(rows, slot, rows_stride, ROWS_ALIGN)
    y = load_pseudo(row, slot, known & valid, columns, label_scale)
    due, moves, earlier = inside, slot >= 0, tl.full([ROWS, 1], -1, tl.int32)
    if UPDATE:
        occurs_later, earlier = find_occurrences(index, size, sample, position, ROWS, SPAN)
        due = inside & ((slot < 0) | ~occurs_later)
    max_y = largest_of(y)
    # A sample's last occurrence comes first: it moves the row, of which the earlier ones find the old values in y.
    while any_of(due):  # Triton 3.4 fails on a loop whose condition is a variable of its own
        max_x = largest_of(x)
        p, q, pu, d, state = sums_of(x, y, max_x, max_y, valid, CLASS_LOSS)
        squared, mean_p, mean_q = p, p, q  # of mse alone
        if CLASS_LOSS == "mse":
            squared, mean_p, mean_q = deviations_of(x, y, max_x, max_y, p, q)
        sound = known & (state + bad_scalars < 2)
        gradient, moved = derive(
            x, y, max_x, max_y, p, q, pu, d, mean_p, mean_q, alpha, beta, grad_weight, label_rate, CLASS_LOSS
        )
        store_gradient(grad, position, gradient, sound, due & valid, columns, CLASSES)
        if UPDATE:
            moved = to_bank(
                moved,
                slot.to(tl.int64) * CLASSES,
                updates,
                seed,
                rows.dtype.element_ty,
                STOCHASTIC,
                ROWS,
                BLOCK,
                CLASSES,
            )
            tl.store(row + columns, moved, mask=due & moves & sound & valid)
        report(
            results, size, position, due, sound, slot, state == 1, p, q, pu, d, squared, alpha, beta,
            CLASS_LOSS, statistics is not None,
        )  # fmt: skip
        due = due & (slot >= 0) & (earlier >= 0)
        if UPDATE:
            moves = tl.zeros([ROWS, 1], tl.int1)
            position = tl.where(due, earlier, position)
            if any_of(due):
                x = load_logits(logits, position, logits_stride, due & valid, columns, LOGITS_ALIGN)
                occurs_later, earlier = find_occurrences(index, size, sample, position, ROWS, SPAN)
    sum_up(results, size, normalizer, loss, statistics, updates, status, launch, UPDATE)


@triton.jit(do_not_specialize=_RUN_TIME)
def long_step_kernel(
    logits, logits_stride, index, size, rows, rows_stride, slots, samples, updates, status, label_scale, seed,
    launch, grad, loss, results, statistics, alpha, beta, label_lr, grad_scale, normalizer, update_normalizer,
    CLASSES: tl.constexpr, CLASS_LOSS: tl.constexpr, UPDATE: tl.constexpr, STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
    LOGITS_ALIGN: tl.constexpr, ROWS_ALIGN: tl.constexpr,
):  # fmt: skip
    """One row of any length, in pieces: maxima and sums in one read, gradient and update in a second; mse reads once more."""
    last, due, sample, known, slot = locate(index, size, slots, samples, status, ROWS)
    alpha, beta, grad_weight, label_rate, bad_scalars = weights_of(
        alpha, beta, label_lr, grad_scale, normalizer, update_normalizer
    )
    row = row_of(rows, slot, rows_stride, ROWS_ALIGN)
    position = last
    if UPDATE:
        occurs_later, earlier = find_occurrences(index, size, sample, last, ROWS, SPAN)
        due = due & ((slot < 0) | ~occurs_later)
        position = tl.where((slot >= 0) & (earlier >= 0), earlier, last)
    # A sample's last occurrence comes last: until then its row must stay in memory as it was.
    while any_of(due):
        max_x, max_y = tl.full([ROWS, 1], float("-inf"), tl.float32), tl.full([ROWS, 1], float("-inf"), tl.float32)
        p, q = tl.zeros([ROWS, 1], tl.float32), tl.zeros([ROWS, 1], tl.float32)
        pu, d, state = tl.zeros([ROWS, 1], tl.float32), tl.zeros([ROWS, 1], tl.float32), tl.zeros([ROWS, 1], tl.int32)
        for begin in range(0, CLASSES, BLOCK):
            columns, valid, x, y = load_piece(
                logits, position, logits_stride, row, slot, due, begin, label_scale, CLASSES, BLOCK, LOGITS_ALIGN
            )
            new_x, new_y = tl.maximum(max_x, largest_of(x)), tl.maximum(max_y, largest_of(y))
            dx, dy = below(max_x, new_x), below(max_y, new_y)
            p, q, pu, d = rebase(p, q, pu, d, dx, dy, CLASS_LOSS)
            more_p, more_q, more_pu, more_d, more_state = sums_of(x, y, new_x, new_y, valid, CLASS_LOSS)
            p, q, pu, d = p + more_p, q + more_q, pu + more_pu, d + more_d
            state = tl.maximum(tl.where((state < 2) & ((dx < 0) | (dy < 0)), 0, state), more_state)
            max_x, max_y = new_x, new_y
        squared, mean_p, mean_q = p, p, q  # of mse alone
        if CLASS_LOSS == "mse":
            squared, mean_p, mean_q = tl.zeros_like(p), tl.zeros_like(p), tl.zeros_like(p)
            for begin in range(0, CLASSES, BLOCK):
                _, _, x, y = load_piece(
                    logits, position, logits_stride, row, slot, due, begin, label_scale, CLASSES, BLOCK, LOGITS_ALIGN
                )
                more_squared, more_p, more_q = deviations_of(x, y, max_x, max_y, p, q)
                squared, mean_p, mean_q = squared + more_squared, mean_p + more_p, mean_q + more_q
        sound = known & (state + bad_scalars < 2)
        for begin in range(0, CLASSES, BLOCK):
            columns, valid, x, y = load_piece(
                logits, position, logits_stride, row, slot, due, begin, label_scale, CLASSES, BLOCK, LOGITS_ALIGN
            )
            gradient, moved = derive(
                x, y, max_x, max_y, p, q, pu, d, mean_p, mean_q, alpha, beta, grad_weight, label_rate, CLASS_LOSS
            )
            store_gradient(grad, position, gradient, sound, valid, columns, CLASSES)
            if UPDATE:
                first = slot.to(tl.int64) * CLASSES + begin
                moved = to_bank(moved, first, updates, seed, rows.dtype.element_ty, STOCHASTIC, ROWS, BLOCK, CLASSES)
                tl.store(row + columns, moved, mask=valid & (slot >= 0) & (position == last) & sound)
        report(
            results, size, position, due, sound, slot, state == 1, p, q, pu, d, squared, alpha, beta,
            CLASS_LOSS, statistics is not None,
        )  # fmt: skip
        due = due & (position != last)
        if UPDATE:  # noqa: SIM102 - the outer one is decided when compiling
            if any_of(due):
                occurs_later, earlier = find_occurrences(index, size, sample, position, ROWS, SPAN)
                position = tl.where(earlier >= 0, earlier, last)
    sum_up(results, size, normalizer, loss, statistics, updates, status, launch, UPDATE)


def step(
    logits: Tensor,
    index: Tensor,
    bank: Bank,
    grad: Tensor,
    loss: Tensor,
    results: Tensor,
    statistics: Tensor | None,
    scalars: tuple[float | Tensor, ...],
    normalizers: tuple[float, float],
    class_loss: str,
    update: bool,
) -> None:
    """Launches the step of ``logits`` ``[B, N]`` (rows contiguous) and ``index`` ``[B]`` (contiguous).

    ``results``: float32 ``[B]``, the loss of each row; with ``statistics`` ``[8, B]``; ``scalars``: alpha, beta, label_lr,
    grad_scale; ``normalizers``: D and D_u.
    """
    size, classes = logits.shape
    rows = bank.pseudo_logits
    tile = tile_of(classes)
    kernel = step_kernel if classes <= tile.block else long_step_kernel
    # An empty batch has a program, too: the loss is 0 and the step counts.
    kernel[(max(triton.cdiv(size, tile.rows), 1),)](
        logits, logits.stride(0), index, size, rows, rows.stride(0), bank.slots, len(bank.slots), bank.updates, bank.status,
        bank.label_scale, bank.seed, next(_launches), grad, loss, results, statistics, *scalars, *normalizers,
        classes, class_loss, update, bank.rounding == "stochastic", tile.rows, tile.block, tile.span,
        alignment(logits), alignment(rows), **options_of(tile),
    )  # fmt: skip
