#include "choice_step.h"

#include <algorithm>
#include <vector>

#include "../binding.h"
#include "dispatch.h"
#include "lstm_weights.h"
#include "parallel.h"
#include "tiles.h"

namespace amalgam::cpu {
namespace {

constexpr int kRanks = 3;  // features that say whether the rank is 1, 2, 3

template <typename T>
class Packed {
 public:
  Packed(const ChoiceSettings& settings, const T* const* weights, bool for_backward)
      : lstm(settings.layers, settings.hidden, settings.teachers + 1 + kRanks, weights,
             for_backward),
        for_backward_(for_backward) {
    for (int k = 0; k < settings.teachers; ++k) {
      pool_.push_back(teacher_constants<T>(settings.pool, k));
    }
    const T* const* head = weights + 3 * settings.layers;
    network = {settings.teachers, pool_.data(), lstm.network(),
               head[0],           head[1],      static_cast<T>(settings.learning_rate)};
  }
  Packed(const Packed&) = delete;

  // A tile in this thread's workspace.
  ChoiceTile<T> tile() const {
    const int64_t k = network.teachers;
    Workspace<T>& rows = Workspace<T>::of_this_thread();
    rows.start(Workspace<T>::lstm_rows(lstm.shapes(), for_backward_) + 2 + 5 * k +
               (for_backward_ ? 2 + 4 * k : 0));
    ChoiceTile<T> tile{};
    for (T** row : {&tile.grad, &tile.update}) *row = rows.take(1);
    for (T** each : {&tile.m, &tile.v, &tile.new_m, &tile.new_v, &tile.mixture}) {
      *each = rows.take(k);
    }
    tile.lstm = rows.take_lstm(lstm.shapes(), for_backward_);
    if (for_backward_) {
      for (T** row : {&tile.d_grad, &tile.d_update}) *row = rows.take(1);
      for (T** each : {&tile.d_mixture, &tile.d_m, &tile.d_v, &tile.d_teachers}) {
        *each = rows.take(k);
      }
    }
    return tile;
  }

  const PackedLstm<T> lstm;
  ChoiceNetwork<T> network;

