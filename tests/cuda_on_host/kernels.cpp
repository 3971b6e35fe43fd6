// The kernels of csrc/cuda that take no tensor cores, as functions of numbers alone. Each returns what
// went wrong, or null.
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/choice_step.cu"
#include "../../csrc/cuda/runtime.cu"
#include "../../csrc/cuda/sign_agreement.cu"
#include "../../csrc/cuda/student_threads.cu"
#include "../../csrc/cuda/student_threads_launch.cuh"
#include "../../csrc/cuda/student_unroll.cu"
#include "../../csrc/cuda/student_unroll.cuh"
#include "../../csrc/cuda/teacher_distance.cu"
#include "../../csrc/cuda/teacher_step.cu"

namespace {

using namespace amalgam::cuda;

template <typename T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename Body>
const char* caught(const Body& body) {
  static std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

Stored stored(const std::string& dtype) {
  if (dtype == "bfloat16") return Stored::bfloat16;
  return dtype == "float16" ? Stored::float16 : Stored::float32;
}

template <typename T>
const char* forward(const int64_t* a, int64_t n, int64_t k, const TeacherSettings& settings) {
  return caught([&] {
    teacher_step(settings, at<const T>(a[0]), at<const T>(a[1]), at<const T>(a[2]), at<T>(a[3]),
                 at<T>(a[4]), at<T>(a[5]), n, k, 0, nullptr);
  });
}

template <typename T>
const char* backward(const int64_t* a, int64_t n, int64_t k, const TeacherSettings& settings) {
  return caught([&] {
    teacher_step_backward(settings, at<const T>(a[0]), at<const T>(a[1]), at<const T>(a[2]),
                          at<const T>(a[3]), at<const T>(a[4]), at<const T>(a[5]), at<T>(a[6]),
                          at<T>(a[7]), at<T>(a[8]), n, k, 0, nullptr);
  });
}

// Sizes are rows, the teachers' rows, n and k.
template <typename T>
const char* distances_of(const int64_t* a, const int64_t* sizes, double eps, double huber_delta) {
  return caught([&] {
    teacher_distance(at<const T>(a[0]), at<const T>(a[1]), at<T>(a[2]), at<T>(a[3]),
                     at<double>(a[4]), sizes[0], sizes[1], sizes[2], sizes[3], eps, huber_delta, 0,
                     nullptr);
  });
}

template <typename T>
const char* slopes_of(const int64_t* a, const int64_t* sizes, double eps, double huber_delta) {
  return caught([&] {
    teacher_distance_backward(at<const T>(a[0]), at<const T>(a[1]), at<const T>(a[2]),
                              at<const T>(a[3]), at<T>(a[4]), at<T>(a[5]), sizes[0], sizes[1],
                              sizes[2], sizes[3], eps, huber_delta, 0, nullptr);
  });
}

ChoiceCall choice_call(const int64_t* a, int64_t n, int64_t k, double time, double learning_rate) {
  return {at<float>(a[0]), at<float>(a[1]), at<int64_t>(a[2]), at<float>(a[3]),
          at<float>(a[4]), at<float>(a[5]), at<float>(a[6]),   n,
          static_cast<int>(k), static_cast<float>(time), static_cast<float>(learning_rate)};
}

ChoiceState choice_state(const int64_t* a) {
  return {at<float>(a[0]), at<float>(a[1]), at<float>(a[2]), at<float>(a[3])};
}

UnrollState state_at(const int64_t* a) {
  return {at<float>(a[0]), at<float>(a[1]), at<float>(a[2]), at<float>(a[3])};
}

UnrollSums sums_at(const int64_t* a, int64_t warps) {
  return {at<double>(a[0]), at<double>(a[1]), at<float>(a[2]), warps};
}

}  // namespace

extern "C" {

int64_t choice_size(int64_t index) {
  return index < static_cast<int64_t>(choice_sizes().size()) ? choice_sizes()[index] : 0;
}

int64_t choice_pool_of(int64_t teachers) { return choice_pool(static_cast<int>(teachers)); }

int64_t choice_sums_of(int64_t hidden, int64_t teachers) {
  return choice_sums(static_cast<int>(hidden), static_cast<int>(teachers));
}

int64_t choice_warps_of(int64_t hidden, int64_t teachers, int64_t n) {
  return choice_warps(static_cast<int>(hidden), static_cast<int>(teachers), n, 0);
}

// Of the addresses that a ChoiceCall begins with, in its order.
const char* choice_step_of(const int64_t* from, int64_t n, int64_t hidden, int64_t k,
                           const int* kinds, const double* lr, const double* beta1,
                           const double* beta2, const double* eps, double time,
                           double learning_rate, int64_t update, const int64_t* to,
                           int64_t mixture) {
  const ChoiceCall call = choice_call(from, n, k, time, learning_rate);
  return caught([&] {
    choice_step(call, {kinds, lr, beta1, beta2, eps}, hidden, at<float>(update),
                choice_state(to), at<float>(mixture), 0, nullptr);
  });
}

const char* choice_step_backward_of(const int64_t* from, int64_t n, int64_t hidden, int64_t k,
                                    const int* kinds, const double* lr, const double* beta1,
                                    const double* beta2, const double* eps, double time,
                                    double learning_rate, int64_t d_update,
                                    const int64_t* d_new, int64_t d_mixture, int64_t d_grad,
                                    const int64_t* d_old, int64_t sums, int64_t warps) {
  const ChoiceCall call = choice_call(from, n, k, time, learning_rate);
  return caught([&] {
    choice_step_backward(call, {kinds, lr, beta1, beta2, eps}, hidden, at<float>(d_update),
                         choice_state(d_new), at<float>(d_mixture), at<float>(d_grad),
                         choice_state(d_old), at<double>(sums), warps, 0, nullptr);
  });
}

const char* teacher_step_of(const char* dtype, int64_t is_backward, const int64_t* addresses,
                            int64_t n, int64_t k, const int* kinds, const double* lr,
                            const double* beta1, const double* beta2, const double* eps) {
  const TeacherSettings settings{kinds, lr, beta1, beta2, eps};
  if (dtype == std::string("float32")) {
    return (is_backward ? backward<float> : forward<float>)(addresses, n, k, settings);
  }
  return (is_backward ? backward<double> : forward<double>)(addresses, n, k, settings);
}

int64_t teacher_distance_partials_of(const char* dtype, int64_t n) {
  return dtype == std::string("float32") ? teacher_distance_partials<float>(n)
                                         : teacher_distance_partials<double>(n);
}

const char* teacher_distance_of(const char* dtype, int64_t is_backward, const int64_t* addresses,
                                const int64_t* sizes, double eps, double huber_delta) {
  if (dtype == std::string("float32")) {
    return (is_backward ? slopes_of<float> : distances_of<float>)(addresses, sizes, eps,
                                                                  huber_delta);
  }
  return (is_backward ? slopes_of<double> : distances_of<double>)(addresses, sizes, eps,
                                                                  huber_delta);
}

const char* sign_agreements_of(const int64_t* first, const int* first_formats,
                               const int64_t* second, const int* second_formats,
                               const int64_t* numels, int64_t count, int64_t found) {
  std::vector<SignPair> pairs;
  for (int64_t i = 0; i < count; ++i) {
    pairs.push_back({at<const void>(first[i]), at<const void>(second[i]), numels[i],
                     static_cast<Format>(first_formats[i]), static_cast<Format>(second_formats[i])});
  }
  return caught([&] { sign_agreements(pairs.data(), count, at<int64_t>(found), 0, nullptr); });
}

// The coordinates of a block, or 0.
int64_t student_block(int64_t nominal, int64_t layers, int64_t hidden) {
  for (const StudentSize& size : sizes_by_threads(nominal)) {
    if (size.layers == layers && size.hidden == hidden) return size.block;
  }
  return 0;
}

const char* student_step_in_place(
    int64_t weights, int64_t biases, int64_t corrections, int64_t places, int64_t table,
    int64_t first_block, int64_t control, int64_t count, int64_t blocks, int64_t nominal,
    int64_t layers, int64_t hidden, const double* constants, const char* param, const char* grad,
    const char* moments, const char* cells, double keep, double lr, int64_t warmup_steps,
    int64_t stochastic, int64_t approximate) {
  StudentCall call{};
  call.weights = at<const void>(weights);
  call.biases = at<const float>(biases);
  call.corrections = at<const float>(corrections);
  call.places = at<const int64_t>(places);
  call.table = at<const int64_t>(table);
  call.first_block = at<const int64_t>(first_block);
  call.control = at<const double>(control);
  call.blocks = blocks;
  call.count = static_cast<int>(count);
  call.warmup_steps = static_cast<int>(warmup_steps);
  call.param = stored(param);
  call.grad = stored(grad);
  call.stochastic = stochastic;
  call.keep = static_cast<float>(keep);
  call.lr = static_cast<float>(lr);
  set_constants(call, constants[0], constants[1], constants[2], constants[3]);
  const StudentKind kind{nominal != 0,
                         static_cast<int>(layers),
                         static_cast<int>(hidden),
                         stored(moments),
                         stored(cells),
                         false,
                         Products::kSplit,
                         approximate != 0};
  return caught([&] { step_by_threads(call, kind, nullptr); });
}

int64_t unroll_size(int64_t index) {
  return index < static_cast<int64_t>(unroll_sizes().size()) ? unroll_sizes()[index] : 0;
}

int64_t unroll_sums_of(int64_t hidden) { return unroll_sums(static_cast<int>(hidden)); }

int64_t unroll_warps_of(int64_t hidden, int64_t tiles) {
  return unroll_warps(static_cast<int>(hidden), tiles, 0);
}

// Lives until the process ends, as few are made.
const UnrollCall* unroll_call(int64_t weights, int64_t biases, int64_t corrections, int64_t bounds,
                              int64_t grads, int64_t adjoints, int64_t grads_stride,
                              int64_t adjoints_stride, const int64_t* state, int64_t n,
                              int64_t tiles, int64_t tensors, int64_t steps,
                              int64_t students, const double* constants) {
  auto* call = new UnrollCall{};
  call->weights = at<const float>(weights);
  call->biases = at<const float>(biases);
  call->corrections = at<const float>(corrections);
  call->bounds = at<const int64_t>(bounds);
  call->grads = at<const float>(grads);
  call->adjoints = at<const float>(adjoints);
  call->grads_stride = grads_stride;
  call->adjoints_stride = adjoints_stride;
  call->m = at<const float>(state[0]);
  call->v = at<const float>(state[1]);
  call->h = at<const float>(state[2]);
  call->c = at<const float>(state[3]);
  call->n = n;
  call->tiles = tiles;
  call->tensors = static_cast<int>(tensors);
  call->steps = static_cast<int>(steps);
  call->students = static_cast<int>(students);
  set_constants(*call, constants[0], constants[1], constants[2], constants[3]);
  return call;
}

const char* nominal_step_of(const UnrollCall* call, int64_t hidden, int64_t update,
                            const int64_t* to) {
  return caught(
      [&] { nominal_step(*call, hidden, at<float>(update), state_at(to), 0, nullptr); });
}

const char* nominal_step_backward_of(const UnrollCall* call, int64_t hidden, const int64_t* d_new,
                                     int64_t d_grad, const int64_t* d_state, const int64_t* sums,
                                     int64_t warps, const int64_t* found) {
  return caught([&] {
    nominal_step_backward(*call, hidden, state_at(d_new), at<float>(d_grad), state_at(d_state),
                          sums_at(sums, warps), at<float>(found[0]), at<float>(found[1]), 0,
                          nullptr);
  });
}

const char* nominal_unroll_backward_of(const UnrollCall* call, int64_t hidden, const int64_t* sums,
                                       int64_t warps, const int64_t* found) {
  return caught([&] {
    nominal_unroll_backward(*call, hidden, sums_at(sums, warps), at<float>(found[0]),
                            at<float>(found[1]), 0, nullptr);
  });
}

}  // extern "C"
