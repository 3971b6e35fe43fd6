#include "student_step.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "lstm_pairs.h"
#include "parallel.h"
#include "rounding.h"
#include "storage.h"
#include "student_binding.h"
#include "student_network.h"
#include "student_small.h"
#include "tiles.h"
#include "tiling.h"

namespace amalgam::cpu {
namespace {

// A tile in this thread's workspace.
template <typename T>
StudentTile<T> tile_for(const std::vector<LayerShape>& shapes, int64_t slopes) {
  Workspace<T>& rows = Workspace<T>::of_this_thread();
  const bool for_backward = slopes > 0;
  rows.start(Workspace<T>::lstm_rows(shapes, for_backward) + (for_backward ? 7 + slopes : 4));
  StudentTile<T> tile{};
  for (T** row : {&tile.grad, &tile.m, &tile.v}) *row = rows.take(1);
  tile.update = rows.take(for_backward ? slopes : 1);
  tile.lstm = rows.take_lstm(shapes, for_backward);
  if (for_backward) {
    for (T** row : {&tile.d_update, &tile.d_m, &tile.d_v, &tile.d_grad}) *row = rows.take(1);
  }
  return tile;
}

template <typename T>
void clear_tile_after(int64_t count, const std::vector<LayerShape>& shapes,
                      const StudentTile<T>& tile) {
  clear_after(count, 1, tile.m);
  // Not zeros: with eps = 0 their features would be NaN, and so would the weights' gradients; with
  // beta2 = 0 the new v is the gradient's alone.
  for (T* row : {tile.grad, tile.v}) fill_after(count, 1, T(1), row);
  clear_state_after(count, shapes, tile.lstm);
}

}  // namespace

template <typename T>
void student_step(const Student<T>& student, const StudentStep& step, const StudentTensor* tensors,
                  int64_t count, int threads) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (is_small(student, step)) return small_student_step(student, step, tensors, count, threads);
  }
  const PackedStudent<T> packed(student, false);
  StudentNetwork<T> network = packed.network();
  std::optional<PairedLstm> pairs;
  if constexpr (std::is_same_v<T, float>) {
    // Pairs have the first layer's bias among their weights, where the nominal form's is not.
    if (step.bfloat16 && !student.nominal && multiplies_bfloat16()) {
      network.lstm = pairs.emplace(network.lstm, step.approximate).network();
    }
  }
  std::vector<int64_t> sizes(count);
  for (int64_t i = 0; i < count; ++i) sizes[i] = tensors[i].numel;
  const Tiling tiling(std::move(sizes), student.nominal);
  const T keep = static_cast<T>(step.keep), lr = static_cast<T>(step.lr);
  const int64_t rows = int64_t(student.layers) * student.hidden;

  const auto state_of = [&](const StudentTensor& tensor) {
    return LstmState{step.cells,   tensor.stride,   tensor.h,  tensor.c, tensor.new_h,
                     tensor.new_c, step.stochastic, static_cast<uint32_t>(tensor.key)};
  };
  const auto run_tile = [&](int64_t index) {
    StudentTile<T> tile = tile_for<T>(packed.shapes(), 0);
    int64_t filled = 0;
    tiling.for_each_piece(index, 1, [&](const Piece& piece) {
      const StudentTensor& tensor = tensors[piece.tensor];
      packed.of_tensor(tensor.index, tile);
      load_row(step.grad, tensor.grad, piece.start, piece.count, tile.grad + piece.place);
      load_row(step.moments, tensor.m, piece.start, piece.count, tile.m + piece.place);
      load_row(step.moments, tensor.v, piece.start, piece.count, tile.v + piece.place);
      load_state(packed.shapes(), state_of(tensor), piece, tile.lstm,
                 network.lstm.forward != nullptr);
      filled = piece.place + piece.count;
    });
    clear_tile_after(filled, packed.shapes(), tile);
    packed.kernels.forward(network, tile);
    tiling.for_each_piece(index, 1, [&](const Piece& piece) {
      const StudentTensor& tensor = tensors[piece.tensor];
      const auto put = [&](Storage storage, int64_t row, Half half, const T* from, void* to) {
        const Rounding how{storage, step.stochastic, static_cast<uint32_t>(tensor.key), row};
        store_rounded(how, half, from, piece.count, to, 0, piece.start);
      };
      put(step.moments, rows + 1, Half::upper, tile.m + piece.place, tensor.new_m);
      put(step.moments, rows + 1, Half::lower, tile.v + piece.place, tensor.new_v);
      store_state(packed.shapes(), tile.lstm, piece, state_of(tensor));
      T moved[kTile];
      const T* values = tile.update + piece.place;
      if (step.in_place) {
        load_row(step.out, tensor.out, piece.start, piece.count, moved);
        for (int64_t n = 0; n < piece.count; ++n) {
          const bool still = !student.nominal && tile.v[piece.place + n] == 0;
          moved[n] = keep * moved[n] - lr * (still ? T(0) : values[n]);
        }
        values = moved;
      }
      put(step.out, rows, Half::upper, values, tensor.out);
    });
  };
  const int64_t tiles = tiling.tiles();
  for_each_block(tiles, worthwhile_threads(tiles, kGrain, threads), run_tile);
}

