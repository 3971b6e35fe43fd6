#include "student_step.h"

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "lstm_pairs.h"
#include "parallel.h"
#include "rounding.h"
#include "storage.h"
#include "student_binding.h"
#include "student_network.h"
#include "tiles.h"

namespace amalgam::cpu {
namespace {

// A tile in this thread's workspace.
template <typename T>
StudentTile<T> tile_for(const std::vector<LayerShape>& shapes, bool for_backward) {
  Workspace<T>& rows = Workspace<T>::of_this_thread();
  rows.start(Workspace<T>::lstm_rows(shapes, for_backward) + (for_backward ? 8 : 4));
  StudentTile<T> tile{};
  for (T** row : {&tile.grad, &tile.m, &tile.v, &tile.update}) *row = rows.take(1);
  tile.lstm = rows.take_lstm(shapes, for_backward);
  if (for_backward) {
    for (T** row : {&tile.d_update, &tile.d_m, &tile.d_v, &tile.d_grad}) *row = rows.take(1);
  }
  return tile;
}

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
void student_step(const StudentStep& step, const T* const* weights, const StudentTensor* tensors,
                  int64_t count, int threads) {
  const StudentKernels<T> kernels = AMALGAM_DISPATCH(student_kernels<T>);
  const int layers = step.layers, hidden = step.hidden;
  const PackedLstm<T> lstm(layers, hidden, kFeatures, weights, false);
  StudentNetwork<T> network = network_of(lstm, step.constants, weights + 3 * layers);
  std::optional<PairedLstm> pairs;
  if constexpr (std::is_same_v<T, float>) {
    if (step.bfloat16 && multiplies_bfloat16()) {
      network.lstm = pairs.emplace(network.lstm, step.approximate).network();
    }
  }
  std::vector<int64_t> ends(count);
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) ends[i] = total += tensors[i].numel;
  const T keep = static_cast<T>(step.keep), lr = static_cast<T>(step.lr);
  const int64_t rows = int64_t(layers) * hidden;

