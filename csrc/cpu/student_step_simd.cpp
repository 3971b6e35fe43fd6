#include "student_step.h"

#include "lstm.h"

namespace amalgam::cpu::AMALGAM_ISA {
namespace {

template <typename T>
inline Vector<T> reciprocal_root(const Vector<T>& x) {
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
  return T(1) / y;
}

template <typename T>
void moments_and_features(const StudentNetwork<T>& net, const StudentTile<T>& tile) {
  for (int at = 0; at < kTile; at += kLanes<T>) {
    const Vector<T> g = load(tile.grad + at);
    const Vector<T> m = net.beta1 * load(tile.m + at) + net.one_minus_beta1 * g;
    const Vector<T> v = net.beta2 * load(tile.v + at) + net.one_minus_beta2 * (g * g);
    const Vector<T> scale = reciprocal_root<T>(v / net.one_minus_beta2 + net.eps);
    store(tile.m + at, m);
    store(tile.v + at, v);
    store(tile.lstm.in[0] + at, m / net.one_minus_beta1 * scale);
    store(tile.lstm.in[0] + kTile + at, g * scale);
  }
}

// The whole step; where it keeps what the backward pass needs, `update` gets its slope instead.
template <bool keep, typename T>
void steps(const StudentNetwork<T>& net, const StudentTile<T>& tile) {
  moments_and_features(net, tile);
  const int hidden = net.lstm.shapes[0].hidden;
  lstm_forward<keep>(net.lstm, tile.lstm);
  for (int at = 0; at < kTile; at += kLanes<T>) {
    Vector<T> sum = splat(net.head_bias);
    for (int unit = 0; unit < hidden; ++unit) {
      sum += net.head[unit] * load(tile.lstm.top + unit * kTile + at);
    }
    if constexpr (keep) {
      store(tile.update + at, net.alpha * tanh_slope(sum));
    } else {
      store(tile.update + at, net.alpha * tanh(sum));
    }
  }
}

template <typename T>
void forward(const StudentNetwork<T>& net, const StudentTile<T>& tile) {
  steps<false>(net, tile);
}

template <typename T>
double dot(const T* a, const T* b) {
  Vector<T> sums = {};
  for (int at = 0; at < kTile; at += kLanes<T>) sums += load(a + at) * load(b + at);
  double total = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) total += sums[lane];
  return total;
}

template <typename T>
void head_gradients(const StudentNetwork<T>& net, const StudentTile<T>& tile, double* sums) {
  const int hidden = net.lstm.shapes[0].hidden;
  double bias = 0;
  for (int at = 0; at < kTile; at += kLanes<T>) {
    const Vector<T> d = load(tile.d_update + at) * load(tile.update + at);
    store(tile.d_update + at, d);
    for (int lane = 0; lane < kLanes<T>; ++lane) bias += d[lane];
    for (int unit = 0; unit < hidden; ++unit) {
      store(tile.lstm.d_out + unit * kTile + at, net.head[unit] * d);
    }
  }
  for (int unit = 0; unit < hidden; ++unit) {
    sums[unit] += dot(tile.d_update, tile.lstm.top + unit * kTile);
  }
  sums[hidden] += bias;
}

template <typename T>
void moment_gradients(const StudentNetwork<T>& net, const StudentTile<T>& tile) {
  for (int at = 0; at < kTile; at += kLanes<T>) {
    const Vector<T> g = load(tile.grad + at), v = load(tile.v + at);
    const Vector<T> m_hat = load(tile.m + at) / net.one_minus_beta1;
    const Vector<T> scale = reciprocal_root<T>(v / net.one_minus_beta2 + net.eps);
    const Vector<T> d_m_feature = load(tile.lstm.d_in[0] + at);
    const Vector<T> d_g_feature = load(tile.lstm.d_in[0] + kTile + at);
    const Vector<T> d_scale = d_m_feature * m_hat + d_g_feature * g;
    const Vector<T> d_m = load(tile.d_m + at) + d_m_feature * scale / net.one_minus_beta1;
    const Vector<T> d_v = load(tile.d_v + at) -
                          T(0.5) * d_scale * (scale * scale * scale) / net.one_minus_beta2;
    store(tile.d_grad + at, d_g_feature * scale + net.one_minus_beta1 * d_m +
                                T(2) * net.one_minus_beta2 * g * d_v);
    store(tile.d_m + at, net.beta1 * d_m);
    store(tile.d_v + at, net.beta2 * d_v);
  }
}

template <typename T>
void keep(const StudentNetwork<T>& net, const StudentTile<T>& tile) {
  steps<true>(net, tile);
}

template <typename T>
void gradients(const StudentNetwork<T>& net, const StudentTile<T>& tile, double* sums) {
  double* head_sums = sums;
  for (int layer = 0; layer < net.lstm.layers; ++layer) {
    head_sums += net.lstm.shapes[layer].gradient_size();
  }
  head_gradients(net, tile, head_sums);
  lstm_backward(net.lstm, tile.lstm, sums);
}

template <typename T>
void backward(const StudentNetwork<T>& net, const StudentTile<T>& tile, double* sums) {
  keep(net, tile);
  gradients(net, tile, sums);
  moment_gradients(net, tile);
}

}  // namespace

template <typename T>
StudentKernels<T> student_kernels() {
  return {forward<T>, backward<T>, keep<T>, gradients<T>};
}

template StudentKernels<float> student_kernels();
template StudentKernels<double> student_kernels();

}  // namespace amalgam::cpu::AMALGAM_ISA