 private:
  bool for_backward_;
  std::vector<TeacherConstants<T>> pool_;
};

// The step's inputs, and all features but the teachers' updates.
template <typename T>
void load_tile(const Packed<T>& packed, T time, const T* grad, const int64_t* ranks,
               const ChoiceState<const T>& state, const LstmState& lstm_state, int64_t n,
               const Piece& piece, ChoiceTile<T>& tile) {
  const int64_t k = packed.network.teachers;
  copy_in(grad, n, 1, piece, tile.grad);
  copy_in(state.m, n, k, piece, tile.m);
  copy_in(state.v, n, k, piece, tile.v);
  load_state(packed.lstm.shapes(), lstm_state, piece, tile.lstm);
  T* features = tile.lstm.in[0] + k * kTile;
  std::fill_n(features, kTile, time);
  for (int rank = 1; rank <= kRanks; ++rank) {
    T* row = features + rank * kTile;
    for (int64_t at = 0; at < piece.count; ++at) row[at] = T(ranks[piece.start + at] == rank);
  }

  // Coordinates after the last one: of ones no teacher divides by zero, whatever its eps.
  fill_after(piece.count, 1, T(1), tile.grad);
  fill_after(piece.count, k, T(1), tile.v);
  clear_after(piece.count, k, tile.m);
  clear_after(piece.count, kRanks, features + kTile);
  clear_state_after(piece.count, packed.lstm.shapes(), tile.lstm);
}

}  // namespace

template <typename T>
void choice_step(const ChoiceSettings& settings, const T* const* weights, int64_t n, const T* grad,
                 const int64_t* ranks, const ChoiceState<const T>& old_state, T* update,
                 const ChoiceState<T>& new_state, T* mixture, int threads) {
  const ChoiceKernels<T> kernels = AMALGAM_DISPATCH(choice_kernels<T>);
  const Packed<T> packed(settings, weights, false);
  const int64_t k = settings.teachers, tiles = tiles_of(n);
  const T time = static_cast<T>(settings.time);
  const LstmState lstm_state{storage_of<T>(), n,           old_state.h,
                             old_state.c,     new_state.h, new_state.c};

  for_each_block(tiles, worthwhile_threads(tiles, kGrain, threads), [&](int64_t index) {
    ChoiceTile<T> tile = packed.tile();
    const Piece piece = only_piece(index, n);
    load_tile(packed, time, grad, ranks, old_state, lstm_state, n, piece, tile);

    kernels.forward(packed.network, tile);

    copy_out(tile.update, 1, piece, update, n);
    copy_out(tile.new_m, k, piece, new_state.m, n);
    copy_out(tile.new_v, k, piece, new_state.v, n);
    store_state(packed.lstm.shapes(), tile.lstm, piece, lstm_state);
    copy_out(tile.mixture, k, piece, mixture, n);
  });
}

template <typename T>
void choice_step_backward(const ChoiceSettings& settings, const T* const* weights, int64_t n,
                          const T* grad, const int64_t* ranks,
                          const ChoiceState<const T>& old_state, const T* d_update,
                          const ChoiceState<const T>& d_new_state, const T* d_mixture, T* d_grad,
                          const ChoiceState<T>& d_old_state, T* const* d_weights, int threads) {
  const ChoiceKernels<T> kernels = AMALGAM_DISPATCH(choice_kernels<T>);
  const Packed<T> packed(settings, weights, true);
  const std::vector<LayerShape>& shapes = packed.lstm.shapes();
  const int64_t k = settings.teachers, hidden = settings.hidden;
  const int64_t stride = columns_of(settings.hidden);
  const T time = static_cast<T>(settings.time);
  const LstmState lstm_state{storage_of<T>(), n, old_state.h, old_state.c, nullptr, nullptr};
  const LstmGradients<T> gradients{n, d_new_state.h, d_new_state.c, d_old_state.h,
                                   d_old_state.c};

  const auto run_tile = [&](int64_t index, double* sums) {
    ChoiceTile<T> tile = packed.tile();
    const Piece piece = only_piece(index, n);
    load_tile(packed, time, grad, ranks, old_state, lstm_state, n, piece, tile);
    copy_in(d_update, n, 1, piece, tile.d_update);
    clear_after(piece.count, 1, tile.d_update);
    copy_in(d_new_state.m, n, k, piece, tile.d_m);
    copy_in(d_new_state.v, n, k, piece, tile.d_v);
    copy_in(d_mixture, n, k, piece, tile.d_mixture);
    for (T* rows : {tile.d_m, tile.d_v, tile.d_mixture}) clear_after(piece.count, k, rows);
    load_gradients(shapes, gradients, piece, tile.lstm);

    kernels.backward(packed.network, tile, sums);

    copy_out(tile.d_grad, 1, piece, d_grad, n);
    copy_out(tile.d_m, k, piece, d_old_state.m, n);
    copy_out(tile.d_v, k, piece, d_old_state.v, n);
    store_gradients(shapes, tile.lstm, piece, gradients);
  };
  const int64_t size = packed.lstm.gradient_size() + k * stride;
  const std::vector<double> sums = sum_over_tiles(tiles_of(n), size, threads, run_tile);
  const double* of_head = packed.lstm.unpack_gradients(sums.data(), d_weights);
  T *d_head = d_weights[3 * settings.layers], *d_bias = d_weights[3 * settings.layers + 1];
  for (int64_t teacher = 0; teacher < k; ++teacher, of_head += stride) {
    for (int64_t unit = 0; unit < hidden; ++unit) {
      d_head[teacher * hidden + unit] = static_cast<T>(of_head[unit]);
    }
    d_bias[teacher] = static_cast<T>(of_head[hidden]);
  }
}

namespace {

// The teachers' settings, and all else but n, weights and threads.
struct ChoiceArguments {
  std::vector<int> kinds;
  std::vector<double> lr, beta1, beta2, eps;
  int layers, hidden;
  double time, learning_rate;

