// LSTM layers on one tile of coordinates, forward and backward.
//
// A tile is kTile coordinates; a row is one value of each, contiguous. Rows of one kind follow each
// other: a layer's `in` rows are its inputs, then its h of before.
#pragma once

#ifndef AMALGAM_ISA
#error "lstm.h is for *_simd.cpp, which setup.py compiles once per instruction set with AMALGAM_ISA"
#endif

#include "activations.h"
#include "lstm_layout.h"
#include "simd.h"

namespace amalgam::cpu::AMALGAM_ISA {

// Vectors of coordinates in flight beside four gates: as many as leave registers for weights.
inline constexpr int kInFlight = kVectorBytes == 64 ? 4 : 2;

inline constexpr int kCacheLine = 64;

// What the backward pass needs of a layer's forward pass: rows of i, f, a, o by unit, and tanh(c).
template <typename T>
struct Kept {
  T* gates;
  T* squashed;
};

// sums[gate] = bias[gate stride] + weights of one unit times a layer's `in` rows. Never inlined: with
// the activations' constants beside them, compilers spill the sums in the innermost loop.
template <typename T>
__attribute__((noinline)) void gate_sums(const T* bias, int stride, const T* __restrict weights,
                                         int rows, const T* __restrict in, T* __restrict sums) {
  constexpr int kStep = kInFlight * kLanes<T>;
  static_assert(kTile % kStep == 0, "a tile is whole vectors");
  for (int at = 0; at < kTile; at += kStep) {
    Vector<T> sum[4][kInFlight];
    for (int gate = 0; gate < 4; ++gate) {
      for (int v = 0; v < kInFlight; ++v) sum[gate][v] = splat(bias[gate * stride]);
    }
    const T* w = weights;
    for (int row = 0; row < rows; ++row, w += 4) {
      Vector<T> x[kInFlight];
      for (int v = 0; v < kInFlight; ++v) x[v] = load(in + row * kTile + at + v * kLanes<T>);
      for (int gate = 0; gate < 4; ++gate) {
        const Vector<T> weight = splat(w[gate]);
        for (int v = 0; v < kInFlight; ++v) sum[gate][v] += weight * x[v];
      }
    }
    for (int gate = 0; gate < 4; ++gate) {
      for (int v = 0; v < kInFlight; ++v) {
        store(sums + gate * kTile + at + v * kLanes<T>, sum[gate][v]);
      }
    }
  }
}

inline void prefetch(const Ahead& ahead, int64_t row) {
  for (int64_t byte = 0; byte < ahead.row_bytes; byte += kCacheLine) {
    __builtin_prefetch(ahead.first + row * ahead.stride + byte);
    __builtin_prefetch(ahead.second + row * ahead.stride + byte);
  }
}

// One layer's step; `out` gets the new h. The layer's rows of state begin at `first`.
template <bool keep, typename T>
inline void layer_forward(const LayerShape& layer, const T* __restrict by_unit,
                          const T* __restrict in, const LstmTile<T>& tile, int first,
                          T* __restrict out, Kept<T> kept) {
  const int rows = layer.rows();
  for (int unit = 0; unit < layer.hidden; ++unit) {
    for (const Ahead& ahead : tile.ahead) prefetch(ahead, first + unit);
    const T* cells = tile.cells[first + unit];
    T* new_cells = tile.new_cells[first + unit];
    T* new_h = tile.new_h.first ? tile.new_h[first + unit] : nullptr;
    T here[4 * kTile];
    T* gates = keep ? kept.gates + 4 * unit * kTile : here;
    const T* weights = by_unit + int64_t(unit) * 4 * (rows + 1);
    const bool own = first == 0 && tile.bias;
    gate_sums(own ? tile.bias + unit : weights, own ? layer.hidden : 1, weights + 4, rows, in, gates);
    for (int at = 0; at < kTile; at += kLanes<T>) {
      const Ratio<T> i = sigmoid_ratio(load(gates + at)),
                     f = sigmoid_ratio(load(gates + kTile + at)),
                     a = tanh_ratio(load(gates + 2 * kTile + at)),
                     o = sigmoid_ratio(load(gates + 3 * kTile + at));
      // f c + i a over one denominator, which is from 1 to 8: divisions cost most of all.
      const Vector<T> below = i.below * a.below;
      const Vector<T> cell = (f.above * load(cells + at) * below + i.above * a.above * f.below) /
                             (f.below * below);
      const Ratio<T> squashed = tanh_ratio(cell);
      const Vector<T> h = o.above * squashed.above / (o.below * squashed.below);
      store(new_cells + at, cell);
      store(out + unit * kTile + at, h);
      if (new_h) store(new_h + at, h);
      if constexpr (keep) {
        store(gates + at, value(i));
        store(gates + kTile + at, value(f));
        store(gates + 2 * kTile + at, value(a));
        store(gates + 3 * kTile + at, value(o));
        store(kept.squashed + unit * kTile + at, value(squashed));
      }
    }
  }
}

// Turns kept gates into gradients of their sums, in place, and gives those of the old c. `from_above`
// holds the gradient of the new h as the layer above or the head has it; the next step's is added.
template <typename T>
inline void layer_gate_gradients(int hidden, const LstmTile<T>& tile, int first,
                                 const T* __restrict from_above, Kept<T> kept) {
  for (int unit = 0; unit < hidden; ++unit) {
    T* gates = kept.gates + 4 * unit * kTile;
    const T *cells = tile.cells[first + unit], *d_new_h = tile.d_new_h[first + unit],
            *d_new_c = tile.d_new_c[first + unit];
    T* d_c_row = tile.d_c[first + unit];
    for (int at = 0; at < kTile; at += kLanes<T>) {
      const int place = unit * kTile + at;
      const Vector<T> i = load(gates + at), f = load(gates + kTile + at),
                      a = load(gates + 2 * kTile + at), o = load(gates + 3 * kTile + at);
      const Vector<T> squashed = load(kept.squashed + place), d_h = load(from_above + place) + load(d_new_h + at);
      const Vector<T> d_c = load(d_new_c + at) + d_h * o * (T(1) - squashed * squashed);
      store(gates + at, d_c * a * i * (T(1) - i));
      store(gates + kTile + at, d_c * load(cells + at) * f * (T(1) - f));
      store(gates + 2 * kTile + at, d_c * i * (T(1) - a * a));
      store(gates + 3 * kTile + at, d_h * squashed * o * (T(1) - o));
      store(d_c_row + at, d_c * f);
    }
  }
}

// The sum over gates of weight[row][gate] d_gates[gate] for all of a layer's `in` rows: its inputs' to
// d_in, those of the old h to d_h.
template <typename T>
inline void layer_input_gradients(const LayerShape& layer, const T* __restrict by_input,
                                  const T* __restrict d_gates, T* __restrict d_in,
                                  const Rows<T>& d_h) {
  const int hidden = layer.hidden;
  const int rows = layer.rows();
  constexpr int kStep = kInFlight * kLanes<T>;
  // One run of all 256 gates of 64 units rounds more than twice as badly as PyTorch, which sums in
  // vectors; runs of 16 do not.
  constexpr int kRun = 16;
  for (int row = 0; row < rows; row += kRowGroup) {
    const int count = rows - row < kRowGroup ? rows - row : kRowGroup;
    const T* weights = by_input + int64_t(row) * 4 * hidden;
    for (int at = 0; at < kTile; at += kStep) {
      Vector<T> sums[kRowGroup][kInFlight] = {};
      for (int first = 0; first < 4 * hidden; first += kRun) {
        const int last = first + kRun < 4 * hidden ? first + kRun : 4 * hidden;
        Vector<T> run[kRowGroup][kInFlight] = {};
        for (int gate = first; gate < last; ++gate) {
          const T* w = weights + gate * kRowGroup;
          for (int v = 0; v < kInFlight; ++v) {
            const Vector<T> d = load(d_gates + gate * kTile + at + v * kLanes<T>);
            for (int r = 0; r < kRowGroup; ++r) run[r][v] += w[r] * d;
          }
        }
        for (int r = 0; r < kRowGroup; ++r) {
          for (int v = 0; v < kInFlight; ++v) sums[r][v] += run[r][v];
        }
      }
      for (int r = 0; r < count; ++r) {
        const int of_h = row + r - layer.inputs;
        T* to = of_h < 0 ? d_in + (row + r) * kTile : d_h[of_h];
        for (int v = 0; v < kInFlight; ++v) store(to + at + v * kLanes<T>, sums[r][v]);
      }
    }
  }
}

// Rows to columns: to[coordinate][row], a column for the bias of ones after them, zeros to `stride`.
template <typename T>
inline void transpose(const T* __restrict rows, int count, int stride, T* __restrict to) {
  constexpr int kSide = kLanes<T>;
  for (int first = 0; first < stride; first += kSide) {
    for (int at = 0; at < kTile; at += kSide) {
      Vector<T> square[kSide];
      for (int r = 0; r < kSide; ++r) {
        const int row = first + r;
        square[r] = row < count ? load(rows + row * kTile + at) : splat(T(row == count));
      }
      transpose_square<T>(square);
      for (int r = 0; r < kSide; ++r) store(to + (at + r) * stride + first, square[r]);
    }
  }
}

inline constexpr int kOutputs = 4;
inline constexpr int kColumnVectors = kVectorBytes == 64 ? 3 : 2;

// add_weight_gradients for kOutputs outputs, of which `used` count, and `vectors` of columns.
template <int vectors, typename T>
inline void add_weight_gradients_block(const T* const* d_rows, int used,
                                       const T* __restrict columns, int stride,
                                       double* __restrict sums) {
  Vector<T> acc[kOutputs][vectors] = {};
  for (int n = 0; n < kTile; ++n) {
    Vector<T> x[vectors];
    for (int v = 0; v < vectors; ++v) x[v] = load(columns + n * stride + v * kLanes<T>);
    for (int r = 0; r < kOutputs; ++r) {
      const Vector<T> weight = splat(d_rows[r][n]);
      for (int v = 0; v < vectors; ++v) acc[r][v] += weight * x[v];
    }
  }
  for (int r = 0; r < used; ++r) {
    for (int v = 0; v < vectors; ++v) {
      double* to = sums + r * stride + v * kLanes<T>;
      for (int lane = 0; lane < kLanes<T>; ++lane) to[lane] += acc[r][v][lane];
    }
  }
}

// sums[output][column] += sum over coordinates of d[output][coordinate] columns[coordinate][column].
// A tile is summed in T, tiles in double.
template <typename T>
inline void add_weight_gradients(const T* __restrict d, int outputs, const T* __restrict columns,
                                 int stride, double* __restrict sums) {
  for (int output = 0; output < outputs; output += kOutputs) {
    const int used = outputs - output < kOutputs ? outputs - output : kOutputs;
    const T* d_rows[kOutputs];
    for (int r = 0; r < kOutputs; ++r) d_rows[r] = d + (output + (r < used ? r : 0)) * kTile;
    double* to = sums + int64_t(output) * stride;
    int column = 0;
    for (; column + kColumnVectors * kLanes<T> <= stride; column += kColumnVectors * kLanes<T>) {
      add_weight_gradients_block<kColumnVectors>(d_rows, used, columns + column, stride,
                                                 to + column);
    }
    const int left = (stride - column) / kLanes<T>;
    if (left == 1) add_weight_gradients_block<1>(d_rows, used, columns + column, stride, to + column);
    if (left == 2) add_weight_gradients_block<2>(d_rows, used, columns + column, stride, to + column);
  }
}

// All layers' step; `keep` is for lstm_backward.
template <bool keep, typename T>
inline void lstm_forward(const LstmNetwork<T>& net, const LstmTile<T>& tile) {
  if (!keep && net.forward) return net.forward(net, tile);
  const int hidden = net.shapes[0].hidden;
  for (int layer = 0; layer < net.layers; ++layer) {
    T* out = layer + 1 < net.layers ? tile.in[layer + 1] : tile.top;
    const int first = layer * hidden;
    const int64_t rows = int64_t(first) * kTile;
    const Kept<T> kept = keep ? Kept<T>{tile.gates + 4 * rows, tile.squashed + rows} : Kept<T>{};
    layer_forward<keep>(net.shapes[layer], net.by_unit[layer], tile.in[layer], tile, first, out,
                        kept);
  }
}

// From d_out, d_new_h and d_new_c to d_in, d_h and d_c. Adds the weights' gradients to `sums`, a layer's
// after another.
template <typename T>
inline void lstm_backward(const LstmNetwork<T>& net, const LstmTile<T>& tile, double* sums) {
  const int hidden = net.shapes[0].hidden;
  double* layer_sums = sums;
  for (int layer = 0; layer < net.layers; ++layer) layer_sums += net.shapes[layer].gradient_size();
  for (int layer = net.layers - 1; layer >= 0; --layer) {
    const LayerShape& shape = net.shapes[layer];
    const int first = layer * hidden;
    const int64_t rows = int64_t(first) * kTile;
    const T* from_above = layer + 1 < net.layers ? tile.d_in[layer + 1] : tile.d_out;
    const Kept<T> kept{tile.gates + 4 * rows, tile.squashed + rows};
    layer_gate_gradients(hidden, tile, first, from_above, kept);
    layer_input_gradients(shape, net.by_input[layer], kept.gates, tile.d_in[layer],
                          tile.d_h.from(first));
    transpose(tile.in[layer], shape.rows(), shape.columns(), tile.columns);
    layer_sums -= shape.gradient_size();
    add_weight_gradients(kept.gates, 4 * hidden, tile.columns, shape.columns(), layer_sums);
  }
}

}  // namespace amalgam::cpu::AMALGAM_ISA
