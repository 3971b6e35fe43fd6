// LSTM layers on one tile of coordinates, forward and backward; only for *_simd.cpp.
//
// A tile is kTile coordinates; a row is one value of each, contiguous. Rows of one kind follow each
// other: a layer's `in` rows are its inputs, then its h of before.
#pragma once

#include "activations.h"
#include "lstm_layout.h"
#include "simd.h"

namespace amalgam::cpu::AMALGAM_ISA {

// Vectors of coordinates in flight beside four gates: as many as leave registers for weights.
inline constexpr int kInFlight = kVectorBytes == 64 ? 4 : 2;

// What the backward pass needs of a layer's forward pass: rows of i, f, a, o by unit, and tanh(c).
template <typename T>
struct Kept {
  T* gates;
  T* squashed;
};

// One layer's step. `cells` holds c and gets the new c; `out` gets the new h.
template <bool keep, typename T>
inline void layer_forward(const LayerShape& layer, const T* __restrict by_unit,
                          const T* __restrict in, T* __restrict cells, T* __restrict out,
                          Kept<T> kept) {
  const int hidden = layer.hidden;
  const int rows = layer.rows();
  constexpr int kStep = kInFlight * kLanes<T>;
  static_assert(kTile % kStep == 0, "a tile is whole vectors");
  for (int unit = 0; unit < hidden; ++unit) {
    const T* weights = by_unit + int64_t(unit) * 4 * (rows + 1);
    for (int at = 0; at < kTile; at += kStep) {
      Vector<T> i[kInFlight], f[kInFlight], a[kInFlight], o[kInFlight];
      for (int v = 0; v < kInFlight; ++v) {
        i[v] = splat(weights[0]);
        f[v] = splat(weights[1]);
        a[v] = splat(weights[2]);
        o[v] = splat(weights[3]);
      }
      for (int row = 0; row < rows; ++row) {
        const T* w = weights + 4 * (row + 1);
        const Vector<T> wi = splat(w[0]), wf = splat(w[1]), wa = splat(w[2]), wo = splat(w[3]);
        for (int v = 0; v < kInFlight; ++v) {
          const Vector<T> x = load(in + row * kTile + at + v * kLanes<T>);
          i[v] += wi * x;
          f[v] += wf * x;
          a[v] += wa * x;
          o[v] += wo * x;
        }
      }
      for (int v = 0; v < kInFlight; ++v) {
        const int place = at + v * kLanes<T>;
        T* c = cells + unit * kTile + place;
        i[v] = sigmoid(i[v]);
        f[v] = sigmoid(f[v]);
        a[v] = tanh(a[v]);
        o[v] = sigmoid(o[v]);
        const Vector<T> cell = f[v] * load(c) + i[v] * a[v];
        const Vector<T> squashed = tanh(cell);
        store(c, cell);
        store(out + unit * kTile + place, o[v] * squashed);
        if constexpr (keep) {
          T* gates = kept.gates + 4 * unit * kTile + place;
          store(gates, i[v]);
          store(gates + kTile, f[v]);
          store(gates + 2 * kTile, a[v]);
          store(gates + 3 * kTile, o[v]);
          store(kept.squashed + unit * kTile + place, squashed);
        }
      }
    }
  }
}

// Turns kept gates into gradients of their sums, in place. `d_out` holds the gradient of the new h;
// `d_cells` that of the new c and gets that of the old one.
template <typename T>
inline void layer_gate_gradients(int hidden, const T* __restrict cells, const T* __restrict d_out,
                                 T* __restrict d_cells, Kept<T> kept) {
  for (int unit = 0; unit < hidden; ++unit) {
    T* gates = kept.gates + 4 * unit * kTile;
    for (int at = 0; at < kTile; at += kLanes<T>) {
      const int place = unit * kTile + at;
      const Vector<T> i = load(gates + at), f = load(gates + kTile + at),
                      a = load(gates + 2 * kTile + at), o = load(gates + 3 * kTile + at);
      const Vector<T> squashed = load(kept.squashed + place), d_h = load(d_out + place);
      const Vector<T> d_c = load(d_cells + place) + d_h * o * (T(1) - squashed * squashed);
      store(gates + at, d_c * a * i * (T(1) - i));
      store(gates + kTile + at, d_c * load(cells + place) * f * (T(1) - f));
      store(gates + 2 * kTile + at, d_c * i * (T(1) - a * a));
      store(gates + 3 * kTile + at, d_h * squashed * o * (T(1) - o));
      store(d_cells + place, d_c * f);
    }
  }
}

// d_in[row] = sum over gates of weight[row][gate] d_gates[gate], for all of a layer's `in` rows.
template <typename T>
inline void layer_input_gradients(const LayerShape& layer, const T* __restrict by_input,
                                  const T* __restrict d_gates, T* __restrict d_in) {
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
        for (int v = 0; v < kInFlight; ++v) {
          store(d_in + (row + r) * kTile + at + v * kLanes<T>, sums[r][v]);
        }
      }
    }
  }
}

