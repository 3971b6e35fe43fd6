#include "student_step.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "parallel.h"
#include "storage.h"

namespace amalgam::cpu {
namespace {

constexpr int kFeatures = 2;

// Tiles that make a thread worth waking: some 10 us each.
constexpr int64_t kGrain = 2;

// Tiles whose weight gradients are summed together, and the most sums that are then added up.
constexpr int64_t kTilesASum = 4;
constexpr int64_t kMostSums = 128;

// The weights as the inner loops want them.
template <typename T>
class Packed {
 public:
  Packed(int layers, int hidden, const StudentConstants& constants, const T* const* weights,
         bool for_backward) {
    int64_t size = 0;
    for (int layer = 0; layer < layers; ++layer) {
      shapes_.push_back({layer ? hidden : kFeatures, hidden});
      size += shapes_[layer].by_unit_size() + (for_backward ? shapes_[layer].by_input_size() : 0);
    }
    storage_.resize(size);
    T* to = storage_.data();
    for (int layer = 0; layer < layers; ++layer) {
      by_unit_.push_back(to);
      to = pack_by_unit(shapes_[layer], weights + 3 * layer, to);
      by_input_.push_back(to);
      if (for_backward) to = pack_by_input(shapes_[layer], weights + 3 * layer, to);
    }
    network = {layers,
               shapes_.data(),
               by_unit_.data(),
               by_input_.data(),
               weights[3 * layers],
               weights[3 * layers + 1][0],
               static_cast<T>(constants.alpha),
               static_cast<T>(constants.beta1),
               static_cast<T>(constants.beta2),
               static_cast<T>(constants.eps),
               static_cast<T>(1 - constants.beta1),
               static_cast<T>(1 - constants.beta2)};
  }
  Packed(const Packed&) = delete;

  const std::vector<LayerShape>& shapes() const { return shapes_; }

  StudentNetwork<T> network;

 private:
  // The weight of a gate (0 to 3) of a unit on a row of `in`.
  static T weight(const LayerShape& shape, const T* const* weights, int gate, int unit, int row) {
    const int64_t output = int64_t(gate) * shape.hidden + unit;
    return row < shape.inputs ? weights[0][output * shape.inputs + row]
                              : weights[1][output * shape.hidden + row - shape.inputs];
  }

  static T* pack_by_unit(const LayerShape& shape, const T* const* weights, T* to) {
    for (int unit = 0; unit < shape.hidden; ++unit) {
      for (int gate = 0; gate < 4; ++gate) *to++ = weights[2][gate * shape.hidden + unit];
      for (int row = 0; row < shape.rows(); ++row) {
        for (int gate = 0; gate < 4; ++gate) *to++ = weight(shape, weights, gate, unit, row);
      }
    }
    return to;
  }

  static T* pack_by_input(const LayerShape& shape, const T* const* weights, T* to) {
    for (int first = 0; first < shape.rows(); first += kRowGroup) {
      for (int unit = 0; unit < shape.hidden; ++unit) {
        for (int gate = 0; gate < 4; ++gate) {
          for (int row = first; row < first + kRowGroup; ++row) {
            *to++ = row < shape.rows() ? weight(shape, weights, gate, unit, row) : T(0);
          }
        }
      }
    }
    return to;
  }

