// tanh, sigmoid and exp on vectors; only for *_simd.cpp.
//
// float: within 4 ulp of the exact value for every argument (tests sweep all of them), saturating,
// NaN to NaN. double: the C library's, lane by lane; it serves gradient checks, not speed.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "simd.h"

namespace amalgam::cpu::AMALGAM_ISA {


inline Vector<float> absolute(Vector<float> x) { return x < 0 ? -x : x; }

// x 2^n for whole n from -252 to 1, by two factors: below 2^-126 one is no normal number.
inline Vector<float> scale_by_power(Vector<float> x, Vector<float> n) {
#ifdef __AVX512F__
  return (Vector<float>)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  typedef int Ints __attribute__((vector_size(kVectorBytes)));
  const Ints whole = __builtin_convertvector(n, Ints);
  const Ints half = whole >> 1;
  return x * (Vector<float>)((half + 127) << 23) * (Vector<float>)((whole - half + 127) << 23);
#endif
}

// exp(x) for x <= 1 as 2^n (1 + rest), the rest's polynomial the minimax one for |r| <= log(2) / 2.
struct Exponential {
  Vector<float> n;
  Vector<float> rest;
};

inline Exponential exponential(Vector<float> x) {
  x = x < -104.0f ? splat(-104.0f) : x;
  constexpr float kRound = 0x1.8p23f;
  const Vector<float> n = (x * 0x1.715476p0f + kRound) - kRound;
  const Vector<float> r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  Vector<float> p = splat(0x1.6bebfep-10f);
  p = p * r + 0x1.1227bp-7f;
  p = p * r + 0x1.555674p-5f;
  p = p * r + 0x1.5554bp-3f;
  p = p * r + 0x1.fffffep-2f;
  return {n, (p * r) * r + r};
}

// exp(x) for x <= 1 within 2 ulp.
inline Vector<float> exp(Vector<float> x) {
  const Exponential e = exponential(x);
  return scale_by_power(1.0f + e.rest, e.n);
}

inline Vector<float> sigmoid(Vector<float> x) {
  const Exponential e = exponential(-absolute(x));
  const Vector<float> t = scale_by_power(1.0f + e.rest, e.n);
  return (x < 0 ? t : splat(1.0f)) / (1.0f + t);
}

// -expm1(-2|x|) / (2 + expm1(-2|x|)) with x's sign: nothing cancels near zero.
inline Vector<float> tanh(Vector<float> x) {
  const Exponential e = exponential(-2.0f * absolute(x));
  const Vector<float> one = splat(1.0f);
  const Vector<float> t = scale_by_power(one, e.n);
  const Vector<float> m = t * e.rest + (t - 1.0f);
  return (x < 0 ? m : -m) / (2.0f + m);
}

// tanh's derivative, from e = exp(-2|x|) as 4 e / (1 + e)^2: 1 - tanh(x)^2 would cancel.
inline Vector<float> tanh_slope(Vector<float> x) {
  const Exponential e = exponential(-2.0f * absolute(x));
  const Vector<float> t = scale_by_power(1.0f + e.rest, e.n);
  return 4.0f * t / ((1.0f + t) * (1.0f + t));
}

inline Vector<double> exp(Vector<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = __builtin_exp(x[lane]);
  return x;
}

inline Vector<double> sigmoid(Vector<double> x) {
  Vector<double> y;
  for (int lane = 0; lane < kLanes<double>; ++lane) y[lane] = 1.0 / (1.0 + __builtin_exp(-x[lane]));
  return y;
}

inline Vector<double> tanh(Vector<double> x) {
  Vector<double> y;
  for (int lane = 0; lane < kLanes<double>; ++lane) y[lane] = __builtin_tanh(x[lane]);
  return y;
}

inline Vector<double> tanh_slope(Vector<double> x) {
  Vector<double> y;
  for (int lane = 0; lane < kLanes<double>; ++lane) {
    const double t = __builtin_exp(-2.0 * __builtin_fabs(x[lane]));
    y[lane] = 4.0 * t / ((1.0 + t) * (1.0 + t));
  }
  return y;
}

}  // namespace amalgam::cpu::AMALGAM_ISA
