// Tiles of coordinates between memory and rows, and sums over tiles.
#pragma once

#ifdef AMALGAM_ISA
#error "tiles.h is for files compiled once: AVX-512's copy of its functions could be linked for all"
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cell_codes.h"
#include "dispatch.h"
#include "lstm_layout.h"
#include "parallel.h"
#include "rounding.h"
#include "storage.h"

namespace amalgam::cpu {

// Tiles that make a thread worth waking: some 5 us each with AVX-512.
inline constexpr int64_t kGrain = 4;

// Tiles whose weight gradients are summed together, and the most sums that are then added up.
inline constexpr int64_t kTilesASum = 4;
inline constexpr int64_t kMostSums = 128;

inline int64_t tiles_of(int64_t coordinates) { return (coordinates + kTile - 1) / kTile; }

// A part of a tile: `count` coordinates of one tensor.
struct Piece {
  int64_t tensor, start, count, place;
};

// The whole tile of that index, of a single tensor of n coordinates.
inline Piece only_piece(int64_t index, int64_t n) {
  const int64_t first = index * kTile;
  return {0, first, std::min<int64_t>(kTile, n - first), 0};
}

// Rows of `numel` coordinates in memory to and from rows of a tile.
template <typename T>
void copy_in(const T* from, int64_t numel, int64_t rows, const Piece& piece, T* to) {
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(to + row * kTile + piece.place, from + row * numel + piece.start,
                piece.count * sizeof(T));
  }
}

template <typename T>
void copy_out(const T* from, int64_t rows, const Piece& piece, T* to, int64_t numel) {
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(to + row * numel + piece.start, from + row * kTile + piece.place,
                piece.count * sizeof(T));
  }
}

// Fills the rows' coordinates after the last one.
template <typename T>
void fill_after(int64_t count, int64_t rows, T value, T* to) {
  if (count == kTile) return;
  for (int64_t row = 0; row < rows; ++row) {
    std::fill(to + row * kTile + count, to + (row + 1) * kTile, value);
  }
}

template <typename T>
void clear_after(int64_t count, int64_t rows, T* to) {
  fill_after(count, rows, T(0), to);
}

// A thread's rows, kept from call to call.
template <typename T>
class Workspace {
 public:
  static Workspace& of_this_thread() {
    static thread_local Workspace workspace;
    return workspace;
  }

  // Forgets what was taken; that many rows can be taken now.
  void start(int64_t rows) {
    if (static_cast<int64_t>(storage_.size()) < rows * kTile) storage_.resize(rows * kTile);
    next_ = storage_.data();
  }

  T* take(int64_t rows) {
    T* taken = next_;
    next_ += rows * kTile;
    return taken;
  }

  // How many rows take_lstm takes.
  static int64_t lstm_rows(const std::vector<LayerShape>& shapes, bool for_backward) {
    const int64_t layers = static_cast<int64_t>(shapes.size()), hidden = shapes[0].hidden;
    int64_t in_rows = 0;
    for (const LayerShape& shape : shapes) in_rows += shape.rows();
    const int64_t states = layers * hidden;
    const int64_t rows = in_rows + states + 2 * hidden;
    const int64_t d_in_rows = in_rows - states;
    return for_backward ? rows + d_in_rows + states * 8 + hidden + widest(shapes) : rows;
  }

  LstmTile<T> take_lstm(const std::vector<LayerShape>& shapes, bool for_backward) {
    const int64_t hidden = shapes[0].hidden, states = static_cast<int64_t>(shapes.size()) * hidden;
    LstmTile<T> tile{};
    in_.clear();
    for (const LayerShape& shape : shapes) in_.push_back(take(shape.rows()));
    tile.in = in_.data();
    T* cells = take(states);
    tile.cells = {cells, kTile};
    tile.new_cells = {cells, kTile};
    tile.top = take(hidden);
    tile.pairs = take(hidden);
    if (for_backward) {
      d_in_.clear();
      for (const LayerShape& shape : shapes) d_in_.push_back(take(shape.inputs));
      tile.d_in = d_in_.data();
      tile.new_cells = {take(states), kTile};
      tile.gates = take(4 * states);
      tile.squashed = take(states);
      tile.d_h = {take(states), kTile};
      tile.d_c = {take(states), kTile};
      tile.d_new_h = {tile.d_h.first, kTile};
      tile.d_new_c = {tile.d_c.first, kTile};
      tile.d_out = take(hidden);
      tile.columns = take(widest(shapes));
    }
    return tile;
  }

 private:
  static int64_t widest(const std::vector<LayerShape>& shapes) {
    int64_t columns = 0;
    for (const LayerShape& shape : shapes) columns = std::max<int64_t>(columns, shape.columns());
    return columns;
  }

  std::vector<T> storage_;
  std::vector<T*> in_, d_in_;
  T* next_ = nullptr;
};