  std::vector<LayerShape> shapes_;
  std::vector<T> storage_;
  std::vector<const T*> by_unit_, by_input_;
};

// A thread's rows, kept from call to call.
template <typename T>
class Workspace {
 public:
  // The tile, its rows laid out for these layers.
  const StudentTile<T>& tile(const std::vector<LayerShape>& shapes, bool for_backward) {
    const int64_t layers = static_cast<int64_t>(shapes.size()), hidden = shapes[0].hidden;
    int64_t in_rows = 0, columns = 0;
    for (const LayerShape& shape : shapes) {
      in_rows += shape.rows();
      columns = std::max<int64_t>(columns, shape.columns());
    }
    const int64_t states = layers * hidden;
    int64_t rows = 4 + in_rows + states + hidden;
    if (for_backward) rows += 4 + in_rows + states * 8 + hidden + columns;
    if (static_cast<int64_t>(storage_.size()) < rows * kTile) storage_.resize(rows * kTile);
    next_ = storage_.data();
    tile_.grad = take(1);
    tile_.m = take(1);
    tile_.v = take(1);
    tile_.update = take(1);
    in_.clear();
    for (const LayerShape& shape : shapes) in_.push_back(take(shape.rows()));
    tile_.in = in_.data();
    tile_.cells = take(states);
    tile_.top = take(hidden);
    if (for_backward) {
      tile_.d_update = take(1);
      tile_.d_m = take(1);
      tile_.d_v = take(1);
      tile_.d_grad = take(1);
      d_in_.clear();
      for (const LayerShape& shape : shapes) d_in_.push_back(take(shape.rows()));
      tile_.d_in = d_in_.data();
      tile_.old_cells = take(states);
      tile_.gates = take(4 * states);
      tile_.squashed = take(states);
      tile_.d_h = take(states);
      tile_.d_cells = take(states);
      tile_.d_out = take(hidden);
      tile_.columns = take(columns);
    }
    return tile_;
  }

  static Workspace& of_this_thread() {
    static thread_local Workspace workspace;
    return workspace;
  }

 private:
  T* take(int64_t rows) {
    T* taken = next_;
    next_ += rows * kTile;
    return taken;
  }

  StudentTile<T> tile_{};
  std::vector<T> storage_;
  std::vector<T*> in_, d_in_;
  T* next_ = nullptr;
};

// A part of a tile: `count` coordinates of one tensor.
struct Piece {
  int64_t tensor, start, count, place;
};

// Calls body(piece) for each piece of the tile that begins at coordinate `first` of all tensors.
template <typename Body>
void for_each_piece(const std::vector<int64_t>& ends, int64_t first, const Body& body) {
  const int64_t total = ends.empty() ? 0 : ends.back();
  const int64_t last = std::min(total, first + kTile);
  int64_t tensor = std::upper_bound(ends.begin(), ends.end(), first) - ends.begin();
  for (int64_t at = first; at < last;) {
    const int64_t begin = tensor ? ends[tensor - 1] : 0;
    const int64_t stop = std::min(last, ends[tensor]);
    if (stop > at) body(Piece{tensor, at - begin, stop - at, at - first});
    at = std::max(at, stop);
    ++tensor;
  }
}

// The state's rows of one layer: to and from unit `unit`, `numel` coordinates a row in memory.
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

// Coordinates after the last one hold zeros, whose step is finite and whose gradients vanish.
template <typename T>
void clear_after(int64_t count, int64_t rows, T* to) {
  if (count == kTile) return;
  for (int64_t row = 0; row < rows; ++row) {
    std::fill(to + row * kTile + count, to + (row + 1) * kTile, T(0));
  }
}

template <typename T>
void clear_tile_after(int64_t count, const StudentTile<T>& tile, int layers, int hidden) {
  for (T* row : {tile.grad, tile.m, tile.v}) clear_after(count, 1, row);
  for (int layer = 0; layer < layers; ++layer) {
    clear_after(count, hidden, tile.in[layer] + (layer ? hidden : kFeatures) * kTile);
  }
  clear_after(count, int64_t(layers) * hidden, tile.cells);
}

int64_t tiles_of(int64_t coordinates) { return (coordinates + kTile - 1) / kTile; }

}  // namespace

template <typename T>
void student_step(const StudentStep& step, const T* const* weights, const StudentTensor* tensors,
                  int64_t count, int threads) {
  const StudentKernels<T> kernels = AMALGAM_DISPATCH(student_kernels<T>);
  const int layers = step.layers, hidden = step.hidden;
  const Packed<T> packed(layers, hidden, step.constants, weights, false);
  std::vector<int64_t> ends(count);
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) ends[i] = total += tensors[i].numel;
  const T keep = static_cast<T>(1 - step.lr * step.weight_decay), lr = static_cast<T>(step.lr);

