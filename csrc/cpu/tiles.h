// Tiles of coordinates between memory and rows, and sums over tiles; only for files compiled once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lstm_layout.h"
#include "parallel.h"

namespace amalgam::cpu {

// Tiles that make a thread worth waking: some 10 us each.
inline constexpr int64_t kGrain = 2;

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
    const int64_t rows = in_rows + states + hidden;
    return for_backward ? rows + in_rows + states * 8 + hidden + widest(shapes) : rows;
  }

  LstmTile<T> take_lstm(const std::vector<LayerShape>& shapes, bool for_backward) {
    const int64_t hidden = shapes[0].hidden, states = static_cast<int64_t>(shapes.size()) * hidden;
    LstmTile<T> tile{};
    in_.clear();
    for (const LayerShape& shape : shapes) in_.push_back(take(shape.rows()));
    tile.in = in_.data();
    tile.cells = take(states);
    tile.top = take(hidden);
    if (for_backward) {
      d_in_.clear();
      for (const LayerShape& shape : shapes) d_in_.push_back(take(shape.rows()));
      tile.d_in = d_in_.data();
      tile.old_cells = take(states);
      tile.gates = take(4 * states);
      tile.squashed = take(states);
      tile.d_h = take(states);
      tile.d_cells = take(states);
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

// The LSTM's state, h and c of (layers, hidden, numel), to and from a tile.
template <typename T>
void copy_state_in(const std::vector<LayerShape>& shapes, const T* h, const T* c, int64_t numel,
                   const Piece& piece, const LstmTile<T>& tile) {
  const int64_t layers = static_cast<int64_t>(shapes.size()), hidden = shapes[0].hidden;
  for (int64_t layer = 0; layer < layers; ++layer) {
    copy_in(h + layer * hidden * numel, numel, hidden, piece,
            tile.in[layer] + shapes[layer].inputs * kTile);
  }
  copy_in(c, numel, layers * hidden, piece, tile.cells);
}

template <typename T>
void copy_state_out(const std::vector<LayerShape>& shapes, const LstmTile<T>& tile,
                    const Piece& piece, T* h, T* c, int64_t numel) {
  const int64_t layers = static_cast<int64_t>(shapes.size()), hidden = shapes[0].hidden;
  for (int64_t layer = 0; layer < layers; ++layer) {
    const T* out = layer + 1 < layers ? tile.in[layer + 1] : tile.top;
    copy_out(out, hidden, piece, h + layer * hidden * numel, numel);
  }
  copy_out(tile.cells, layers * hidden, piece, c, numel);
}

// Coordinates after the last one hold zeros, whose step is finite and whose gradients vanish.
template <typename T>
void clear_state_after(int64_t count, const std::vector<LayerShape>& shapes,
                       const LstmTile<T>& tile) {
  const int64_t layers = static_cast<int64_t>(shapes.size()), hidden = shapes[0].hidden;
  for (int64_t layer = 0; layer < layers; ++layer) {
    clear_after(count, hidden, tile.in[layer] + shapes[layer].inputs * kTile);
  }
  clear_after(count, layers * hidden, tile.cells);
}

// What the backward pass needs beside: the gradients in the new state, and the old cells, which
// the step replaces.
template <typename T>
void copy_gradients_in(const std::vector<LayerShape>& shapes, const T* d_h, const T* d_c,
                       int64_t numel, const Piece& piece, const LstmTile<T>& tile) {
  const int64_t states = static_cast<int64_t>(shapes.size()) * shapes[0].hidden;
  copy_in(d_h, numel, states, piece, tile.d_h);
  copy_in(d_c, numel, states, piece, tile.d_cells);
  for (T* rows : {tile.d_h, tile.d_cells}) clear_after(piece.count, states, rows);
  std::copy_n(tile.cells, states * kTile, tile.old_cells);
}

template <typename T>
void copy_gradients_out(const std::vector<LayerShape>& shapes, const LstmTile<T>& tile,
                        const Piece& piece, T* d_h, T* d_c, int64_t numel) {
  const int64_t layers = static_cast<int64_t>(shapes.size()), hidden = shapes[0].hidden;
  for (int64_t layer = 0; layer < layers; ++layer) {
    copy_out(tile.d_in[layer] + shapes[layer].inputs * kTile, hidden, piece,
             d_h + layer * hidden * numel, numel);
  }
  copy_out(tile.d_cells, layers * hidden, piece, d_c, numel);
}

// Runs body(index, sums) for each tile of n coordinates and gives the `size` sums that they add to.
// The partition depends on n alone, so the sums' bits don't depend on the threads.
template <typename Body>
std::vector<double> sum_over_tiles(int64_t n, int64_t size, int threads, const Body& body) {
  const int64_t tiles = tiles_of(n);
  const int64_t tiles_a_sum = std::max(kTilesASum, (tiles + kMostSums - 1) / kMostSums);
  const int64_t count = (tiles + tiles_a_sum - 1) / tiles_a_sum;
  std::vector<double> sums(count * size);
  for_each_block(count, worthwhile_threads(count, 1, threads), [&](int64_t index) {
    const int64_t stop = std::min(tiles, (index + 1) * tiles_a_sum);
    for (int64_t tile = index * tiles_a_sum; tile < stop; ++tile) {
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