// An LSTM's state in memory: h, c and their successors, (layers, hidden) rows that are `numel` apart;
// as codes (layers, hidden + 1).
struct LstmState {
  Storage storage;
  int64_t numel;
  const void *h, *c;
  void *new_h, *new_c;       // null in the backward pass
  bool stochastic = false;   // how what is narrow is rounded, with bits that grow from the key
  uint32_t key = 0;
};

// Whole rows of c, and of the new state, need no copy: the inner loops use each once.
template <typename T>
bool stays_in_memory(const LstmState& state, const Piece& piece) {
  return state.storage == storage_of<T>() && piece.count == kTile;
}

// A tile's rows from coordinate `start` on.
inline Ahead ahead(Storage storage, const void* first, const void* second, int64_t start,
                   int64_t numel) {
  const int64_t size = size_of(storage);
  return {static_cast<const char*>(first) + start * size,
          static_cast<const char*>(second) + start * size, numel * size,
          std::min<int64_t>(kTile, numel - start) * size};
}

// Where a layer's rows of codes begin, from a piece's first coordinate on.
inline int64_t codes_at(const LstmState& state, const Piece& piece, int layer, int hidden) {
  return int64_t(layer) * (hidden + 1) * state.numel + piece.start;
}

inline void load_coded_state(const std::vector<LayerShape>& shapes, const LstmState& state,
                             const Piece& piece, LstmTile<float>& tile) {
  const CodeKernels kernels = AMALGAM_DISPATCH(code_kernels);
  const int layers = static_cast<int>(shapes.size()), hidden = shapes[0].hidden;
  const CodedRows rows{hidden, piece.count, kTile, state.numel};
  for (int layer = 0; layer < layers; ++layer) {
    const int64_t at = codes_at(state, piece, layer, hidden);
    float* h = tile.in[layer] + shapes[layer].inputs * kTile + piece.place;
    float* c = const_cast<float*>(tile.cells[layer * hidden]) + piece.place;
    kernels.load(rows, static_cast<const int8_t*>(state.h) + at, h);
    kernels.load(rows, static_cast<const int8_t*>(state.c) + at, c);
  }
}

inline void store_coded_state(const std::vector<LayerShape>& shapes, const LstmTile<float>& tile,
                              const Piece& piece, const LstmState& state) {
  const CodeKernels kernels = AMALGAM_DISPATCH(code_kernels);
  const int layers = static_cast<int>(shapes.size()), hidden = shapes[0].hidden;
  const CodedRows rows{hidden, piece.count, kTile, state.numel};
  for (int layer = 0; layer < layers; ++layer) {
    const int64_t at = codes_at(state, piece, layer, hidden);
    const float* h = layer + 1 < layers ? tile.in[layer + 1] : tile.top;
    const float* c = tile.new_cells[layer * hidden];
    CodeRounding how{state.stochastic, state.key, layer * hidden, piece.start, 16};
    kernels.store(rows, how, h + piece.place, static_cast<int8_t*>(state.new_h) + at);
    how.shift = 0;
    kernels.store(rows, how, c + piece.place, static_cast<int8_t*>(state.new_c) + at);
  }
}

template <typename T>
void load_state(const std::vector<LayerShape>& shapes, const LstmState& state, const Piece& piece,
                LstmTile<T>& tile, bool h_may_stay = false) {
  const int hidden = shapes[0].hidden, rows = static_cast<int>(shapes.size()) * hidden;
  const int64_t numel = state.numel, start = piece.start;
  const bool h_stays = h_may_stay && stays_in_memory<T>(state, piece);
  const int64_t next = start + piece.count;
  if (next < numel) tile.ahead[0] = ahead(state.storage, state.h, state.c, next, numel);
  if constexpr (std::is_same_v<T, float>) {
    if (state.storage == Storage::int8) return load_coded_state(shapes, state, piece, tile);
  }
  if (h_stays) tile.h = {static_cast<const T*>(state.h) + start, numel};
  for (int row = 0; row < (h_stays ? 0 : rows); ++row) {
    T* to = tile.in[row / hidden] + (shapes[row / hidden].inputs + row % hidden) * kTile;
    load_row(state.storage, state.h, row * numel + start, piece.count, to + piece.place);
  }
  if (stays_in_memory<T>(state, piece)) {
    tile.cells = {static_cast<const T*>(state.c) + start, numel};
    if (state.new_c) {
      tile.new_cells = {static_cast<T*>(state.new_c) + start, numel};
      tile.new_h = {static_cast<T*>(state.new_h) + start, numel};
    }
  } else {
    T* cells = const_cast<T*>(tile.cells.first);
    for (int row = 0; row < rows; ++row) {
      load_row(state.storage, state.c, row * numel + start, piece.count,
               cells + row * kTile + piece.place);
    }
  }
}