  const auto run_tile = [&](int64_t index) {
    const StudentTile<T>& tile = Workspace<T>::of_this_thread().tile(packed.shapes(), false);
    const int64_t first = index * kTile;
    for_each_piece(ends, first, [&](const Piece& piece) {
      const StudentTensor& tensor = tensors[piece.tensor];
      load_row(step.grad, tensor.grad, piece.start, piece.count, tile.grad + piece.place);
      copy_in(static_cast<const T*>(tensor.m), tensor.numel, 1, piece, tile.m);
      copy_in(static_cast<const T*>(tensor.v), tensor.numel, 1, piece, tile.v);
      for (int row = 0; row < layers * hidden; ++row) {
        const int layer = row / hidden, unit = row % hidden;
        T* h = tile.in[layer] + (packed.shapes()[layer].inputs + unit) * kTile;
        const int64_t from = row * tensor.numel + piece.start;
        load_row(step.cells, tensor.h, from, piece.count, h + piece.place);
        load_row(step.cells, tensor.c, from, piece.count, tile.cells + row * kTile + piece.place);
      }
    });
    clear_tile_after(std::min<int64_t>(kTile, total - first), tile, layers, hidden);
    kernels.forward(packed.network, tile);
    for_each_piece(ends, first, [&](const Piece& piece) {
      const StudentTensor& tensor = tensors[piece.tensor];
      copy_out(tile.m, 1, piece, static_cast<T*>(tensor.new_m), tensor.numel);
      copy_out(tile.v, 1, piece, static_cast<T*>(tensor.new_v), tensor.numel);
      for (int row = 0; row < layers * hidden; ++row) {
        const int layer = row / hidden, unit = row % hidden;
        const T* h = (layer + 1 < layers ? tile.in[layer + 1] : tile.top) + unit * kTile;
        const int64_t to = row * tensor.numel + piece.start;
        store_row(step.cells, h + piece.place, piece.count, tensor.new_h, to);
        store_row(step.cells, tile.cells + row * kTile + piece.place, piece.count, tensor.new_c, to);
      }
      T moved[kTile];
      const T* values = tile.update + piece.place;
      if (step.in_place) {
        load_row(step.out, tensor.out, piece.start, piece.count, moved);
        for (int64_t n = 0; n < piece.count; ++n) moved[n] = keep * moved[n] - lr * values[n];
        values = moved;
      }
      store_row(step.out, values, piece.count, tensor.out, piece.start);
    });
  };
  const int64_t tiles = tiles_of(total);
  for_each_block(tiles, worthwhile_threads(tiles, kGrain, threads), run_tile);
}

