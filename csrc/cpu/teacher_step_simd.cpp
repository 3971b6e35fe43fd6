#include "teacher_step.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "activations.h"
#include "simd.h"

namespace amalgam::cpu::AMALGAM_ISA {
namespace {

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

constexpr bool has_m(Teacher kind) { return kind != Teacher::sgd && kind != Teacher::rmsprop; }
constexpr bool has_v(Teacher kind) { return kind != Teacher::sgd && kind != Teacher::momentum; }
constexpr bool is_power(Teacher kind) {
  return kind == Teacher::powersign || kind == Teacher::adaptive_powersign;
}
constexpr bool is_adaptive(Teacher kind) {
  return kind == Teacher::adaptive_powersign || kind == Teacher::adaptive_addsign;
}

template <typename T>
struct Moments {
  Vector<T> m;
  Vector<T> v;
};

template <Teacher kind, typename T>
inline Moments<T> moments(const TeacherConstants<T>& c, Vector<T> g, Moments<T> old) {
  if constexpr (has_m(kind)) old.m = c.beta1 * old.m + c.rest1 * g;
  if constexpr (has_v(kind)) old.v = c.beta2 * old.v + c.rest2 * (g * g);
  return old;
}

// The update, from moments that have seen g.
template <Teacher kind, typename T>
inline Vector<T> update(const TeacherConstants<T>& c, Vector<T> g, Moments<T> now) {
  if constexpr (kind == Teacher::sgd) {
    return c.lr * g;
  } else if constexpr (kind == Teacher::momentum) {
    return c.lr * now.m;
  } else if constexpr (kind == Teacher::rmsprop) {
    return c.lr * g / root(now.v + c.eps);
  } else if constexpr (kind == Teacher::adam) {
    return c.lr * (now.m / c.rest1) / root(now.v / c.rest2 + c.eps);
  } else {
    const Vector<T> scale = T(1) / root(now.v + c.eps);
    const Vector<T> agreement = tanh(g * scale) * tanh(now.m * scale);
    const Vector<T> bracket = is_power(kind) ? exp(agreement) : T(1) + agreement;
    const Vector<T> along = is_adaptive(kind) ? g * scale : g;
    return c.lr * (bracket * along);
  }
}

template <typename T>
struct Gradients {
  Vector<T> g;
  Vector<T> m;
  Vector<T> v;
};

// Gradients of the update's d-th part in g and in the moments that have seen it.
template <Teacher kind, typename T>
inline Gradients<T> update_gradients(const TeacherConstants<T>& c, Vector<T> d, Vector<T> g,
                                     Moments<T> now) {
  const Vector<T> zero = {};
  d = c.lr * d;
  if constexpr (kind == Teacher::sgd) {
    return {d, zero, zero};
  } else if constexpr (kind == Teacher::momentum) {
    return {zero, d, zero};
  } else if constexpr (kind == Teacher::adam) {
    const Vector<T> scale = T(1) / root(now.v / c.rest2 + c.eps);
    const Vector<T> scaled = d * scale / c.rest1;
    return {zero, scaled, T(-0.5) * (scaled * now.m) * (scale * scale) / c.rest2};
  } else if constexpr (kind == Teacher::rmsprop) {
    const Vector<T> scale = T(1) / root(now.v + c.eps);
    const Vector<T> scaled = d * scale;
    return {scaled, zero, T(-0.5) * (scaled * g) * (scale * scale)};
  } else {
    const Vector<T> scale = T(1) / root(now.v + c.eps);
    const Tanh<T> of_g = tanh_and_slope(g * scale);
    const Tanh<T> of_m = tanh_and_slope(now.m * scale);
    const Vector<T> agreement = of_g.value * of_m.value;
    const Vector<T> bracket = is_power(kind) ? exp(agreement) : T(1) + agreement;
    Vector<T> d_scale = zero;
    if constexpr (is_adaptive(kind)) {
      d_scale = d * bracket * g;
      d = d * scale;
    }
    Vector<T> d_agreement = d * g;
    if constexpr (is_power(kind)) d_agreement = d_agreement * bracket;
    const Vector<T> d_scaled_g = d_agreement * of_m.value * of_g.slope;
    const Vector<T> d_scaled_m = d_agreement * of_g.value * of_m.slope;
    d_scale += d_scaled_g * g + d_scaled_m * now.m;
    return {d * bracket + d_scaled_g * scale, d_scaled_m * scale,
            T(-0.5) * (d_scale * scale) * (scale * scale)};
  }
}

template <typename T, int inputs, int outputs>
struct Pointers {
  const T* from[inputs];
  T* to[outputs];
};

// Runs body on whole vectors; the last ones are padded with zeros, so that every coordinate is
// computed by the same instructions wherever it stands.
template <typename T, int inputs, int outputs, typename Body>
inline void for_each_vector(const Pointers<T, inputs, outputs>& p, int64_t count,
                            const Body& body) {
  Vector<T> from[inputs];
  Vector<T> to[outputs];
  int64_t at = 0;
  for (; at + kLanes<T> <= count; at += kLanes<T>) {
    for (int i = 0; i < inputs; ++i) from[i] = load(p.from[i] + at);
    body(from, to);
    for (int i = 0; i < outputs; ++i) store<T>(p.to[i] + at, to[i]);
  }
  if (at == count) return;
  const auto bytes = static_cast<unsigned long>(count - at) * sizeof(T);
  for (int i = 0; i < inputs; ++i) {
    from[i] = Vector<T>{};
    __builtin_memcpy(&from[i], p.from[i] + at, bytes);
  }
  body(from, to);
  for (int i = 0; i < outputs; ++i) __builtin_memcpy(p.to[i] + at, &to[i], bytes);
}

template <Teacher kind, typename T>
void step(const TeacherConstants<T>& constants, const Pointers<T, 3, 3>& pointers, int64_t count) {
  const TeacherConstants<T> c = constants;
  for_each_vector(pointers, count, [c](const Vector<T>* from, Vector<T>* to) {
    const Moments<T> now = moments<kind, T>(c, from[0], {from[1], from[2]});
    to[0] = update<kind, T>(c, from[0], now);
    to[1] = now.m;
    to[2] = now.v;
  });
}

template <Teacher kind, typename T>
void gradients(const TeacherConstants<T>& constants, const Pointers<T, 6, 3>& pointers,
               int64_t count) {
  const TeacherConstants<T> c = constants;
  for_each_vector(pointers, count, [c](const Vector<T>* from, Vector<T>* to) {
    const Vector<T> g = from[3];
    const Moments<T> now = moments<kind, T>(c, g, {from[4], from[5]});
    Gradients<T> d = update_gradients<kind, T>(c, from[0], g, now);
    d.m += from[1];
    d.v += from[2];
    if constexpr (has_m(kind)) {
      d.g += c.rest1 * d.m;
      d.m = c.beta1 * d.m;
    }
    if constexpr (has_v(kind)) {
      d.g += T(2) * c.rest2 * g * d.v;
      d.v = c.beta2 * d.v;
    }
    to[0] = d.g;
    to[1] = d.m;
    to[2] = d.v;
  });
}

#define AMALGAM_FOR_THE_KIND(function, kind, ...)                            \
  switch (kind) {                                                            \
    case Teacher::sgd:                                                       \
      return function<Teacher::sgd, T>(__VA_ARGS__);                         \
    case Teacher::momentum:                                                  \
      return function<Teacher::momentum, T>(__VA_ARGS__);                    \
    case Teacher::rmsprop:                                                   \
      return function<Teacher::rmsprop, T>(__VA_ARGS__);                     \
    case Teacher::adam:                                                      \
      return function<Teacher::adam, T>(__VA_ARGS__);                        \
    case Teacher::powersign:                                                 \
      return function<Teacher::powersign, T>(__VA_ARGS__);                   \
    case Teacher::addsign:                                                   \
      return function<Teacher::addsign, T>(__VA_ARGS__);                     \
    case Teacher::adaptive_powersign:                                        \
      return function<Teacher::adaptive_powersign, T>(__VA_ARGS__);          \
    case Teacher::adaptive_addsign:                                          \
      return function<Teacher::adaptive_addsign, T>(__VA_ARGS__);            \
  }

template <typename T>
void any_step(const TeacherConstants<T>& c, const T* grad, const T* m, const T* v, T* update,
              T* new_m, T* new_v, int64_t count) {
  const Pointers<T, 3, 3> pointers{{grad, m, v}, {update, new_m, new_v}};
  AMALGAM_FOR_THE_KIND(step, c.kind, c, pointers, count)
}

template <typename T>
void any_gradients(const TeacherConstants<T>& c, const T* d_update, const T* d_m, const T* d_v,
                   const T* grad, const T* m, const T* v, T* in_grad, T* in_m, T* in_v,
                   int64_t count) {
  const Pointers<T, 6, 3> pointers{{d_update, d_m, d_v, grad, m, v}, {in_grad, in_m, in_v}};
  AMALGAM_FOR_THE_KIND(gradients, c.kind, c, pointers, count)
}

#undef AMALGAM_FOR_THE_KIND

}  // namespace

template <typename T>
TeacherStepKernels<T> teacher_step_kernels() {
  return {any_step<T>, any_gradients<T>};
}

template TeacherStepKernels<float> teacher_step_kernels();
template TeacherStepKernels<double> teacher_step_kernels();

}  // namespace amalgam::cpu::AMALGAM_ISA