  ChoiceSettings settings() const {
    return {static_cast<int>(kinds.size()),
            layers,
            hidden,
            {kinds.data(), lr.data(), beta1.data(), beta2.data(), eps.data()},
            time,
            learning_rate};
  }
};

template <typename T>
ChoiceState<T> choice_state(const StateAddresses& addresses) {
  const auto [m, v, h, c] = addresses;
  return {at<T>(m), at<T>(v), at<T>(h), at<T>(c)};
}

template <typename T>
void bind_choice_step(py::module_& module, const std::string& dtype) {
  using namespace py::literals;
  using Ints = std::vector<int>;
  using Doubles = std::vector<double>;
  module.def(
      ("choice_step_" + dtype).c_str(),
      [](Address grad, const StateAddresses& state, Address ranks, Address update,
         const StateAddresses& new_state, Address mixture, const std::vector<Address>& weights,
         int64_t n, int layers, int hidden, const Ints& kinds, const Doubles& lr,
         const Doubles& beta1, const Doubles& beta2, const Doubles& eps, double time,
         double learning_rate, int threads) {
        const ChoiceArguments rest{kinds, lr, beta1, beta2, eps, layers, hidden, time,
                                   learning_rate};
        const std::vector<const T*> from = all_at<const T>(weights);
        choice_step<T>(rest.settings(), from.data(), n, at<const T>(grad),
                                     at<const int64_t>(ranks), choice_state<const T>(state),
                                     at<T>(update), choice_state<T>(new_state), at<T>(mixture),
                                     threads);
      },
      "grad"_a, "state"_a, "ranks"_a, "update"_a, "new_state"_a, "mixture"_a, "weights"_a,
      py::kw_only(), "n"_a, "layers"_a, "hidden"_a, "kinds"_a, "lr"_a, "beta1"_a, "beta2"_a,
      "eps"_a, "time"_a, "learning_rate"_a, "threads"_a, WithoutGil());
  module.def(
      ("choice_step_backward_" + dtype).c_str(),
      [](Address d_update, const StateAddresses& d_new, Address d_mixture, Address grad,
         const StateAddresses& state, Address ranks, Address d_grad, const StateAddresses& d_state,
         const std::vector<Address>& weights, const std::vector<Address>& d_weights, int64_t n,
         int layers, int hidden, const Ints& kinds, const Doubles& lr, const Doubles& beta1,
         const Doubles& beta2, const Doubles& eps, double time, double learning_rate,
         int threads) {
        const ChoiceArguments rest{kinds, lr, beta1, beta2, eps, layers, hidden, time,
                                   learning_rate};
        const std::vector<const T*> from = all_at<const T>(weights);
        const std::vector<T*> to = all_at<T>(d_weights);
        choice_step_backward<T>(
            rest.settings(), from.data(), n, at<const T>(grad), at<const int64_t>(ranks),
            choice_state<const T>(state), at<const T>(d_update), choice_state<const T>(d_new),
            at<const T>(d_mixture), at<T>(d_grad), choice_state<T>(d_state), to.data(), threads);
      },
      "d_update"_a, "d_new"_a, "d_mixture"_a, "grad"_a, "state"_a, "ranks"_a, "d_grad"_a,
      "d_state"_a, "weights"_a, "d_weights"_a, py::kw_only(), "n"_a, "layers"_a, "hidden"_a,
      "kinds"_a, "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "time"_a, "learning_rate"_a, "threads"_a,
      WithoutGil());
}

const Binding binding("cpu", [](py::module_& module) {
  bind_choice_step<float>(module, "float32");
  bind_choice_step<double>(module, "float64");
});

}  // namespace
}  // namespace amalgam::cpu
