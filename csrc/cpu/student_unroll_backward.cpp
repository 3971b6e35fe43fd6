#include "student_unroll_backward.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "student_binding.h"
#include "student_network.h"
#include "tiles.h"
#include "tiling.h"

namespace amalgam::cpu {
namespace {

// Of a thread's tile. What was kept of more steps cost, from twice this on, as much as computing
// them twice: it leaves the core's share of the last cache. Of small calls, less: beside what they
// were given it would not be small.
constexpr int64_t kKeptBytes = 8 << 20, kLeastKeptBytes = 1 << 19, kGivenToKept = 4;

template <typename T>
int64_t kept_bytes(int64_t n, int64_t steps) {
  const int64_t given = 2 * n * steps * int64_t(sizeof(T));
  return std::clamp(given / kGivenToKept, kLeastKeptBytes, kKeptBytes);
}

// How a tile's steps are cut into segments. The backward pass needs more of a step than the state
// before it, and keeps that for one segment at a time; steps of a segment but the last are computed
// once more for it, from the state at its begin. So the last one is as long as may be kept.
struct Segments {
  int64_t steps, length, count;

  template <typename T>
  static Segments of(int64_t steps, int64_t bytes, int64_t rows_of_step, int64_t rows_of_state) {
    const int64_t kept = bytes / (rows_of_step * kTile * int64_t(sizeof(T)));
    // Of so many steps that the states of the segments' begins take more, what takes the least.
    const int64_t least = std::llround(std::sqrt(double(steps) * rows_of_state / rows_of_step));
    const int64_t length = std::clamp<int64_t>(std::max(kept, least), 1, steps);
    return {steps, length, (steps + length - 1) / length};
  }

  int64_t begin(int64_t segment) const {
    return std::max<int64_t>(0, steps - (count - segment) * length);
  }
};

// A tile's rows, in this thread's workspace.
template <typename T>
class Unroll {
 public:
  Unroll(const std::vector<LayerShape>& shapes, int slopes, int64_t n, int64_t steps)
      : shapes_(shapes),
        layers_(static_cast<int64_t>(shapes.size())),
        hidden_(shapes[0].hidden),
        states_(layers_ * hidden_) {
    int64_t inputs = 0, columns = 0;
    for (const LayerShape& shape : shapes) {
      inputs += shape.inputs;
      columns = std::max<int64_t>(columns, shape.columns());
    }
    // in, top, the old c, gates, tanh(c), the form's slopes.
    const int64_t rows_of_step =
        inputs + states_ + hidden_ + states_ + 4 * states_ + states_ + slopes;
    rows_of_state_ = 2 + 2 * states_;
    segments_ = Segments::of<T>(steps, kept_bytes<T>(n, steps), rows_of_step, rows_of_state_);

    Workspace<T>& rows = Workspace<T>::of_this_thread();
    rows.start(4 + 3 * states_ + inputs + hidden_ + columns + segments_.length * rows_of_step +
               (segments_.count - 1) * rows_of_state_);
    for (T** row : {&grad_, &m_, &v_, &d_update_}) *row = rows.take(1);
    d_h_ = rows.take(states_);
    d_c_ = rows.take(states_);
    for (const LayerShape& shape : shapes) d_in_.push_back(rows.take(shape.inputs));
    d_out_ = rows.take(hidden_);
    columns_ = rows.take(columns);
    checkpoints_ = rows.take((segments_.count - 1) * rows_of_state_);
    cells_ = rows.take((segments_.length + 1) * states_);
    for (int64_t slot = 0; slot < segments_.length; ++slot) {
      for (const LayerShape& shape : shapes) in_.push_back(rows.take(shape.rows()));
      tops_.push_back(rows.take(hidden_ + 5 * states_ + slopes));
    }
  }

  const Segments& segments() const { return segments_; }

