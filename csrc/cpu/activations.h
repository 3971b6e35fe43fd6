// tanh, sigmoid and exp on vectors.
//
// float: within 4 ulp of the exact value for every argument (tests sweep all of them), saturating,
// NaN to NaN. double: the C library's, lane by lane; it serves gradient checks, not speed.
#pragma once

#ifndef AMALGAM_ISA
#error "activations.h is for *_simd.cpp, which setup.py compiles once per instruction set with AMALGAM_ISA"
#endif

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "simd.h"

namespace amalgam::cpu::AMALGAM_ISA {

typedef int Ints __attribute__((vector_size(kVectorBytes)));
inline constexpr int kSign = int(0x80000000u);

inline Vector<float> minus_absolute(Vector<float> x) { return (Vector<float>)((Ints)x | kSign); }

inline Vector<float> with_sign_of(Vector<float> size, Vector<float> x) {
  return (Vector<float>)(((Ints)size & ~kSign) | ((Ints)x & kSign));
}

// The larger one; x where one is NaN.
inline Vector<float> at_least(Vector<float> floor, Vector<float> x) {
#ifdef __AVX512F__
  return (Vector<float>)_mm512_max_ps((__m512)floor, (__m512)x);
#elif defined(__AVX2__)
  return (Vector<float>)_mm256_max_ps((__m256)floor, (__m256)x);
#else
  return floor > x ? floor : x;
#endif
}

// x 2^n for whole n from -252 to 1, by two factors: below 2^-126 one is no normal number.
inline Vector<float> scale_by_power(Vector<float> x, Vector<float> n) {
#ifdef __AVX512F__
  return (Vector<float>)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  const Ints whole = __builtin_convertvector(n, Ints);
  const Ints half = whole >> 1;
  return x * (Vector<float>)((half + 127) << 23) * (Vector<float>)((whole - half + 127) << 23);
#endif
}

// exp(factor x) for factor x <= 1 as 2^n (1 + rest), the rest's polynomial the minimax one for
// |factor r| <= log(2) / 2. A power of two as factor costs no rounding.
struct Exponential {
  Vector<float> n;
  Vector<float> rest;
};

template <int factor>
inline Exponential exponential(Vector<float> x) {
  constexpr float f1 = factor, f2 = f1 * f1, f4 = f2 * f2;
  x = at_least(splat(-104.0f / f1), x);
  constexpr float kRound = 0x1.8p23f;
  const Vector<float> n = (x * (f1 * 0x1.715476p0f) + kRound) - kRound;
  const Vector<float> r = (x - n * (0x1.62e4p-1f / f1)) - n * (0x1.7f7d1cp-20f / f1);
  Vector<float> p = splat(f2 * f4 * 0x1.6bebfep-10f);
  p = p * r + f1 * f4 * 0x1.1227bp-7f;
  p = p * r + f4 * 0x1.555674p-5f;
  p = p * r + f1 * f2 * 0x1.5554bp-3f;
  p = p * r + f2 * 0x1.fffffep-2f;
  return {n, (p * r) * r + f1 * r};
}

// exp(factor x) for factor x <= 1 within 2 ulp.
template <int factor = 1>
inline Vector<float> exp(Vector<float> x) {
  const Exponential e = exponential<factor>(x);
  return scale_by_power(1.0f + e.rest, e.n);
}

// A value before its division, so that products of several need only one. `below` is from 1 to 2.
template <typename T>
struct Ratio {
  Vector<T> above, below;
};

template <typename T>
inline Vector<T> value(const Ratio<T>& ratio) {
  return ratio.above / ratio.below;
}

inline Ratio<float> sigmoid_ratio(Vector<float> x) {
  const Vector<float> t = exp(minus_absolute(x));
  return {x < 0 ? t : splat(1.0f), 1.0f + t};
}

// -expm1(-2|x|) / (2 + expm1(-2|x|)) with x's sign: nothing cancels near zero.
inline Ratio<float> tanh_ratio(Vector<float> x) {
  const Exponential e = exponential<2>(minus_absolute(x));
  const Vector<float> t = scale_by_power(splat(1.0f), e.n);
  const Vector<float> m = t * e.rest + (t - 1.0f);
  return {with_sign_of(m, x), 2.0f + m};
}

inline Vector<float> sigmoid(Vector<float> x) { return value(sigmoid_ratio(x)); }
inline Vector<float> tanh(Vector<float> x) { return value(tanh_ratio(x)); }

// tanh's derivative, from e = exp(-2|x|) as 4 e / (1 + e)^2: 1 - tanh(x)^2 would cancel.
inline Vector<float> tanh_slope(Vector<float> x) {
  const Vector<float> t = exp<2>(minus_absolute(x));
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

inline Ratio<double> sigmoid_ratio(Vector<double> x) { return {sigmoid(x), splat(1.0)}; }
inline Ratio<double> tanh_ratio(Vector<double> x) { return {tanh(x), splat(1.0)}; }

}  // namespace amalgam::cpu::AMALGAM_ISA
