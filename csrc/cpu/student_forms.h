// The two forms of a student's step on vectors; amalgam/operations/student_forms.py has the formulas.
#pragma once

#ifndef AMALGAM_ISA
#error "student_forms.h is for *_simd.cpp, which setup.py compiles once per instruction set with AMALGAM_ISA"
#endif

#include "activations.h"
#include "student_step.h"

namespace amalgam::cpu::AMALGAM_ISA {

template <typename T>
inline Vector<T> root_of(const Vector<T>& x) {
  Vector<T> y;
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4) {
    y = (Vector<T>)_mm512_sqrt_ps((__m512)x);
  } else {
    y = (Vector<T>)_mm512_sqrt_pd((__m512d)x);
  }
#else
  for (int lane = 0; lane < kLanes<T>; ++lane) y[lane] = __builtin_sqrt(x[lane]);
#endif
  return y;
}

// Of some coordinates: the gradient and the new moments.
template <typename T>
struct Moments {
  Vector<T> g, m, v;
};

// Gradients in these, by what the LSTM and the head see of them; that in v is to be subtracted.
template <typename T>
struct MomentGradients {
  Vector<T> g, m, minus_v;
};

// A form has: its sizes; the LSTM's inputs x; the update, of the head's outputs o; the slopes of the
// update in these outputs, and what `back` wants of them, whose rows the tile's `update` has; and the
// gradients in the gradient and the moments. The tile's rows begin at `at`.
struct RNNProp {
  static constexpr FormSizes sizes = kRNNProp;

  template <typename T>
  static Vector<T> scale(const StudentNetwork<T>& net, const Vector<T>& v) {
    return T(1) / root_of<T>(v / net.one_minus_beta2 + net.eps);
  }

  template <typename T>
  static void inputs(const StudentNetwork<T>& net, const StudentTile<T>&, const Moments<T>& of,
                     Vector<T>* x) {
    const Vector<T> by = scale(net, of.v);
    x[0] = of.m / net.one_minus_beta1 * by;
    x[1] = of.g * by;
  }

  template <typename T>
  static Vector<T> update(const StudentNetwork<T>& net, const StudentTile<T>&, int,
                          const Vector<T>* o) {
    return net.alpha * tanh(o[0]);
  }

  template <typename T>
  static void slopes(const StudentNetwork<T>& net, const StudentTile<T>&, int, const Vector<T>* o,
                     Vector<T>* slopes) {
    slopes[0] = net.alpha * tanh_slope(o[0]);
  }

  template <typename T>
  static MomentGradients<T> back(const StudentNetwork<T>& net, const StudentTile<T>& tile, int at,
                                 const Moments<T>& of) {
    const Vector<T> m_hat = of.m / net.one_minus_beta1;
    const Vector<T> by = scale(net, of.v);
    const Vector<T> d_m_feature = load(tile.lstm.d_in[0] + at);
    const Vector<T> d_g_feature = load(tile.lstm.d_in[0] + kTile + at);
    const Vector<T> d_scale = d_m_feature * m_hat + d_g_feature * of.g;
    return {d_g_feature * by, d_m_feature * by / net.one_minus_beta1,
            T(0.5) * d_scale * (by * by * by) / net.one_minus_beta2};
  }
};

struct Nominal {
  static constexpr FormSizes sizes = kNominal;
  static constexpr double kLeastLog = -7, kMostLog = 4, kSoft = 3;

  template <typename T>
  static Vector<T> absolute(const Vector<T>& x) {
    return x < T(0) ? -x : x;
  }

  // Adam's step; r is 0 where v is, and nothing of it has a slope there.
  template <typename T>
  struct Step {
    Vector<T> root, r, a, b;
  };

  template <typename T>
  static Step<T> step(const StudentNetwork<T>& net, const StudentTile<T>& tile,
                      const Moments<T>& of) {
    const T c1 = tile.corrections[0], c2 = tile.corrections[1];
    const auto some = of.v > T(0);
    const Vector<T> root = root_of<T>(some ? of.v * c2 : splat(T(1)));
    const Vector<T> r = some ? T(1) / (root + net.eps) : splat(T(0));
    return {root, r, of.m * c1 * r, of.g * r};
  }

