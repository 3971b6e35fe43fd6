// How an LSTM's weights and a tile's rows lie in memory; shared by compiled-once and per-ISA files.
#pragma once

#include <cstdint>

namespace amalgam::cpu {

inline constexpr int kTile = 64;         // coordinates computed together: four AVX-512 vectors of float
inline constexpr int kRowGroup = 4;      // rows of `in` whose gradients are computed together
inline constexpr int kColumnAlign = 16;  // columns of weight gradients come in whole vectors

// Always inlined, because files for different instruction sets share this header: the linker would
// keep one copy of an inline function, perhaps AVX-512's, for all.
#define AMALGAM_INLINE inline __attribute__((always_inline))

// Columns of gradients of weights on this many rows: one each, the bias, and padding.
AMALGAM_INLINE int columns_of(int rows) {
  return (rows + 1 + kColumnAlign - 1) / kColumnAlign * kColumnAlign;
}

struct LayerShape {
  int inputs;
  int hidden;

  AMALGAM_INLINE int rows() const { return inputs + hidden; }
  // Weights by unit: four biases, then four weights a row of `in`.
  AMALGAM_INLINE int64_t by_unit_size() const { return int64_t(hidden) * 4 * (rows() + 1); }
  // Weights by input: groups of kRowGroup rows, gate by gate, zeros where the last group ends early.
  AMALGAM_INLINE int64_t by_input_size() const {
    return int64_t((rows() + kRowGroup - 1) / kRowGroup) * kRowGroup * 4 * hidden;
  }
  AMALGAM_INLINE int columns() const { return columns_of(rows()); }
  AMALGAM_INLINE int64_t gradient_size() const { return int64_t(4) * hidden * columns(); }
};

template <typename T>
struct LstmTile;

// An LSTM as the inner loops want it.
template <typename T>
struct LstmNetwork {
  int layers;
  const LayerShape* shapes;   // (layers,)
  const T* const* by_unit;    // (layers,)
  const T* const* by_input;   // (layers,)
  // What steps tiles where nothing is kept; null for lstm_forward's own loops. lstm_pairs.h sets both.
  void (*forward)(const LstmNetwork& net, const LstmTile<T>& tile) = nullptr;
  const uint32_t* const* by_pair = nullptr;  // (layers,)
};

// How many of a layer's `in` rows are never rounded to bfloat16: the features, which span decades.
AMALGAM_INLINE int exact_rows(const LayerShape& shape, int layer) {
  return layer == 0 ? shape.inputs : 0;
}

// Rows of kTile coordinates, `stride` apart, in a tile or in a caller's tensor.
template <typename T>
struct Rows {
  T* first;
  int64_t stride;

  AMALGAM_INLINE T* operator[](int64_t row) const { return first + row * stride; }
  AMALGAM_INLINE Rows from(int64_t row) const { return {first ? (*this)[row] : first, stride}; }
};

// State in memory that is needed soon, fetched into cache while a tile is computed: (layers * hidden)
// rows of two tensors.
struct Ahead {
  const char *first, *second;
  int64_t stride, row_bytes;  // no bytes where nothing is
};

// A tile: rows of kTile coordinates, one after another but for those of type Rows.
template <typename T>
struct LstmTile {
  T* const* in;               // (layers,) a layer's inputs, then its h of before
  const T* bias;              // (4 hidden) the first layer's; the network's where null
  Rows<const T> h;            // (layers * hidden) h of before where `in` lacks it: for pairs alone
  Rows<const T> cells;        // (layers * hidden) c
  Rows<T> new_cells;          // (layers * hidden) gets the new c; may be the same rows
  Rows<T> new_h;              // (layers * hidden) gets a copy of the new h; nothing where null
  T* top;                     // (hidden) the last layer's new h
  T* pairs;                   // (hidden) room for rows of pairs, which lstm_bf16.cpp makes
  Ahead ahead[2];             // the next tile's h and c; this tile's d_new_h and d_new_c
  // The backward pass alone:
  T* gates;                   // (layers * 4 hidden)
  T* squashed;                // (layers * hidden)
  Rows<const T> d_new_h;      // (layers * hidden)
  Rows<const T> d_new_c;      // (layers * hidden)
  Rows<T> d_h;                // (layers * hidden) may be the rows of d_new_h
  Rows<T> d_c;                // (layers * hidden) may be the rows of d_new_c
  T* const* d_in;             // (layers,) a layer's inputs
  T* d_out;                   // (hidden) of `top`, but for what the next step takes of it
  T* columns;                 // (kTile * columns of the widest layer)
};

}  // namespace amalgam::cpu