  // The step of a slot.
  StudentTile<T> step(int64_t slot) {
    StudentTile<T> tile{};
    tile.grad = grad_;
    tile.m = m_;
    tile.v = v_;
    tile.d_update = d_update_;
    tile.lstm.in = in_.data() + slot * layers_;
    tile.lstm.top = tops_[slot];
    tile.lstm.gates = tile.lstm.top + hidden_ * kTile;
    tile.lstm.squashed = tile.lstm.gates + 4 * states_ * kTile;
    tile.update = tile.lstm.squashed + states_ * kTile;
    tile.lstm.cells = {cells(slot), kTile};
    tile.lstm.new_cells = {cells(slot + 1), kTile};
    tile.lstm.d_h = {d_h_, kTile};
    tile.lstm.d_c = {d_c_, kTile};
    tile.lstm.d_new_h = {d_h_, kTile};
    tile.lstm.d_new_c = {d_c_, kTile};
    tile.lstm.d_in = d_in_.data();
    tile.lstm.d_out = d_out_;
    tile.lstm.columns = columns_;
    return tile;
  }

  // The first slot's step, its new c in the place of the old one.
  StudentTile<T> passing_step() {
    StudentTile<T> tile = step(0);
    tile.lstm.new_cells = {cells(0), kTile};
    return tile;
  }

  // Makes the new h of a slot the old one of another, perhaps of itself.
  void hand_over(int64_t from, int64_t to) {
    for (int64_t layer = 0; layer < layers_; ++layer) {
      const T* h = layer + 1 < layers_ ? in_[from * layers_ + layer + 1] : tops_[from];
      copy(h, hidden_, old_h(to, layer));
    }
  }

  void load_first_state(const StudentState<const T>& state, int64_t n, const Piece& piece) {
    copy_in(state.m, n, 1, piece, m_);
    copy_in(state.v, n, 1, piece, v_);
    for (T* row : {m_, v_}) clear_after(piece.count, 1, row);
    for (int64_t layer = 0; layer < layers_; ++layer) {
      copy_in(state.h + layer * hidden_ * n, n, hidden_, piece, old_h(0, layer));
      clear_after(piece.count, hidden_, old_h(0, layer));
    }
    copy_in(state.c, n, states_, piece, cells(0));
    clear_after(piece.count, states_, cells(0));
  }

  void load_grad(const StepRows<T>& grads, int64_t step, const Piece& piece) {
    copy_in(grads.first + step * grads.stride, 0, 1, piece, grad_);
    // Not zeros: with eps = 0 the features could be NaN, and so could the weights' gradients.
    fill_after(piece.count, 1, T(1), grad_);
  }

  void load_adjoint(const StepRows<T>& adjoints, int64_t step, const Piece& piece) {
    copy_in(adjoints.first + step * adjoints.stride, 0, 1, piece, d_update_);
    clear_after(piece.count, 1, d_update_);
  }

  void save_state(int64_t segment) {
    T* to = checkpoints_ + (segment - 1) * rows_of_state_ * kTile;
    to = copy(m_, 1, to);
    to = copy(v_, 1, to);
    for (int64_t layer = 0; layer < layers_; ++layer) to = copy(old_h(0, layer), hidden_, to);
    copy(cells(0), states_, to);
  }

  void load_state(int64_t segment) {
    const T* from = checkpoints_ + (segment - 1) * rows_of_state_ * kTile;
    for (T* row : {m_, v_}) from = copy_next(from, 1, row);
    for (int64_t layer = 0; layer < layers_; ++layer) {
      from = copy_next(from, hidden_, old_h(0, layer));
    }
    copy(from, states_, cells(0));
  }

  void clear_state_gradients() {
    for (T* rows : {d_h_, d_c_}) std::fill(rows, rows + states_ * kTile, T(0));
  }

 private:
  // Returns where the copy ends.
  static T* copy(const T* from, int64_t rows, T* to) {
    std::memcpy(to, from, rows * kTile * sizeof(T));
    return to + rows * kTile;
  }
  // Returns where the copied rows end.
  static const T* copy_next(const T* from, int64_t rows, T* to) {
    copy(from, rows, to);
    return from + rows * kTile;
  }

  T* cells(int64_t slot) const { return cells_ + slot * states_ * kTile; }
  T* old_h(int64_t slot, int64_t layer) const {
    return in_[slot * layers_ + layer] + shapes_[layer].inputs * kTile;
  }