// Rows to columns: to[coordinate][row], a column for the bias of ones after them, zeros to `stride`.
template <typename T>
inline void transpose(const T* __restrict rows, int count, int stride, T* __restrict to) {
  for (int n = 0; n < kTile; ++n) {
    for (int row = 0; row < count; ++row) to[n * stride + row] = rows[row * kTile + n];
    to[n * stride + count] = T(1);
    for (int row = count + 1; row < stride; ++row) to[n * stride + row] = T(0);
  }
}

// sums[output][column] += sum over coordinates of d[output][coordinate] columns[coordinate][column].
// A tile is summed in T, tiles in double.
template <typename T>
inline void add_weight_gradients(const T* __restrict d, int outputs, const T* __restrict columns,
                                 int stride, double* __restrict sums) {
  constexpr int kOutputs = 4;
  constexpr int kColumns = kVectorBytes == 64 ? 3 : 2;
  for (int output = 0; output < outputs; output += kOutputs) {
    const int rows = outputs - output < kOutputs ? outputs - output : kOutputs;
    for (int column = 0; column < stride; column += kColumns * kLanes<T>) {
      const int vectors = (stride - column) / kLanes<T> < kColumns
                              ? (stride - column) / kLanes<T>
                              : kColumns;
      Vector<T> acc[kOutputs][kColumns] = {};
      const T* d_rows[kOutputs];
      for (int r = 0; r < kOutputs; ++r) d_rows[r] = d + (output + (r < rows ? r : 0)) * kTile;
      if (vectors == kColumns) {
        for (int n = 0; n < kTile; ++n) {
          Vector<T> x[kColumns];
          for (int v = 0; v < kColumns; ++v) x[v] = load(columns + n * stride + column + v * kLanes<T>);
          for (int r = 0; r < kOutputs; ++r) {
            const Vector<T> weight = splat(d_rows[r][n]);
            for (int v = 0; v < kColumns; ++v) acc[r][v] += weight * x[v];
          }
        }
      } else {
        for (int v = 0; v < vectors; ++v) {
          for (int n = 0; n < kTile; ++n) {
            const Vector<T> x = load(columns + n * stride + column + v * kLanes<T>);
            for (int r = 0; r < kOutputs; ++r) acc[r][v] += d_rows[r][n] * x;
          }
        }
      }
      for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < vectors; ++v) {
          double* to = sums + int64_t(output + r) * stride + column + v * kLanes<T>;
          for (int lane = 0; lane < kLanes<T>; ++lane) to[lane] += acc[r][v][lane];
        }
      }
    }
  }
}

// All layers' step; `keep` is for lstm_backward.
template <bool keep, typename T>
inline void lstm_forward(const LstmNetwork<T>& net, const LstmTile<T>& tile) {
  const int hidden = net.shapes[0].hidden;
  for (int layer = 0; layer < net.layers; ++layer) {
    T* out = layer + 1 < net.layers ? tile.in[layer + 1] : tile.top;
    const int64_t rows = int64_t(layer) * hidden * kTile;
    const Kept<T> kept = keep ? Kept<T>{tile.gates + 4 * rows, tile.squashed + rows} : Kept<T>{};
    layer_forward<keep>(net.shapes[layer], net.by_unit[layer], tile.in[layer], tile.cells + rows,
                        out, kept);
  }
}

// From d_out, d_h and d_cells to d_in and d_cells. Adds the weights' gradients to `sums`, a layer's
// after another.
template <typename T>
inline void lstm_backward(const LstmNetwork<T>& net, const LstmTile<T>& tile, double* sums) {
  const int hidden = net.shapes[0].hidden;
  double* layer_sums = sums;
  for (int layer = 0; layer < net.layers; ++layer) layer_sums += net.shapes[layer].gradient_size();
  for (int layer = net.layers - 1; layer >= 0; --layer) {
    const LayerShape& shape = net.shapes[layer];
    const int64_t rows = int64_t(layer) * hidden * kTile;
    const T* from_above = layer + 1 < net.layers ? tile.d_in[layer + 1] : tile.d_out;
    for (int at = 0; at < hidden * kTile; at += kLanes<T>) {
      store(tile.d_out + at, load(from_above + at) + load(tile.d_h + rows + at));
    }
    const Kept<T> kept{tile.gates + 4 * rows, tile.squashed + rows};
    layer_gate_gradients(hidden, tile.old_cells + rows, tile.d_out, tile.d_cells + rows, kept);
    layer_input_gradients(shape, net.by_input[layer], kept.gates, tile.d_in[layer]);
    transpose(tile.in[layer], shape.rows(), shape.columns(), tile.columns);
    layer_sums -= shape.gradient_size();
    add_weight_gradients(kept.gates, 4 * hidden, tile.columns, shape.columns(), layer_sums);
  }
}

}  // namespace amalgam::cpu::AMALGAM_ISA
