// The kinds of analytical teachers; amalgam/operations/teacher_kinds.py has the formulas.
//
// A new kind is a struct here with its place in `with_kind`. It has
//   has_m, has_v  which moments it steps;
//   update        from g and from moments that have seen g;
//   gradients     of the update's d-th part, in g and in the moments that have seen it.
// Roots and quotients are correctly rounded. Where two products are added, fma says which of them
// is not rounded: else the compiler would choose, and a coordinate's bits depend on its place.
#pragma once

#include <cstdint>

namespace amalgam::cuda {

constexpr int kTeacherKinds = 8;

__device__ inline float root(float x) { return __fsqrt_rn(x); }
__device__ inline double root(double x) { return __dsqrt_rn(x); }
__device__ inline float ratio(float x, float y) { return __fdiv_rn(x, y); }
__device__ inline double ratio(double x, double y) { return __ddiv_rn(x, y); }
__device__ inline float fused(float x, float y, float z) { return __fmaf_rn(x, y, z); }
__device__ inline double fused(double x, double y, double z) { return __fma_rn(x, y, z); }

// A teacher's settings and what kernels make of them.
template <typename T>
struct TeacherConstants {
  int kind;
  T lr, beta1, beta2, eps;
  T rest1, rest2;        // 1 - beta1, 1 - beta2
  T inverse1, inverse2;  // and one over them
};

// exp(x) = power (1 + rest), for x <= 1; power is two's, and 0 where exp underflows. exp(x) - 1
// would cancel near zero.
template <typename T>
struct Exponential {
  T power, rest;
};

// The bits of x log2(e) + 1.5 2^23 (of double 2^52) end in that product, rounded to a whole number.
__device__ inline Exponential<float> exponential(float x) {
  x = x < -88.0f ? -88.0f : x;
  const float shifted = fused(x, 1.4426950216293335f, 12582912.0f);
  const float n = shifted - 12582912.0f;
  const float power = __int_as_float((__float_as_int(shifted) + 127) << 23);
  const float r = fused(n, -1.428606765330187e-06f, fused(n, -0.693145751953125f, x));
  // The minimax polynomial of csrc/cpu/activations.h.
  float p = fused(r, 0.0013882516650483012f, 0.008366547524929047f);
  p = fused(p, r, 0.04166720062494278f);
  p = fused(p, r, 0.1666654348373413f);
  p = fused(p, r, 0.4999999701976776f);
  return {power, fused(p * r, r, r)};
}

__device__ inline Exponential<double> exponential(double x) {
  x = x < -709.0 ? -709.0 : x;
  const double shifted = fused(x, 1.4426950408889634, 6755399441055744.0);
  const double n = shifted - 6755399441055744.0;
  const double power = __longlong_as_double((__double_as_longlong(shifted) + 1023) << 52);
  const double r = fused(n, -1.9082149292705877e-10, fused(n, -0.6931471803691238, x));
  // Taylor's, whose first term left out is below 2^-56 at |r| <= log(2) / 2.
  double p = fused(r, 1.0 / 6227020800.0, 1.0 / 479001600.0);
  p = fused(p, r, 1.0 / 39916800.0);
  p = fused(p, r, 1.0 / 3628800.0);
  p = fused(p, r, 1.0 / 362880.0);
  p = fused(p, r, 1.0 / 40320.0);
  p = fused(p, r, 1.0 / 5040.0);
  p = fused(p, r, 1.0 / 720.0);
  p = fused(p, r, 1.0 / 120.0);
  p = fused(p, r, 1.0 / 24.0);
  p = fused(p, r, 1.0 / 6.0);
  p = fused(p, r, 0.5);
  return {power, fused(p * r, r, r)};
}

// With e = exp(-2|x|).
template <typename T>
struct TanhParts {
  T above;  // e - 1, without cancellation
  T e;
  T below;  // 1 + e
  T error;  // of below, relative: corrected for, it halves those of quotients; few bits of it count
};

template <typename T>
__device__ TanhParts<T> tanh_parts(T x) {
  const auto [power, rest] = exponential(T(-2) * (x < T(0) ? -x : x));
  const T e = fused(power, rest, power), below = T(1) + e;
  return {fused(power, rest, power - T(1)), e, below,
          (e - (below - T(1))) * fused(T(-0.5), below, T(1.5))};
}

// tanh(x) tanh(y), by one division for both.
template <typename T>
__device__ T tanh_product(T x, T y) {
  const TanhParts<T> of_x = tanh_parts(x), of_y = tanh_parts(y);
  T size = ratio(of_x.above * of_y.above, of_x.below * of_y.below);
  size = fused(-size, of_x.error + of_y.error, size);
  return (x < T(0)) != (y < T(0)) ? -size : size;
}

template <typename T>
struct TanhAndSlope {
  T value;
  T slope;  // 1 - value^2, as 4 e / (1 + e)^2: that difference would cancel
};

template <typename T>
__device__ TanhAndSlope<T> tanh_and_slope(T x) {
  const TanhParts<T> of = tanh_parts(x);
  T size = ratio(of.above, of.below);
  size = fused(-size, of.error, size);
  T slope = ratio(T(4) * of.e, of.below * of.below);
  slope = fused(-slope, T(2) * of.error, slope);
  return {x < T(0) ? size : -size, slope};
}

template <typename T>
struct Moments {
  T m, v;
};

template <typename T>
struct Gradients {
  T g, m, v;
};

struct Sgd {
  static constexpr bool has_m = false, has_v = false;

  template <typename T>
  __device__ static T update(const TeacherConstants<T>& c, T g, Moments<T>) {
    return c.lr * g;
  }

