#include "student_step.h"

#include "lstm.h"
#include "student_forms.h"

namespace amalgam::cpu::AMALGAM_ISA {
namespace {

template <typename T>
Moments<T> new_moments(const StudentNetwork<T>& net, const StudentTile<T>& tile, int at) {
  const Vector<T> g = load(tile.grad + at);
  return {g, net.beta1 * load(tile.m + at) + net.one_minus_beta1 * g,
          net.beta2 * load(tile.v + at) + net.one_minus_beta2 * (g * g)};
}

template <typename Form, typename T>
void moments_and_inputs(const StudentNetwork<T>& net, const StudentTile<T>& tile) {
  for (int at = 0; at < kTile; at += kLanes<T>) {
    const Moments<T> of = new_moments(net, tile, at);
    Vector<T> x[Form::sizes.features];
    Form::template inputs<T>(net, tile, of, x);
    store(tile.m + at, of.m);
    store(tile.v + at, of.v);
    for (int feature = 0; feature < Form::sizes.features; ++feature) {
      store(tile.lstm.in[0] + feature * kTile + at, x[feature]);
    }
  }
}

// The whole step; where it keeps what the backward pass needs, `update` gets the form's slopes instead.
template <typename Form, bool keep, typename T>
void steps(const StudentNetwork<T>& net, const StudentTile<T>& tile) {
  moments_and_inputs<Form>(net, tile);
  const int hidden = net.lstm.shapes[0].hidden;
  lstm_forward<keep>(net.lstm, tile.lstm);
  for (int at = 0; at < kTile; at += kLanes<T>) {
    Vector<T> o[Form::sizes.outputs];
    for (int output = 0; output < Form::sizes.outputs; ++output) {
      Vector<T> sum = splat(net.head_bias[output]);
      for (int unit = 0; unit < hidden; ++unit) {
        sum += net.head[output * hidden + unit] * load(tile.lstm.top + unit * kTile + at);
      }
      o[output] = sum;
    }
    if constexpr (keep) {
      Vector<T> slopes[Form::sizes.slopes];
      Form::template slopes<T>(net, tile, at, o, slopes);
      for (int row = 0; row < Form::sizes.slopes; ++row) {
        store(tile.update + row * kTile + at, slopes[row]);
      }
    } else {
      store(tile.update + at, Form::template update<T>(net, tile, at, o));
    }
  }
}

template <typename Form, typename T>
void forward(const StudentNetwork<T>& net, const StudentTile<T>& tile) {
  steps<Form, false>(net, tile);
}

template <typename T>
double dot(const T* a, const T* b) {
  Vector<T> sums = {};
  for (int at = 0; at < kTile; at += kLanes<T>) sums += load(a + at) * load(b + at);
  double total = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) total += sums[lane];
  return total;
}

// The slopes in the head's outputs become the gradients in them.
template <typename Form, typename T>
void head_gradients(const StudentNetwork<T>& net, const StudentTile<T>& tile, double* sums) {
  constexpr int kOutputs = Form::sizes.outputs;
  const int hidden = net.lstm.shapes[0].hidden;
  double bias[kOutputs] = {};
  for (int at = 0; at < kTile; at += kLanes<T>) {
    Vector<T> d[kOutputs];
    for (int output = 0; output < kOutputs; ++output) {
      T* slopes = tile.update + output * kTile + at;
      d[output] = load(tile.d_update + at) * load(slopes);
      store(slopes, d[output]);
      for (int lane = 0; lane < kLanes<T>; ++lane) bias[output] += d[output][lane];
    }
    for (int unit = 0; unit < hidden; ++unit) {
      Vector<T> sum = net.head[unit] * d[0];
      for (int output = 1; output < kOutputs; ++output) {
        sum += net.head[output * hidden + unit] * d[output];
      }
      store(tile.lstm.d_out + unit * kTile + at, sum);
    }
  }
  for (int output = 0; output < kOutputs; ++output) {
    for (int unit = 0; unit < hidden; ++unit) {
      *sums++ += dot(tile.update + output * kTile, tile.lstm.top + unit * kTile);
    }
  }
  for (double sum : bias) *sums++ += sum;
}

template <typename Form, typename T>
void moment_gradients(const StudentNetwork<T>& net, const StudentTile<T>& tile) {
  for (int at = 0; at < kTile; at += kLanes<T>) {
    const Moments<T> of{load(tile.grad + at), load(tile.m + at), load(tile.v + at)};
    const MomentGradients<T> d = Form::template back<T>(net, tile, at, of);
    const Vector<T> d_m = load(tile.d_m + at) + d.m;
    const Vector<T> d_v = load(tile.d_v + at) - d.minus_v;
    store(tile.d_grad + at,
          d.g + net.one_minus_beta1 * d_m + T(2) * net.one_minus_beta2 * of.g * d_v);
    store(tile.d_m + at, net.beta1 * d_m);
    store(tile.d_v + at, net.beta2 * d_v);
  }
}

template <typename Form, typename T>
void keep(const StudentNetwork<T>& net, const StudentTile<T>& tile) {
  steps<Form, true>(net, tile);
}

template <typename Form, typename T>
void gradients(const StudentNetwork<T>& net, const StudentTile<T>& tile, double* sums) {
  double* head_sums = sums;
  for (int layer = 0; layer < net.lstm.layers; ++layer) {
    head_sums += net.lstm.shapes[layer].gradient_size();
  }
  head_gradients<Form>(net, tile, head_sums);
  lstm_backward(net.lstm, tile.lstm, sums);
}

template <typename Form, typename T>
void backward(const StudentNetwork<T>& net, const StudentTile<T>& tile, double* sums) {
  keep<Form>(net, tile);
  gradients<Form>(net, tile, sums);
  moment_gradients<Form>(net, tile);
}

template <typename Form, typename T>
StudentKernels<T> kernels_of() {
  return {forward<Form, T>, backward<Form, T>, keep<Form, T>, gradients<Form, T>};
}

}  // namespace

template <typename T>
StudentKernels<T> student_kernels() {
  return kernels_of<RNNProp, T>();
}

template <typename T>
StudentKernels<T> nominal_kernels() {
  return kernels_of<Nominal, T>();
}

template StudentKernels<float> student_kernels();
template StudentKernels<double> student_kernels();
template StudentKernels<float> nominal_kernels();
template StudentKernels<double> nominal_kernels();

}  // namespace amalgam::cpu::AMALGAM_ISA