template <typename T>
void student_step_backward(const Student<T>& student, const int64_t* sizes, const T* grad,
                           const StudentState<const T>& state, const T* d_update,
                           const StudentState<const T>& d_new, T* d_grad,
                           const StudentState<T>& d_state, T* const* d_weights, int threads) {
  const PackedStudent<T> packed(student, true);
  const StudentNetwork<T> network = packed.network();
  const std::vector<LayerShape>& shapes = packed.shapes();
  const int64_t n = std::accumulate(sizes, sizes + student.tensors, int64_t(0));
  const Tiling tiling({sizes, sizes + student.tensors}, true);
  BiasSums<T> bias_sums(packed, tiling, student.nominal ? student.tensors : 0, 1,
                        tiles_a_sum(tiling.tiles()));

  const LstmState cells{storage_of<T>(), n, state.h, state.c, nullptr, nullptr};
  const LstmGradients<T> gradients{n, d_new.h, d_new.c, d_state.h, d_state.c};
  const auto run_tile = [&](int64_t index, double* sums) {
    StudentTile<T> tile = tile_for<T>(shapes, student.form().slopes);
    const Piece piece = tiling.only_piece(index);
    packed.of_tensor(piece.tensor, tile);
    copy_in(grad, n, 1, piece, tile.grad);
    copy_in(state.m, n, 1, piece, tile.m);
    copy_in(state.v, n, 1, piece, tile.v);
    load_state(shapes, cells, piece, tile.lstm);
    clear_tile_after(piece.count, shapes, tile);
    copy_in(d_update, n, 1, piece, tile.d_update);
    copy_in(d_new.m, n, 1, piece, tile.d_m);
    copy_in(d_new.v, n, 1, piece, tile.d_v);
    for (T* row : {tile.d_update, tile.d_m, tile.d_v}) clear_after(piece.count, 1, row);
    load_gradients(shapes, gradients, piece, tile.lstm);

    packed.kernels.backward(network, tile, sums);
    if (student.nominal) bias_sums.take(index, piece.tensor, 0, sums);

    copy_out(tile.d_grad, 1, piece, d_grad, n);
    copy_out(tile.d_m, 1, piece, d_state.m, n);
    copy_out(tile.d_v, 1, piece, d_state.v, n);
    store_gradients(shapes, tile.lstm, piece, gradients);
  };
  const std::vector<double> sums =
      sum_over_tiles(tiling.tiles(), packed.gradient_size(), threads, run_tile);
  packed.unpack_gradients(sums.data(), d_weights);
  if (student.nominal) bias_sums.unpack(d_weights[2]);
}

namespace {

Storage storage(const std::string& dtype) {
  if (dtype == "float32") return Storage::float32;
  if (dtype == "float64") return Storage::float64;
  if (dtype == "bfloat16") return Storage::bfloat16;
  if (dtype == "float16") return Storage::float16;
  if (dtype == "int8") return Storage::int8;
  throw std::invalid_argument("no storage is called " + dtype);
}

template <typename T>
void bind_student_step(py::module_& module, const std::string& dtype) {
  using namespace py::literals;
  module.def(
      ("student_step_" + dtype).c_str(),
      [](Address tensors, int64_t count, const StudentAddresses& student, const std::string& grad,
         const std::string& moments, const std::string& cells, const std::string& out,
         bool in_place, double keep, double lr, bool stochastic, int threads, bool bfloat16,
         bool approximate) {
        const StudentStep step{storage(grad), storage(moments), storage(cells), storage(out),
                               in_place,      keep,             lr,             stochastic,
                               bfloat16,      approximate};
        const GivenStudent<T> given(student);
        const py::gil_scoped_release release;
        student_step<T>(given.student(), step, at<const StudentTensor>(tensors), count, threads);
      },
      "tensors"_a, "count"_a, "student"_a, py::kw_only(), "grad"_a, "moments"_a, "cells"_a, "out"_a,
      "in_place"_a, "keep"_a, "lr"_a, "stochastic"_a, "threads"_a, "bfloat16"_a = false,
      "approximate"_a = false);
  module.def(
      ("student_step_backward_" + dtype).c_str(),
      [](Address d_update, const StateAddresses& d_new, Address grad, const StateAddresses& state,
         Address d_grad, const StateAddresses& d_state, const StudentAddresses& student,
         const std::vector<Address>& d_weights, const std::vector<int64_t>& sizes, int threads) {
        const GivenStudent<T> given(student);
        const std::vector<T*> to = all_at<T>(d_weights);
        const py::gil_scoped_release release;
        student_step_backward<T>(given.student(), sizes.data(), at<const T>(grad),
                                 student_state<const T>(state), at<const T>(d_update),
                                 student_state<const T>(d_new), at<T>(d_grad),
                                 student_state<T>(d_state), to.data(), threads);
      },
      "d_update"_a, "d_new"_a, "grad"_a, "state"_a, "d_grad"_a, "d_state"_a, "student"_a,
      "d_weights"_a, py::kw_only(), "sizes"_a, "threads"_a);
}

const Binding binding("cpu", [](py::module_& module) {
  module.attr("student_tensor_fields") = kStudentTensorFields;
  bind_student_step<float>(module, "float32");
  bind_student_step<double>(module, "float64");
});

}  // namespace
}  // namespace amalgam::cpu