  const auto state_of = [&](const StudentTensor& tensor) {
    return LstmState{step.cells,   tensor.numel,    tensor.h,  tensor.c, tensor.new_h,
                     tensor.new_c, step.stochastic, static_cast<uint32_t>(tensor.key)};
  };
  const auto run_tile = [&](int64_t index) {
    StudentTile<T> tile = tile_for<T>(lstm.shapes(), false);
    const int64_t first = index * kTile;
    for_each_piece(ends, first, [&](const Piece& piece) {
      const StudentTensor& tensor = tensors[piece.tensor];
      load_row(step.grad, tensor.grad, piece.start, piece.count, tile.grad + piece.place);
      copy_in(static_cast<const T*>(tensor.m), tensor.numel, 1, piece, tile.m);
      copy_in(static_cast<const T*>(tensor.v), tensor.numel, 1, piece, tile.v);
      load_state(lstm.shapes(), state_of(tensor), piece, tile.lstm,
                 network.lstm.forward != nullptr);
    });
    clear_tile_after(std::min<int64_t>(kTile, total - first), lstm.shapes(), tile);
    kernels.forward(network, tile);
    for_each_piece(ends, first, [&](const Piece& piece) {
      const StudentTensor& tensor = tensors[piece.tensor];
      copy_out(tile.m, 1, piece, static_cast<T*>(tensor.new_m), tensor.numel);
      copy_out(tile.v, 1, piece, static_cast<T*>(tensor.new_v), tensor.numel);
      store_state(lstm.shapes(), tile.lstm, piece, state_of(tensor));
      T moved[kTile];
      const T* values = tile.update + piece.place;
      if (step.in_place) {
        load_row(step.out, tensor.out, piece.start, piece.count, moved);
        for (int64_t n = 0; n < piece.count; ++n) moved[n] = keep * moved[n] - lr * values[n];
        values = moved;
      }
      if (step.stochastic && step.out == Storage::bfloat16) {
        store_row_stochastically(RowOfBits(static_cast<uint32_t>(tensor.key), rows), Half::upper, values, piece.count,
                                 static_cast<uint16_t*>(tensor.out), piece.start);
      } else {
        store_row(step.out, values, piece.count, tensor.out, piece.start);
      }
    });
  };
  const int64_t tiles = tiles_of(total);
  for_each_block(tiles, worthwhile_threads(tiles, kGrain, threads), run_tile);
}

template <typename T>
void student_step_backward(int layers, int hidden, const StudentConstants& constants,
                           const T* const* weights, int64_t n, const T* grad,
                           const StudentState<const T>& state, const T* d_update,
                           const StudentState<const T>& d_new, T* d_grad,
                           const StudentState<T>& d_state, T* const* d_weights, int threads) {
  const StudentKernels<T> kernels = AMALGAM_DISPATCH(student_kernels<T>);
  const PackedLstm<T> lstm(layers, hidden, kFeatures, weights, true);
  const StudentNetwork<T> network = network_of(lstm, constants, weights + 3 * layers);
  const std::vector<LayerShape>& shapes = lstm.shapes();

  const LstmState cells{storage_of<T>(), n, state.h, state.c, nullptr, nullptr};
  const LstmGradients<T> gradients{n, d_new.h, d_new.c, d_state.h, d_state.c};
  const auto run_tile = [&](int64_t index, double* sums) {
    StudentTile<T> tile = tile_for<T>(shapes, true);
    const Piece piece = only_piece(index, n);
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

    kernels.backward(network, tile, sums);

    copy_out(tile.d_grad, 1, piece, d_grad, n);
    copy_out(tile.d_m, 1, piece, d_state.m, n);
    copy_out(tile.d_v, 1, piece, d_state.v, n);
    store_gradients(shapes, tile.lstm, piece, gradients);
  };
  const std::vector<double> sums = sum_over_tiles(n, gradient_size(lstm), threads, run_tile);
  unpack_gradients(lstm, sums.data(), d_weights);
}

namespace {

Storage storage(const std::string& dtype) {
  if (dtype == "float32") return Storage::float32;
  if (dtype == "float64") return Storage::float64;
  if (dtype == "bfloat16") return Storage::bfloat16;
  if (dtype == "float16") return Storage::float16;
  throw std::invalid_argument("no storage is called " + dtype);
}

template <typename T>
void bind_student_step(py::module_& module, const std::string& dtype) {
  using namespace py::literals;
  module.def(
      ("student_step_" + dtype).c_str(),
      [](Address tensors, int64_t count, const std::vector<Address>& weights, int layers,
         int hidden, const Constants& constants, const std::string& grad, const std::string& cells,
         const std::string& out, bool in_place, double keep, double lr, bool stochastic,
         int threads, bool bfloat16, bool approximate) {
        const StudentStep step{
            layers,         hidden,       student_constants(constants),
            storage(grad),  storage(cells), storage(out),
            in_place,       keep,         lr,
            stochastic,     bfloat16,     approximate};
        const std::vector<const T*> pointers = all_at<const T>(weights);
        const py::gil_scoped_release release;
        student_step<T>(step, pointers.data(),
                                      at<const StudentTensor>(tensors), count,
                                      threads);
      },
      "tensors"_a, "count"_a, "weights"_a, py::kw_only(), "layers"_a, "hidden"_a, "constants"_a,
      "grad"_a, "cells"_a, "out"_a, "in_place"_a, "keep"_a, "lr"_a, "stochastic"_a, "threads"_a,
      "bfloat16"_a = false, "approximate"_a = false);
  module.def(
      ("student_step_backward_" + dtype).c_str(),
      [](Address d_update, const StateAddresses& d_new, Address grad, const StateAddresses& state,
         Address d_grad, const StateAddresses& d_state, const std::vector<Address>& weights,
         const std::vector<Address>& d_weights, int64_t n, int layers, int hidden,
         const Constants& constants, int threads) {
        const std::vector<const T*> from = all_at<const T>(weights);
        const std::vector<T*> to = all_at<T>(d_weights);
        const py::gil_scoped_release release;
        student_step_backward<T>(
            layers, hidden, student_constants(constants), from.data(), n, at<const T>(grad),
            student_state<const T>(state), at<const T>(d_update), student_state<const T>(d_new),
            at<T>(d_grad), student_state<T>(d_state), to.data(), threads);
      },
      "d_update"_a, "d_new"_a, "grad"_a, "state"_a, "d_grad"_a, "d_state"_a, "weights"_a,
      "d_weights"_a, py::kw_only(), "n"_a, "layers"_a, "hidden"_a, "constants"_a, "threads"_a);
}

const Binding binding("cpu", [](py::module_& module) {
  module.attr("student_tensor_fields") = kStudentTensorFields;
  bind_student_step<float>(module, "float32");
  bind_student_step<double>(module, "float64");
});

}  // namespace
}  // namespace amalgam::cpu