  template <typename T>
  static Step<T> step_at(const StudentNetwork<T>& net, const StudentTile<T>& tile, int at) {
    return step<T>(net, tile, {load(tile.grad + at), load(tile.m + at), load(tile.v + at)});
  }

  // alpha pace exp(o), o clamped; NaN passes.
  template <typename T>
  static Vector<T> factor(const StudentNetwork<T>& net, const StudentTile<T>& tile, Vector<T> o) {
    o = o < T(kLeastLog) ? splat(T(kLeastLog)) : o;
    o = o > T(kMostLog) ? splat(T(kMostLog)) : o;
    return net.alpha * tile.corrections[2] * exp(o);
  }

  template <typename T>
  static void inputs(const StudentNetwork<T>& net, const StudentTile<T>& tile,
                     const Moments<T>& of, Vector<T>* x) {
    const Step<T> s = step(net, tile, of);
    x[0] = absolute<T>(s.a);
    x[1] = tanh(s.a * s.b);
    x[2] = tanh(absolute<T>(s.b));
  }

  template <typename T>
  static Vector<T> update(const StudentNetwork<T>& net, const StudentTile<T>& tile, int at,
                          const Vector<T>* o) {
    const Step<T> s = step_at(net, tile, at);
    const Vector<T> soft = s.b / (T(1) + absolute<T>(s.b) / T(kSoft));
    return factor<T>(net, tile, o[0]) * (s.a + o[1] * soft);
  }

  // In o1 and o2, and in a and b where the head's outputs multiply them.
  template <typename T>
  static void slopes(const StudentNetwork<T>& net, const StudentTile<T>& tile, int at,
                     const Vector<T>* o, Vector<T>* slopes) {
    const Step<T> s = step_at(net, tile, at);
    const Vector<T> below = T(1) + absolute<T>(s.b) / T(kSoft), soft = s.b / below;
    const Vector<T> by = factor<T>(net, tile, o[0]), none = splat(T(0));
    const Vector<T> inside = o[0] >= T(kLeastLog) ? by * (s.a + o[1] * soft) : none;
    slopes[0] = o[0] <= T(kMostLog) ? inside : none;
    slopes[1] = by * soft;
    slopes[2] = by;
    slopes[3] = by * o[1] / (below * below);
  }

  template <typename T>
  static MomentGradients<T> back(const StudentNetwork<T>& net, const StudentTile<T>& tile, int at,
                                 const Moments<T>& of) {
    const T c1 = tile.corrections[0], c2 = tile.corrections[1];
    const Step<T> s = step(net, tile, of);
    const T *d_x = tile.lstm.d_in[0] + at, *kept = tile.update + at;
    const Vector<T> d_update = load(tile.d_update + at);
    const Vector<T> d_product = load(d_x + kTile) * tanh_slope(s.a * s.b);
    const Vector<T> d_size = load(d_x + 2 * kTile) * tanh_slope(s.b);
    const Vector<T> d_a = d_update * load(kept + 2 * kTile) + with_sign<T>(load(d_x), s.a) +
                          d_product * s.b;
    const Vector<T> d_b = d_update * load(kept + 3 * kTile) + with_sign<T>(d_size, s.b) +
                          d_product * s.a;
    const Vector<T> d_r = d_a * of.m * c1 + d_b * of.g;
    return {d_b * s.r, d_a * c1 * s.r, d_r * s.r * s.r * (T(0.5) * c2 / s.root)};
  }

 private:
  // x times the sign of another number, 0 where that is.
  template <typename T>
  static Vector<T> with_sign(const Vector<T>& x, const Vector<T>& sign) {
    return sign > T(0) ? x : sign < T(0) ? -x : splat(T(0));
  }
};

}  // namespace amalgam::cpu::AMALGAM_ISA