// The new state of a piece, where the inner loops have not written it.
template <typename T>
void store_state(const std::vector<LayerShape>& shapes, const LstmTile<T>& tile,
                 const Piece& piece, const LstmState& state) {
  if (stays_in_memory<T>(state, piece)) return;
  if constexpr (std::is_same_v<T, float>) {
    if (state.storage == Storage::int8) return store_coded_state(shapes, tile, piece, state);
  }
  const int layers = static_cast<int>(shapes.size()), hidden = shapes[0].hidden;
  for (int row = 0; row < layers * hidden; ++row) {
    const int layer = row / hidden, unit = row % hidden;
    const T* h = (layer + 1 < layers ? tile.in[layer + 1] : tile.top) + unit * kTile;
    const T* c = tile.new_cells[row] + piece.place;
    const Rounding how{state.storage, state.stochastic, state.key, row};
    const int64_t to = row * state.numel;
    store_rounded(how, Half::upper, h + piece.place, piece.count, state.new_h, to, piece.start);
    store_rounded(how, Half::lower, c, piece.count, state.new_c, to, piece.start);
  }
}

// Coordinates after the last one hold zeros, whose step is finite and whose gradients vanish.
template <typename T>
void clear_state_after(int64_t count, const std::vector<LayerShape>& shapes,
                       const LstmTile<T>& tile) {
  const int64_t layers = static_cast<int64_t>(shapes.size()), hidden = shapes[0].hidden;
  for (int64_t layer = 0; layer < layers; ++layer) {
    clear_after(count, hidden, tile.in[layer] + shapes[layer].inputs * kTile);
  }
  if (count < kTile) clear_after(count, layers * hidden, const_cast<T*>(tile.cells.first));
}

// Gradients in an LSTM's state in memory: in the new one, and in the old one.
template <typename T>
struct LstmGradients {
  int64_t numel;
  const T *d_new_h, *d_new_c;
  T *d_h, *d_c;
};

template <typename T>
void load_gradients(const std::vector<LayerShape>& shapes, const LstmGradients<T>& gradients,
                    const Piece& piece, LstmTile<T>& tile) {
  const int64_t states = static_cast<int64_t>(shapes.size()) * shapes[0].hidden;
  const int64_t numel = gradients.numel, start = piece.start;
  if (piece.count == kTile) {
    tile.d_new_h = {gradients.d_new_h + start, numel};
    tile.d_new_c = {gradients.d_new_c + start, numel};
    tile.d_h = {gradients.d_h + start, numel};
    tile.d_c = {gradients.d_c + start, numel};
    tile.ahead[1] = ahead(storage_of<T>(), gradients.d_new_h, gradients.d_new_c, start, numel);
    return;
  }
  copy_in(gradients.d_new_h, numel, states, piece, tile.d_h.first);
  copy_in(gradients.d_new_c, numel, states, piece, tile.d_c.first);
  for (T* rows : {tile.d_h.first, tile.d_c.first}) clear_after(piece.count, states, rows);
}

template <typename T>
void store_gradients(const std::vector<LayerShape>& shapes, const LstmTile<T>& tile,
                     const Piece& piece, const LstmGradients<T>& gradients) {
  if (piece.count == kTile) return;
  const int64_t states = static_cast<int64_t>(shapes.size()) * shapes[0].hidden;
  copy_out(tile.d_h.first, states, piece, gradients.d_h, gradients.numel);
  copy_out(tile.d_c.first, states, piece, gradients.d_c, gradients.numel);
}

// How many of so many tiles are summed together. It does not depend on the threads, so the sums' bits
// don't either.
inline int64_t tiles_a_sum(int64_t tiles, int64_t least = kTilesASum) {
  return std::max(least, (tiles + kMostSums - 1) / kMostSums);
}

// Runs body(tile, sums) for each tile and gives the `size` sums that they add to.
template <typename Body>
std::vector<double> sum_over_tiles(int64_t tiles, int64_t size, int threads, const Body& body,
                                   int64_t least_tiles_a_sum = kTilesASum) {
  const int64_t together = tiles_a_sum(tiles, least_tiles_a_sum);
  const int64_t count = (tiles + together - 1) / together;
  std::vector<double> sums(count * size);
  for_each_block(count, worthwhile_threads(count, 1, threads), [&](int64_t index) {
    const int64_t stop = std::min(tiles, (index + 1) * together);
    for (int64_t tile = index * together; tile < stop; ++tile) {
      body(tile, sums.data() + index * size);
    }
  });
  std::vector<double> total(size);
  for (int64_t index = 0; index < count; ++index) {
    for (int64_t i = 0; i < size; ++i) total[i] += sums[index * size + i];
  }
  return total;
}

}  // namespace amalgam::cpu
