// The mathematics of one row of the D2 step (DESIGN.md, section 3), for the host and the device.
//
// Written over a value type T: float (a row's own sums, or a CUDA thread) or a SIMD vector. A kernel does, per row,
//
//   1. m = max ŷ, n = max ỹ                    (u = ŷ − m, v = ỹ − n are all ≤ 0: no exponential overflows)
//   2. eu = exp u, ev = exp v, accumulate()    → Sums over the classes
//   3. finish()                                → Row: the loss, and the coefficients of step 4
//   4. gradient(), descent()                   → ∂L/∂ŷ·scale and the amount to take off ỹ
//
// Nothing is normalised before step 3, so the exponentials are computed once and both softmaxes, the class loss, the
// entropy and both gradients follow from six sums. mse alone needs a second set of sums (Deviations), since
// |p − q|² from Σp², Σq², Σpq would lose every digit where p ≈ q.
#pragma once

#if defined(__CUDACC__)
#define R2D2_INLINE __host__ __device__ __forceinline__
#else
#define R2D2_INLINE inline __attribute__((always_inline))
#endif

namespace r2d2 {

enum class ClassLoss : int { kl_reverse = 0, kl = 1, mse = 2 };

// Σ e^u, Σ e^v, and Σ e^u u, Σ e^u v, Σ e^v u, Σ e^v v, of which a class loss fills the ones it needs.
template <class T>
struct Sums {
  T p{}, q{}, pu{}, pv{}, qu{}, qv{};
};

template <ClassLoss L, class T>
R2D2_INLINE void accumulate(Sums<T>& sums, T u, T v, T eu, T ev) {
  sums.p += eu;
  sums.q += ev;
  sums.pu += eu * u;
  if constexpr (L == ClassLoss::kl_reverse) sums.pv += eu * v;
  if constexpr (L == ClassLoss::kl) sums.qu += ev * u;
  if constexpr (L != ClassLoss::kl_reverse) sums.qv += ev * v;
}

// A row is sound where its sums are finite: a NaN or infinity anywhere in ŷ or ỹ reaches one of these.
template <ClassLoss L, class T>
R2D2_INLINE auto sound(const Sums<T>& sums) {
  T probe = sums.pu + (L == ClassLoss::kl_reverse ? sums.pv : sums.qv);
  if constexpr (L == ClassLoss::kl) probe += sums.qu;
  return (probe - probe) == (probe - probe);
}

// Σ (p−q)², Σ p(p−q), Σ q(q−p) (mse only).
template <class T>
struct Deviations {
  T squared{}, weighted_p{}, weighted_q{};
};

template <class T>
R2D2_INLINE void accumulate(Deviations<T>& sums, T p, T q) {
  T d = p - q;
  sums.squared += d * d;
  sums.weighted_p += p * d;
  sums.weighted_q -= q * d;
}

// What a step multiplies with: α, β, the gradient's scale over D, label_lr over D_u.
struct Weights {
  float alpha, beta, grad_weight, label_rate;
};

template <class T>
struct Row {
  T class_loss, entropy, prediction_confidence, pseudo_confidence;
  T g0, gu, gv, gp, gq, gs;  // gradient = eu (g0 + gu u + gv v + gp eu + gq ev) + gs ev
  T y0, yu, yv, yp, yq, ys;  // descent  = ev (y0 + yu u + yv v + yp eu + yq ev) + ys eu
};

// log_zp, log_zq: log s.p and log s.q, by whatever logarithm the platform has for T.
template <ClassLoss L, class T>
R2D2_INLINE Row<T> finish(const Sums<T>& s, const Deviations<T>& d, T log_zp, T log_zq, const Weights& w) {
  Row<T> row{};
  const T inv_zp = 1.0f / s.p, inv_zq = 1.0f / s.q;
  const T to_grad = inv_zp * w.grad_weight, to_row = inv_zq * (w.alpha * w.label_rate);
  row.prediction_confidence = inv_zp;  // the largest logit has e^u = 1
  row.pseudo_confidence = inv_zq;
  row.entropy = log_zp - s.pu * inv_zp;
  if constexpr (L == ClassLoss::kl_reverse) {  // Eq. 5, 6
    row.class_loss = (s.pu - s.pv) * inv_zp - (log_zp - log_zq);
    row.gu = to_grad * (w.alpha - w.beta);
    row.gv = to_grad * -w.alpha;
    row.g0 = to_grad * (w.alpha * (log_zq - log_zp - row.class_loss) + w.beta * (log_zp - row.entropy));
    row.y0 = to_row;
    row.ys = -inv_zp * (w.alpha * w.label_rate);
  } else if constexpr (L == ClassLoss::kl) {  // Eq. 14
    row.class_loss = (s.qv - s.qu) * inv_zq - (log_zq - log_zp);
    row.gu = to_grad * -w.beta;
    row.g0 = to_grad * (w.alpha + w.beta * (log_zp - row.entropy));
    row.gs = inv_zq * (-w.alpha * w.grad_weight);
    row.yv = to_row;
    row.yu = -to_row;
    row.y0 = to_row * (log_zp - log_zq - row.class_loss);
  } else {  // Eq. 15
    row.class_loss = d.squared;
    row.gu = to_grad * -w.beta;
    row.g0 = to_grad * (w.beta * (log_zp - row.entropy) - 2 * w.alpha * d.weighted_p);
    row.gp = to_grad * inv_zp * (2 * w.alpha);
    row.gq = to_grad * inv_zq * (-2 * w.alpha);
    row.y0 = to_row * d.weighted_q * -2.0f;
    row.yq = to_row * inv_zq * 2.0f;
    row.yp = to_row * inv_zp * -2.0f;
  }
  return row;
}

template <ClassLoss L, class T>
R2D2_INLINE T gradient(const Row<T>& row, T u, T v, T eu, T ev) {
  if constexpr (L == ClassLoss::kl_reverse) return eu * (row.g0 + row.gu * u + row.gv * v);
  if constexpr (L == ClassLoss::kl) return eu * (row.g0 + row.gu * u) + row.gs * ev;
  if constexpr (L == ClassLoss::mse) return eu * (row.g0 + row.gu * u + row.gp * eu + row.gq * ev);
}

template <ClassLoss L, class T>
R2D2_INLINE T descent(const Row<T>& row, T u, T v, T eu, T ev) {
  if constexpr (L == ClassLoss::kl_reverse) return row.y0 * ev + row.ys * eu;
  if constexpr (L == ClassLoss::kl) return ev * (row.y0 + row.yu * u + row.yv * v);
  if constexpr (L == ClassLoss::mse) return ev * (row.y0 + row.yp * eu + row.yq * ev);
}

}  // namespace r2d2