template <typename T>
void student_step_backward(int layers, int hidden, const StudentConstants& constants,
                           const T* const* weights, int64_t n, const T* grad, const T* m,
                           const T* v, const T* h, const T* c, const T* d_update,
                           const T* d_new_m, const T* d_new_v, const T* d_new_h, const T* d_new_c,
                           T* d_grad, T* d_m, T* d_v, T* d_h, T* d_c, T* const* d_weights,
                           int threads) {
  const StudentKernels<T> kernels = AMALGAM_DISPATCH(student_kernels<T>);
  const Packed<T> packed(layers, hidden, constants, weights, true);
  const std::vector<LayerShape>& shapes = packed.shapes();
  int64_t sums_size = hidden + 1;
  for (const LayerShape& shape : shapes) sums_size += shape.gradient_size();

  // The partition depends on n alone, so the sums' bits don't depend on the threads.
  const int64_t tiles = tiles_of(n);
  const int64_t tiles_a_sum = std::max(kTilesASum, (tiles + kMostSums - 1) / kMostSums);
  const int64_t count = (tiles + tiles_a_sum - 1) / tiles_a_sum;
  std::vector<double> sums(count * sums_size);

  for_each_block(count, worthwhile_threads(count, 1, threads), [&](int64_t index) {
    const StudentTile<T>& tile = Workspace<T>::of_this_thread().tile(shapes, true);
    const int64_t stop = std::min(tiles, (index + 1) * tiles_a_sum);
    for (int64_t each = index * tiles_a_sum; each < stop; ++each) {
      const int64_t first = each * kTile;
      const Piece piece{0, first, std::min<int64_t>(kTile, n - first), 0};
      copy_in(grad, n, 1, piece, tile.grad);
      copy_in(m, n, 1, piece, tile.m);
      copy_in(v, n, 1, piece, tile.v);
      for (int layer = 0; layer < layers; ++layer) {
        copy_in(h + layer * hidden * n, n, hidden, piece,
                tile.in[layer] + shapes[layer].inputs * kTile);
      }
      copy_in(c, n, layers * hidden, piece, tile.cells);
      copy_in(d_update, n, 1, piece, tile.d_update);
      copy_in(d_new_m, n, 1, piece, tile.d_m);
      copy_in(d_new_v, n, 1, piece, tile.d_v);
      copy_in(d_new_h, n, layers * hidden, piece, tile.d_h);
      copy_in(d_new_c, n, layers * hidden, piece, tile.d_cells);
      clear_tile_after(piece.count, tile, layers, hidden);
      for (T* row : {tile.d_update, tile.d_m, tile.d_v}) clear_after(piece.count, 1, row);
      for (T* rows : {tile.d_h, tile.d_cells}) clear_after(piece.count, layers * hidden, rows);
      std::copy_n(tile.cells, layers * hidden * kTile, tile.old_cells);

      kernels.backward(packed.network, tile, sums.data() + index * sums_size);

      copy_out(tile.d_grad, 1, piece, d_grad, n);
      copy_out(tile.d_m, 1, piece, d_m, n);
      copy_out(tile.d_v, 1, piece, d_v, n);
      for (int layer = 0; layer < layers; ++layer) {
        copy_out(tile.d_in[layer] + shapes[layer].inputs * kTile, hidden, piece,
                 d_h + layer * hidden * n, n);
      }
      copy_out(tile.d_cells, layers * hidden, piece, d_c, n);
    }
  });

  std::vector<double> total(sums_size);
  for (int64_t index = 0; index < count; ++index) {
    for (int64_t i = 0; i < sums_size; ++i) total[i] += sums[index * sums_size + i];
  }
  const double* from = total.data();
  for (int layer = 0; layer < layers; ++layer) {
    const LayerShape& shape = shapes[layer];
    for (int unit = 0; unit < hidden; ++unit) {
      for (int gate = 0; gate < 4; ++gate) {
        const int64_t output = int64_t(gate) * hidden + unit;
        for (int row = 0; row < shape.inputs; ++row) {
          d_weights[3 * layer][output * shape.inputs + row] = static_cast<T>(from[row]);
        }
        for (int row = 0; row < hidden; ++row) {
          d_weights[3 * layer + 1][output * hidden + row] =
              static_cast<T>(from[shape.inputs + row]);
        }
        d_weights[3 * layer + 2][output] = static_cast<T>(from[shape.rows()]);
        from += shape.columns();
      }
    }
  }
  for (int unit = 0; unit < hidden; ++unit) d_weights[3 * layers][unit] = static_cast<T>(from[unit]);
  d_weights[3 * layers + 1][0] = static_cast<T>(from[hidden]);
}

#define AMALGAM_INSTANTIATE(T)                                                                  \
  template void student_step(const StudentStep&, const T* const*, const StudentTensor*, int64_t, \
                             int);                                                              \
  template void student_step_backward(int, int, const StudentConstants&, const T* const*,       \
                                      int64_t, const T*, const T*, const T*, const T*, const T*, \
                                      const T*, const T*, const T*, const T*, const T*, T*, T*, \
                                      T*, T*, T*, T* const*, int);
AMALGAM_INSTANTIATE(float)
AMALGAM_INSTANTIATE(double)
#undef AMALGAM_INSTANTIATE

}  // namespace amalgam::cpu