  template <typename T>
  __device__ static Gradients<T> gradients(const TeacherConstants<T>& c, T d, T, Moments<T>) {
    return {c.lr * d, T(0), T(0)};
  }
};

struct Momentum {
  static constexpr bool has_m = true, has_v = false;

  template <typename T>
  __device__ static T update(const TeacherConstants<T>& c, T, Moments<T> now) {
    return c.lr * now.m;
  }

  template <typename T>
  __device__ static Gradients<T> gradients(const TeacherConstants<T>& c, T d, T, Moments<T>) {
    return {T(0), c.lr * d, T(0)};
  }
};

struct RmsProp {
  static constexpr bool has_m = false, has_v = true;

  template <typename T>
  __device__ static T update(const TeacherConstants<T>& c, T g, Moments<T> now) {
    return ratio(c.lr * g, root(now.v + c.eps));
  }

  template <typename T>
  __device__ static Gradients<T> gradients(const TeacherConstants<T>& c, T d, T g,
                                           Moments<T> now) {
    const T scale = ratio(T(1), root(now.v + c.eps));
    const T scaled = c.lr * d * scale;
    return {scaled, T(0), T(-0.5) * (scaled * g) * (scale * scale)};
  }
};

struct Adam {
  static constexpr bool has_m = true, has_v = true;

  template <typename T>
  __device__ static T update(const TeacherConstants<T>& c, T, Moments<T> now) {
    return ratio(c.lr * (now.m * c.inverse1), root(fused(now.v, c.inverse2, c.eps)));
  }

  template <typename T>
  __device__ static Gradients<T> gradients(const TeacherConstants<T>& c, T d, T,
                                           Moments<T> now) {
    const T scale = ratio(T(1), root(fused(now.v, c.inverse2, c.eps)));
    const T in_m = c.lr * d * scale * c.inverse1;
    return {T(0), in_m, T(-0.5) * (in_m * now.m) * (scale * scale) * c.inverse2};
  }
};

// PowerSign where the agreement of g and m enters by exp, else AddSign; the adaptive ones divide g
// by the root of v.
template <bool power, bool adaptive>
struct Sign {
  static constexpr bool has_m = true, has_v = true;

  template <typename T>
  __device__ static T bracket(T agreement) {
    if constexpr (!power) return T(1) + agreement;
    const auto [two, rest] = exponential(agreement);
    return fused(two, rest, two);
  }

  template <typename T>
  __device__ static T update(const TeacherConstants<T>& c, T g, Moments<T> now) {
    const T scale = ratio(T(1), root(now.v + c.eps));
    const T scaled = g * scale;
    const T agreement = tanh_product(scaled, now.m * scale);
    return c.lr * (bracket(agreement) * (adaptive ? scaled : g));
  }

  template <typename T>
  __device__ static Gradients<T> gradients(const TeacherConstants<T>& c, T d, T g,
                                           Moments<T> now) {
    d = c.lr * d;
    const T scale = ratio(T(1), root(now.v + c.eps));
    const TanhAndSlope<T> of_g = tanh_and_slope(g * scale);
    const TanhAndSlope<T> of_m = tanh_and_slope(now.m * scale);
    const T factor = bracket(of_g.value * of_m.value);
    T d_scale = T(0);
    if constexpr (adaptive) {
      d_scale = d * factor * g;
      d = d * scale;
    }
    T d_agreement = d * g;
    if constexpr (power) d_agreement = d_agreement * factor;
    const T d_scaled_g = d_agreement * of_m.value * of_g.slope;
    const T d_scaled_m = d_agreement * of_g.value * of_m.slope;
    d_scale = d_scale + fused(d_scaled_g, g, d_scaled_m * now.m);
    return {fused(d, factor, d_scaled_g * scale), d_scaled_m * scale,
            T(-0.5) * (d_scale * scale) * (scale * scale)};
  }
};

// Calls `body` with an object of the kind's struct; in the order of KINDS in
// amalgam/operations/teacher_kinds.py.
template <typename Body>
__device__ void with_kind(int kind, const Body& body) {
  switch (kind) {
    case 0: return body(Sgd());
    case 1: return body(Momentum());
    case 2: return body(RmsProp());
    case 3: return body(Adam());
    case 4: return body(Sign<true, false>());
    case 5: return body(Sign<false, false>());
    case 6: return body(Sign<true, true>());
    default: return body(Sign<false, true>());
  }
}

// The moments that have seen g; those that the kind lacks are the old ones.
template <typename Kind, typename T>
__device__ Moments<T> moments(const TeacherConstants<T>& c, T g, Moments<T> old) {
  if constexpr (Kind::has_m) old.m = fused(c.beta1, old.m, c.rest1 * g);
  if constexpr (Kind::has_v) old.v = fused(c.beta2, old.v, c.rest2 * (g * g));
  return old;
}

// From the gradients in a step's update and in the moments that it leaves, those in g and in the old
// moments; `now` are the moments that have seen g.
template <typename Kind, typename T>
__device__ Gradients<T> step_gradients(const TeacherConstants<T>& c, T d_update, Moments<T> d_now,
                                       T g, Moments<T> now) {
  Gradients<T> d = Kind::gradients(c, d_update, g, now);
  d.m += d_now.m;
  d.v += d_now.v;
  if constexpr (Kind::has_m) {
    d.g = fused(c.rest1, d.m, d.g);
    d.m = c.beta1 * d.m;
  }
  if constexpr (Kind::has_v) {
    d.g = fused(T(2) * c.rest2 * g, d.v, d.g);
    d.v = c.beta2 * d.v;
  }
  return d;
}

}  // namespace amalgam::cuda
