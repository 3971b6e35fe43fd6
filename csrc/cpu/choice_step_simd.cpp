#include "choice_step.h"

#include "lstm.h"

namespace amalgam::cpu::AMALGAM_ISA {
namespace {

// log(1e-10): the logit of the option that moves nothing.
constexpr double kIdleLogit = -23.025850929940457;

template <typename T>
void teachers_updates(const ChoiceNetwork<T>& net, const ChoiceTile<T>& tile) {
  const TeacherStepKernels<T> teachers = teacher_step_kernels<T>();
  for (int k = 0; k < net.teachers; ++k) {
    const int64_t row = int64_t(k) * kTile;
    teachers.step(net.pool[k], tile.grad, tile.m + row, tile.v + row, tile.lstm.in[0] + row,
                  tile.new_m + row, tile.new_v + row, kTile);
  }
}

// to[row] = bias[row] + sum over columns of weight(row, column) from[column].
template <typename T, typename Bias, typename Weight>
inline void combine(int rows, int columns, const Bias& bias, const Weight& weight,
                    const T* __restrict from, T* __restrict to) {
  for (int row = 0; row < rows; ++row) {
    for (int at = 0; at < kTile; at += kInFlight * kLanes<T>) {
      Vector<T> sums[kInFlight];
      for (int v = 0; v < kInFlight; ++v) sums[v] = splat<T>(bias(row));
      for (int column = 0; column < columns; ++column) {
        const Vector<T> w = splat<T>(weight(row, column));
        for (int v = 0; v < kInFlight; ++v) {
          sums[v] += w * load(from + column * kTile + at + v * kLanes<T>);
        }
      }
      for (int v = 0; v < kInFlight; ++v) store(to + row * kTile + at + v * kLanes<T>, sums[v]);
    }
  }
}

// Turns logits into the mixture, in place. The largest one is subtracted, so nothing overflows.
template <typename T>
void mix(const ChoiceNetwork<T>& net, const ChoiceTile<T>& tile) {
  for (int at = 0; at < kTile; at += kLanes<T>) {
    const Vector<T> idle = splat(T(kIdleLogit));
    Vector<T> largest = idle;
    for (int k = 0; k < net.teachers; ++k) {
      const Vector<T> logit = load(tile.mixture + k * kTile + at);
      largest = logit > largest ? logit : largest;
    }
    Vector<T> total = exp(idle - largest);
    for (int k = 0; k < net.teachers; ++k) {
      T* place = tile.mixture + k * kTile + at;
      const Vector<T> term = exp(load(place) - largest);
      total += term;
      store(place, term);
    }
    Vector<T> update = {};
    for (int k = 0; k < net.teachers; ++k) {
      T* place = tile.mixture + k * kTile + at;
      const Vector<T> share = load(place) / total;
      store(place, share);
      update += share * load(tile.lstm.in[0] + k * kTile + at);
    }
    store(tile.update + at, net.learning_rate * update);
  }
}

// The whole step; `keep` is for the backward pass.
template <bool keep, typename T>
void steps(const ChoiceNetwork<T>& net, const ChoiceTile<T>& tile) {
  teachers_updates(net, tile);
  lstm_forward<keep>(net.lstm, tile.lstm);
  const int hidden = net.lstm.shapes[0].hidden;
  combine(
      net.teachers, hidden, [&](int k) { return net.head_bias[k]; },
      [&](int k, int unit) { return net.head[k * hidden + unit]; }, tile.lstm.top, tile.mixture);
  mix(net, tile);
}

template <typename T>
void forward(const ChoiceNetwork<T>& net, const ChoiceTile<T>& tile) {
  steps<false>(net, tile);
}

// From the gradients in update and mixture to those in the logits, and in the teachers' updates as
// far as the mixture takes them.
template <typename T>
void logit_gradients(const ChoiceNetwork<T>& net, const ChoiceTile<T>& tile) {
  for (int at = 0; at < kTile; at += kLanes<T>) {
    const Vector<T> d_update = net.learning_rate * load(tile.d_update + at);
    Vector<T> mean = {};
    for (int k = 0; k < net.teachers; ++k) {
      const int64_t place = int64_t(k) * kTile + at;
      const Vector<T> share = load(tile.mixture + place);
      const Vector<T> d = load(tile.d_mixture + place) + d_update * load(tile.lstm.in[0] + place);
      store(tile.d_mixture + place, d);
      store(tile.d_teachers + place, d_update * share);
      mean += share * d;
    }
    for (int k = 0; k < net.teachers; ++k) {
      const int64_t place = int64_t(k) * kTile + at;
      store(tile.d_mixture + place,
            load(tile.mixture + place) * (load(tile.d_mixture + place) - mean));
    }
  }
}

template <typename T>
void teachers_gradients(const ChoiceNetwork<T>& net, const ChoiceTile<T>& tile) {
  const TeacherStepKernels<T> teachers = teacher_step_kernels<T>();
  for (int k = 0; k < net.teachers; ++k) {
    const int64_t row = int64_t(k) * kTile;
    T *d = tile.d_teachers + row, *d_m = tile.d_m + row, *d_v = tile.d_v + row;
    for (int at = 0; at < kTile; at += kLanes<T>) {
      store(d + at, load(d + at) + load(tile.lstm.d_in[0] + row + at));
    }
    teachers.gradients(net.pool[k], d, d_m, d_v, tile.grad, tile.m + row, tile.v + row, d, d_m,
                       d_v, kTile);
  }
  for (int at = 0; at < kTile; at += kLanes<T>) {
    Vector<T> sum = {};
    for (int k = 0; k < net.teachers; ++k) sum += load(tile.d_teachers + k * kTile + at);
    store(tile.d_grad + at, sum);
  }
}

template <typename T>
void backward(const ChoiceNetwork<T>& net, const ChoiceTile<T>& tile, double* sums) {
  steps<true>(net, tile);
  logit_gradients(net, tile);

  const int hidden = net.lstm.shapes[0].hidden, stride = columns_of(hidden);
  double* head_sums = sums;
  for (int layer = 0; layer < net.lstm.layers; ++layer) {
    head_sums += net.lstm.shapes[layer].gradient_size();
  }
  transpose(tile.lstm.top, hidden, stride, tile.lstm.columns);
  add_weight_gradients(tile.d_mixture, net.teachers, tile.lstm.columns, stride, head_sums);
  combine(
      hidden, net.teachers, [](int) { return T(0); },
      [&](int unit, int k) { return net.head[k * hidden + unit]; }, tile.d_mixture,
      tile.lstm.d_out);

  lstm_backward(net.lstm, tile.lstm, sums);
  teachers_gradients(net, tile);
}

}  // namespace

template <typename T>
ChoiceKernels<T> choice_kernels() {
  return {forward<T>, backward<T>};
}

template ChoiceKernels<float> choice_kernels();
template ChoiceKernels<double> choice_kernels();

}  // namespace amalgam::cpu::AMALGAM_ISA
