// Sigmoid and tanh of sums that come scaled, so that no multiplication stands before the special
// function: by kSigmoidScale and kTanhScale, or with approximate ones by a half and one.
#pragma once

#include "special.cuh"

namespace amalgam::cuda {

constexpr double kLog2E = 1.4426950408889634;
constexpr float kSigmoidScale = -kLog2E, kTanhScale = 2 * kLog2E;

// Of -log2(e) x; approximate: of x / 2.
template <bool approximate>
__device__ float sigmoid_of(float t) {
  if constexpr (approximate) return __fmaf_rn(0.5f, tanh_approx(t), 0.5f);
  return reciprocal(__fadd_rn(1.0f, exp2_approx(t)));
}

// Of 2 log2(e) x; approximate: of x.
template <bool approximate>
__device__ float tanh_of(float t) {
  if constexpr (approximate) return tanh_approx(t);
  constexpr double k = 0.5 / kLog2E;  // x = k t
  constexpr double k2 = k * k;
  const float far = __fmaf_rn(-2.0f, reciprocal(__fadd_rn(1.0f, exp2_approx(t))), 1.0f);
  // Near zero that difference cancels; this is the minimax polynomial in x up to 0.6.
  const float s = __fmul_rn(t, t);
  float p = __fmaf_rn(s, float(k * k2 * k2 * k2 * k2 * k2 * -0.005895107518881559),
                      float(k * k2 * k2 * k2 * k2 * 0.020795932039618492));
  p = __fmaf_rn(p, s, float(k * k2 * k2 * k2 * -0.05378381907939911));
  p = __fmaf_rn(p, s, float(k * k2 * k2 * 0.13331924378871918));
  p = __fmaf_rn(p, s, float(k * k2 * -0.33333298563957214));
  p = __fmaf_rn(p, s, float(k));
  return fabsf(t) < float(0.6 / k) ? __fmul_rn(t, p) : far;
}

// tanh of x itself.
template <bool approximate>
__device__ float tanh(float x) {
  return tanh_of<approximate>(approximate ? x : __fmul_rn(x, kTanhScale));
}

}  // namespace amalgam::cuda
