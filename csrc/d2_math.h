// The mathematics of one row of the D2 step, for the host and the device.
//
// Written over a value type T: float (a row's own sums, or a CUDA thread) or a SIMD vector. A kernel does, per row,
//
//   1. m = max ŷ, n = max ỹ                    (u = ŷ − m, v = ỹ − n are all ≤ 0: no exponential overflows)
//   2. eu = exp u, ev = exp v, accumulate()    → Sums over the classes
//   3. finish()                                → Row: the loss, and the coefficients of step 4
//   4. gradient(), descent()                   → ∂L/∂ŷ·scale and the amount to take off ỹ
//
// Nothing is normalised before step 3, so the exponentials are computed once and both softmaxes, the class loss, the
// entropy and both gradients follow from four sums. mse alone needs a second set of sums (Deviations), since
// |p − q|² from Σp², Σq², Σpq would lose every digit where p ≈ q.
//
// What cancels is subtracted before it is multiplied: log p − log q enters as u − v, and both it and u are centred on their
// means, so that the normalisers drop out of the gradients and a saturated row (p one-hot) has a gradient of exactly 0.
#pragma once

#if defined(__CUDACC__)
#define R2D2_INLINE __host__ __device__ __forceinline__
#else
#define R2D2_INLINE inline __attribute__((always_inline))
#endif

namespace r2d2 {

enum class ClassLoss : int { kl_reverse = 0, kl = 1, mse = 2 };

// Σ e^u, Σ e^v, Σ e^u u, and Σ e^u (u − v), for kl Σ e^v (u − v).
template <class T>
struct Sums {
  T p{}, q{}, pu{}, d{};
};

template <ClassLoss L, class T>
R2D2_INLINE void accumulate(Sums<T>& sums, T u, T v, T eu, T ev) {
  sums.p += eu;
  sums.q += ev;
  sums.pu += eu * u;
  sums.d += (L == ClassLoss::kl ? ev : eu) * (u - v);
}

// A row is sound where its sums are finite: a NaN or infinity anywhere in ŷ or ỹ reaches the last.
template <class T>
R2D2_INLINE auto sound(const Sums<T>& sums) {
  const T probe = sums.pu + sums.d;
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
  T inv_zp, inv_zq, mean_u, mean_d, mean_p, mean_q;  // 1/Σe^u, 1/Σe^v; means of u, u−v, p−q, q−p
  T class_grad, entropy_grad, pseudo_grad;           // α/Zp, β/Zp, α/Zq, times grad_weight
  T rate_p, rate_q;                                  // α/Zp, α/Zq, times label_rate
};

// log_zp = log Σe^u, log_ratio = log(Σe^u/Σe^v), by whatever logarithm the platform has for T. The ratio has its own: the
// difference of two logarithms of sums near N would be wrong by their rounding.
template <ClassLoss L, class T>
R2D2_INLINE Row<T> finish(const Sums<T>& s, const Deviations<T>& d, T log_zp, T log_ratio, const Weights& w) {
  Row<T> row{};
  row.inv_zp = 1.0f / s.p;
  row.inv_zq = 1.0f / s.q;
  row.mean_u = s.pu * row.inv_zp;
  row.mean_d = s.d * (L == ClassLoss::kl ? row.inv_zq : row.inv_zp);
  row.mean_p = d.weighted_p;
  row.mean_q = d.weighted_q;
  row.class_grad = row.inv_zp * (w.alpha * w.grad_weight);
  row.entropy_grad = row.inv_zp * (w.beta * w.grad_weight);
  row.pseudo_grad = row.inv_zq * (w.alpha * w.grad_weight);
  row.rate_p = row.inv_zp * (w.alpha * w.label_rate);
  row.rate_q = row.inv_zq * (w.alpha * w.label_rate);
  if constexpr (L == ClassLoss::kl_reverse) row.class_loss = row.mean_d - log_ratio;
  if constexpr (L == ClassLoss::kl) row.class_loss = log_ratio - row.mean_d;
  if constexpr (L == ClassLoss::mse) row.class_loss = d.squared;
  row.entropy = log_zp - row.mean_u;
  row.prediction_confidence = row.inv_zp;  // the largest logit has e^u = 1
  row.pseudo_confidence = row.inv_zq;
  return row;
}

// weight·value, and 0 where the weight is 0 whatever the value: log-probabilities of classes whose probability underflows
// can be too far apart for float32.
template <class T>
R2D2_INLINE T weighted(T weight, T value) {
  return weight * (weight > T{} ? value : T{});
}

// ∂L/∂ŷ·grad_weight: Eq. 5, 14, 15, and the entropy's.
template <ClassLoss L, class T>
R2D2_INLINE T gradient(const Row<T>& r, T u, T v, T eu, T ev) {
  const T entropy = r.entropy_grad * (u - r.mean_u);
  if constexpr (L == ClassLoss::kl_reverse) return weighted<T>(eu, r.class_grad * ((u - v) - r.mean_d) - entropy);
  if constexpr (L == ClassLoss::kl) return weighted<T>(eu, r.class_grad - entropy) - r.pseudo_grad * ev;
  const T d = eu * r.inv_zp - ev * r.inv_zq;
  return weighted<T>(eu, 2 * r.class_grad * (d - r.mean_p) - entropy);
}

// ∂L/∂ỹ·label_rate, to be taken off ỹ: Eq. 6, 14, 15.
template <ClassLoss L, class T>
R2D2_INLINE T descent(const Row<T>& r, T u, T v, T eu, T ev) {
  if constexpr (L == ClassLoss::kl_reverse) return r.rate_q * ev - r.rate_p * eu;
  if constexpr (L == ClassLoss::kl) return weighted<T>(ev, r.rate_q * (r.mean_d - (u - v)));
  const T d = ev * r.inv_zq - eu * r.inv_zp;
  return ev * (2 * r.rate_q * (d - r.mean_q));
}

}  // namespace r2d2
