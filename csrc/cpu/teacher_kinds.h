// The kinds of analytical teachers; amalgam/operations/teacher_kinds.py has the formulas.
//
// A new kind is a struct here with its place in `Kinds`. It has
//   has_m, has_v  which moments it steps;
//   update        from g and from moments that have seen g;
//   gradients     of the update's d-th part, in g and in the moments that have seen it.
#pragma once

#ifndef AMALGAM_ISA
#error "teacher_kinds.h is for *_simd.cpp, which setup.py compiles once per instruction set with AMALGAM_ISA"
#endif

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "activations.h"
#include "simd.h"
#include "teacher_step.h"

namespace amalgam::cpu::AMALGAM_ISA {

#if defined(__AVX512F__)
inline Vector<float> root(Vector<float> x) { return (Vector<float>)_mm512_maskz_sqrt_ps(-1, (__m512)x); }
inline Vector<double> root(Vector<double> x) { return (Vector<double>)_mm512_maskz_sqrt_pd(-1, (__m512d)x); }
#elif defined(__AVX2__)
inline Vector<float> root(Vector<float> x) { return (Vector<float>)_mm256_sqrt_ps((__m256)x); }
inline Vector<double> root(Vector<double> x) { return (Vector<double>)_mm256_sqrt_pd((__m256d)x); }
#elif defined(__SSE2__)
inline Vector<float> root(Vector<float> x) { return (Vector<float>)_mm_sqrt_ps((__m128)x); }
inline Vector<double> root(Vector<double> x) { return (Vector<double>)_mm_sqrt_pd((__m128d)x); }
#else
inline Vector<float> root(Vector<float> x) {
  for (int lane = 0; lane < kLanes<float>; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
}
inline Vector<double> root(Vector<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = __builtin_sqrt(x[lane]);
  return x;
}
#endif

template <typename T>
struct Tanh {
  Vector<T> value;
  Vector<T> slope;
};

// tanh(x) and 1 - tanh(x)^2; in float not by that difference, which cancels, but from t = exp(-2|x|)
// as 4 t / (1 + t)^2.
inline Tanh<float> tanh_and_slope(Vector<float> x) {
  const Exponential e = exponential<2>(minus_absolute(x));
  const Vector<float> t = scale_by_power(splat(1.0f), e.n);
  const Vector<float> m = t * e.rest + (t - 1.0f);
  const Vector<float> inverse = 1.0f / (2.0f + m);
  const Vector<float> twice = 2.0f * inverse;
  return {with_sign_of(m * inverse, x), (t * e.rest + t) * (twice * twice)};
}

inline Tanh<double> tanh_and_slope(Vector<double> x) {
  const Vector<double> value = tanh(x);
  return {value, 1.0 - value * value};
}

template <typename T>
struct Moments {
  Vector<T> m;
  Vector<T> v;
};

template <typename T>
struct Gradients {
  Vector<T> g;
  Vector<T> m;
  Vector<T> v;
};

struct Sgd {
  static constexpr bool has_m = false, has_v = false;

  template <typename T>
  static inline Vector<T> update(const TeacherConstants<T>& c, Vector<T> g, Moments<T>) {
    return c.lr * g;
  }

  template <typename T>
  static inline Gradients<T> gradients(const TeacherConstants<T>& c, Vector<T> d, Vector<T>,
                                       Moments<T>) {
    return {c.lr * d, Vector<T>{}, Vector<T>{}};
  }
};

struct Momentum {
  static constexpr bool has_m = true, has_v = false;

  template <typename T>
  static inline Vector<T> update(const TeacherConstants<T>& c, Vector<T>, Moments<T> now) {
    return c.lr * now.m;
  }

  template <typename T>
  static inline Gradients<T> gradients(const TeacherConstants<T>& c, Vector<T> d, Vector<T>,
                                       Moments<T>) {
    return {Vector<T>{}, c.lr * d, Vector<T>{}};
  }
};

struct RmsProp {
  static constexpr bool has_m = false, has_v = true;

  template <typename T>
  static inline Vector<T> update(const TeacherConstants<T>& c, Vector<T> g, Moments<T> now) {
    return c.lr * g / root(now.v + c.eps);
  }

  template <typename T>
  static inline Gradients<T> gradients(const TeacherConstants<T>& c, Vector<T> d, Vector<T> g,
                                       Moments<T> now) {
    const Vector<T> scale = T(1) / root(now.v + c.eps);
    const Vector<T> scaled = c.lr * d * scale;
    return {scaled, Vector<T>{}, T(-0.5) * (scaled * g) * (scale * scale)};
  }
};

struct Adam {
  static constexpr bool has_m = true, has_v = true;

  template <typename T>
  static inline Vector<T> update(const TeacherConstants<T>& c, Vector<T>, Moments<T> now) {
    return c.lr * (now.m / c.rest1) / root(now.v / c.rest2 + c.eps);
  }

  template <typename T>
  static inline Gradients<T> gradients(const TeacherConstants<T>& c, Vector<T> d, Vector<T>,
                                       Moments<T> now) {
    const Vector<T> scale = T(1) / root(now.v / c.rest2 + c.eps);
    const Vector<T> scaled = c.lr * d * scale / c.rest1;
    return {Vector<T>{}, scaled, T(-0.5) * (scaled * now.m) * (scale * scale) / c.rest2};
  }
};

// PowerSign where the agreement of g and m enters by exp, else AddSign; the adaptive ones divide g
// by the root of v.
template <bool power, bool adaptive>
struct Sign {
  static constexpr bool has_m = true, has_v = true;

  template <typename T>
  static inline Vector<T> update(const TeacherConstants<T>& c, Vector<T> g, Moments<T> now) {
    const Vector<T> scale = T(1) / root(now.v + c.eps);
    const Vector<T> agreement = tanh(g * scale) * tanh(now.m * scale);
    const Vector<T> bracket = power ? exp(agreement) : T(1) + agreement;
    const Vector<T> along = adaptive ? g * scale : g;
    return c.lr * (bracket * along);
  }

  template <typename T>
  static inline Gradients<T> gradients(const TeacherConstants<T>& c, Vector<T> d, Vector<T> g,
                                       Moments<T> now) {
    d = c.lr * d;
    const Vector<T> scale = T(1) / root(now.v + c.eps);
    const Tanh<T> of_g = tanh_and_slope(g * scale);
    const Tanh<T> of_m = tanh_and_slope(now.m * scale);
    const Vector<T> agreement = of_g.value * of_m.value;
    const Vector<T> bracket = power ? exp(agreement) : T(1) + agreement;
    Vector<T> d_scale = {};
    if constexpr (adaptive) {
      d_scale = d * bracket * g;
      d = d * scale;
    }
    Vector<T> d_agreement = d * g;
    if constexpr (power) d_agreement = d_agreement * bracket;
    const Vector<T> d_scaled_g = d_agreement * of_m.value * of_g.slope;
    const Vector<T> d_scaled_m = d_agreement * of_g.value * of_m.slope;
    d_scale += d_scaled_g * g + d_scaled_m * now.m;
    return {d * bracket + d_scaled_g * scale, d_scaled_m * scale,
            T(-0.5) * (d_scale * scale) * (scale * scale)};
  }
};

template <typename... Kind>
struct KindList {
  static constexpr int count = sizeof...(Kind);

  // For each kind the function `Of<Kind>::call`.
  template <template <typename> class Of>
  static constexpr decltype(&Of<Sgd>::call) functions[] = {Of<Kind>::call...};
};

// In the order of KINDS in amalgam/operations/teacher_kinds.py.
using Kinds = KindList<Sgd, Momentum, RmsProp, Adam, Sign<true, false>, Sign<false, false>,
                       Sign<true, true>, Sign<false, true>>;

}  // namespace amalgam::cpu::AMALGAM_ISA
