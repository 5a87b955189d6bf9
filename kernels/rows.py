"""The mathematics of a row of the D2 step in tiles: ``csrc/d2_math.h`` in Triton, and its reasons are there."""

import triton
import triton.language as tl
from r2d2fast.kernels.batch import is_finite


@triton.jit
def below(x, largest):
    # The distance is cut at -1e31, so that the sums of 262 144 such distances are finite, also where a long row climbs by as
    # much from tile to tile, and for padding, which is -inf.
    return tl.maximum(x - largest, -1e31)


@triton.jit
def exponential(u):
    # Not exp2(x·log2(e) - largest·log2(e)), one instruction less: its error would grow with the largest logit.
    return tl.exp2(u * 1.4426950408889634)


@triton.jit
def weighted(weight, value):
    # Log-probabilities of classes whose probability underflows can be too far apart for float32.
    return weight * tl.where(weight > 0, value, 0.0)


@triton.jit
def add_up(values):
    return tl.sum(values, 1, keep_dims=True)


@triton.jit
def largest_of(values):
    return tl.max(values, 1, keep_dims=True)


@triton.jit
def sums_of(x, y, max_x, max_y, valid, CLASS_LOSS: tl.constexpr):
    """Σ e^u, Σ e^v, Σ e^u u, Σ e^u (u - v) (kl: e^v), and the state: 2 if not all is finite, 1 if a class has both maxima."""
    u, v = below(x, max_x), below(y, max_y)
    eu, ev = exponential(u), exponential(v)
    state = tl.where(valid & ~(is_finite(x) & is_finite(y)), 2, ((u == 0) & (v == 0)).to(tl.int32))
    difference = (ev if CLASS_LOSS == "kl" else eu) * (u - v)
    return add_up(eu), add_up(ev), add_up(eu * u), add_up(difference), largest_of(state)


@triton.jit
def rebase(p, q, pu, d, dx, dy, CLASS_LOSS: tl.constexpr):
    """The sums as they would be had the maxima been larger, by -dx and -dy."""
    sx, sy = exponential(dx), exponential(dy)
    d = sy * (d + (dx - dy) * q) if CLASS_LOSS == "kl" else sx * (d + (dx - dy) * p)
    return sx * p, sy * q, sx * (pu + dx * p), d


@triton.jit
def deviations_of(x, y, max_x, max_y, p, q):
    """Σ (p - q)², Σ p(p - q), Σ q(q - p), for mse."""
    share_p, share_q = exponential(below(x, max_x)) * (1 / p), exponential(below(y, max_y)) * (1 / q)
    difference = share_p - share_q
    return add_up(difference * difference), add_up(share_p * difference), -add_up(share_q * difference)


@triton.jit
def losses_of(p, q, pu, d, squared, CLASS_LOSS: tl.constexpr):
    """The class loss and the entropy of a row."""
    # One logarithm of the ratio: two of sums near N would leave the rounding of each in their difference.
    if CLASS_LOSS == "kl_reverse":
        class_loss = d / p - tl.log(p / q)
    elif CLASS_LOSS == "kl":
        class_loss = tl.log(p / q) - d / q
    else:
        class_loss = squared
    return class_loss, tl.log(p) - pu / p


@triton.jit
def derive(
    x, y, max_x, max_y, p, q, pu, d, mean_p, mean_q, alpha, beta, grad_weight, label_rate, CLASS_LOSS: tl.constexpr
):
    """∂L/∂ŷ·grad_weight (Eq. 5, 14, 15) and ỹ - ∂L/∂ỹ·label_rate (Eq. 7)."""
    u, v = below(x, max_x), below(y, max_y)
    eu, ev = exponential(u), exponential(v)
    over_p, over_q = 1 / p, 1 / q
    class_grad, pseudo_grad = over_p * (alpha * grad_weight), over_q * (alpha * grad_weight)
    rate_p, rate_q = over_p * (alpha * label_rate), over_q * (alpha * label_rate)
    entropy = over_p * (beta * grad_weight) * (u - pu * over_p)
    if CLASS_LOSS == "kl_reverse":
        gradient = weighted(eu, class_grad * ((u - v) - d * over_p) - entropy)
        descent = rate_q * ev - rate_p * eu
    elif CLASS_LOSS == "kl":
        gradient = weighted(eu, class_grad - entropy) - pseudo_grad * ev
        descent = weighted(ev, rate_q * (d * over_q - (u - v)))
    else:
        difference = eu * over_p - ev * over_q
        gradient = weighted(eu, 2 * class_grad * (difference - mean_p) - entropy)
        descent = ev * (2 * rate_q * (-difference - mean_q))
    return gradient, y - descent