  const std::vector<LayerShape>& shapes_;
  const int64_t layers_, hidden_, states_;
  int64_t rows_of_state_;
  Segments segments_;
  T *grad_, *m_, *v_, *d_update_;
  T *d_h_, *d_c_, *d_out_, *columns_, *checkpoints_, *cells_;
  std::vector<T*> d_in_, in_, tops_;
};

}  // namespace

template <typename T>
void student_unroll_backward(const Student<T>& student, int64_t steps, const int64_t* sizes,
                             const StepRows<T>& grads, const StepRows<T>& adjoints,
                             const StudentState<const T>& state, T* const* d_weights, int threads) {
  const PackedStudent<T> packed(student, true);
  const StudentNetwork<T> network = packed.network();
  const StudentKernels<T>& kernels = packed.kernels;
  const int64_t n = std::accumulate(sizes, sizes + student.tensors, int64_t(0));
  const Tiling tiling({sizes, sizes + student.tensors}, true);
  // Four steps of one tile are the work of four tiles' one.
  const int64_t least_tiles_a_sum = std::max<int64_t>(1, kTilesASum / std::max<int64_t>(1, steps));
  const int64_t tiles = steps ? tiling.tiles() : 0;
  BiasSums<T> bias_sums(packed, tiling, student.nominal ? student.tensors : 0, steps,
                        tiles_a_sum(tiles, least_tiles_a_sum));

  const auto run_tile = [&](int64_t index, double* sums) {
    Unroll<T> tile(packed.shapes(), student.form().slopes, n, steps);
    const Segments& segments = tile.segments();
    const Piece piece = tiling.only_piece(index);
    const auto of_step = [&](StudentTile<T> rows, int64_t step) {
      packed.of_tensor(step * student.tensors + piece.tensor, rows);
      return rows;
    };
    tile.load_first_state(state, n, piece);
    for (int64_t segment = 1; segment < segments.count; ++segment) {
      for (int64_t step = segments.begin(segment - 1); step < segments.begin(segment); ++step) {
        tile.load_grad(grads, step, piece);
        kernels.forward(network, of_step(tile.passing_step(), step));
        tile.hand_over(0, 0);
      }
      tile.save_state(segment);
    }
    tile.clear_state_gradients();
    for (int64_t segment = segments.count - 1; segment >= 0; --segment) {
      if (segment) {
        tile.load_state(segment);
      } else if (segments.count > 1) {
        tile.load_first_state(state, n, piece);
      }
      const int64_t begin = segments.begin(segment), size = segments.begin(segment + 1) - begin;
      for (int64_t slot = 0; slot < size; ++slot) {
        tile.load_grad(grads, begin + slot, piece);
        kernels.keep(network, of_step(tile.step(slot), begin + slot));
        if (slot + 1 < size) tile.hand_over(slot, slot + 1);
      }
      for (int64_t slot = size - 1; slot >= 0; --slot) {
        tile.load_adjoint(adjoints, begin + slot, piece);
        kernels.gradients(network, of_step(tile.step(slot), begin + slot), sums);
        if (student.nominal) bias_sums.take(index, piece.tensor, begin + slot, sums);
      }
    }
  };
  const std::vector<double> sums =
      sum_over_tiles(tiles, packed.gradient_size(), threads, run_tile, least_tiles_a_sum);
  packed.unpack_gradients(sums.data(), d_weights);
  if (student.nominal && steps) bias_sums.unpack(d_weights[2]);
}

namespace {

template <typename T>
void bind_student_unroll_backward(py::module_& module, const std::string& dtype) {
  using namespace py::literals;
  module.def(
      ("student_unroll_backward_" + dtype).c_str(),
      [](Address grads, Address adjoints, const StateAddresses& state,
         const StudentAddresses& student, const std::vector<Address>& d_weights, int64_t steps,
         const std::vector<int64_t>& sizes, int64_t grads_stride, int64_t adjoints_stride,
         int threads) {
        const GivenStudent<T> given(student);
        const std::vector<T*> to = all_at<T>(d_weights);
        student_unroll_backward<T>(
            given.student(), steps, sizes.data(), {at<const T>(grads), grads_stride},
            {at<const T>(adjoints), adjoints_stride}, student_state<const T>(state), to.data(),
            threads);
      },
      "grads"_a, "adjoints"_a, "state"_a, "student"_a, "d_weights"_a, py::kw_only(), "steps"_a,
      "sizes"_a, "grads_stride"_a, "adjoints_stride"_a, "threads"_a, WithoutGil());
}

const Binding binding("cpu", [](py::module_& module) {
  bind_student_unroll_backward<float>(module, "float32");
  bind_student_unroll_backward<double>(module, "float64");
});

}  // namespace
}  // namespace amalgam::cpu
