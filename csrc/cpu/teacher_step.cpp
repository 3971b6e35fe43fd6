#include "teacher_step.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../binding.h"
#include "dispatch.h"
#include "parallel.h"

namespace amalgam::cpu {
namespace {

constexpr int64_t kBlock = 8192;

// Teachers' elements that make a thread worth waking: some 10 us.
constexpr int64_t kGrain = 1 << 14;

template <typename T>
std::vector<TeacherConstants<T>> constants_of(const TeacherSettings& settings, int64_t k) {
  std::vector<TeacherConstants<T>> constants(k);
  for (int64_t row = 0; row < k; ++row) constants[row] = teacher_constants<T>(settings, row);
  return constants;
}

// Runs body(row, start, count) over blocks of every row.
template <typename Body>
void for_each_part(int64_t n, int64_t k, int threads, const Body& body) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  for_each_block(blocks * k, worthwhile_threads(n * k, kGrain, threads), [&](int64_t part) {
    const int64_t start = part % blocks * kBlock;
    body(part / blocks, start, std::min(kBlock, n - start));
  });
}

}  // namespace

template <typename T>
TeacherConstants<T> teacher_constants(const TeacherSettings& settings, int64_t row) {
  const int kind = settings.kinds[row];
  const int known = AMALGAM_DISPATCH(teacher_step_kernels<T>).kinds;
  if (kind < 0 || kind >= known) {
    throw std::invalid_argument("kinds must be numbers below " + std::to_string(known) + ", not " +
                                std::to_string(kind));
  }
  return {kind,
          static_cast<T>(settings.lr[row]),
          static_cast<T>(settings.beta1[row]),
          static_cast<T>(settings.beta2[row]),
          static_cast<T>(settings.eps[row]),
          static_cast<T>(1 - settings.beta1[row]),
          static_cast<T>(1 - settings.beta2[row])};
}

template <typename T>
void teacher_step(const TeacherSettings& settings, const T* grads, const T* m, const T* v,
                  T* updates, T* new_m, T* new_v, int64_t n, int64_t k, int threads) {
  const TeacherStepKernels<T> kernels = AMALGAM_DISPATCH(teacher_step_kernels<T>);
  const std::vector<TeacherConstants<T>> constants = constants_of<T>(settings, k);
  for_each_part(n, k, threads, [&](int64_t row, int64_t start, int64_t count) {
    const int64_t at = row * n + start;
    kernels.step(constants[row], grads + at, m + at, v + at, updates + at, new_m + at, new_v + at,
                 count);
  });
}

template <typename T>
void teacher_step_backward(const TeacherSettings& settings, const T* d_updates, const T* d_m,
                           const T* d_v, const T* grads, const T* m, const T* v, T* in_grads,
                           T* in_m, T* in_v, int64_t n, int64_t k, int threads) {
  const TeacherStepKernels<T> kernels = AMALGAM_DISPATCH(teacher_step_kernels<T>);
  const std::vector<TeacherConstants<T>> constants = constants_of<T>(settings, k);
  for_each_part(n, k, threads, [&](int64_t row, int64_t start, int64_t count) {
    const int64_t at = row * n + start;
    kernels.gradients(constants[row], d_updates + at, d_m + at, d_v + at, grads + at, m + at,
                      v + at, in_grads + at, in_m + at, in_v + at, count);
  });
}

template TeacherConstants<float> teacher_constants(const TeacherSettings&, int64_t);
template TeacherConstants<double> teacher_constants(const TeacherSettings&, int64_t);

namespace {

template <typename T>
void bind_teacher_step(py::module_& module, const std::string& dtype) {
  using namespace py::literals;
  using Ints = std::vector<int>;
  using Doubles = std::vector<double>;
  module.def(
      ("teacher_step_" + dtype).c_str(),
      [](Address grads, Address m, Address v, Address updates, Address new_m, Address new_v,
         int64_t n, int64_t k, const Ints& kinds, const Doubles& lr, const Doubles& beta1,
         const Doubles& beta2, const Doubles& eps, int threads) {
        teacher_step(
            {kinds.data(), lr.data(), beta1.data(), beta2.data(), eps.data()}, at<const T>(grads),
            at<const T>(m), at<const T>(v), at<T>(updates), at<T>(new_m), at<T>(new_v), n, k,
            threads);
      },
      "grads"_a, "m"_a, "v"_a, "updates"_a, "new_m"_a, "new_v"_a, py::kw_only(), "n"_a, "k"_a,
      "kinds"_a, "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "threads"_a, WithoutGil());
  module.def(
      ("teacher_step_backward_" + dtype).c_str(),
      [](Address d_updates, Address d_m, Address d_v, Address grads, Address m, Address v,
         Address in_grads, Address in_m, Address in_v, int64_t n, int64_t k, const Ints& kinds,
         const Doubles& lr, const Doubles& beta1, const Doubles& beta2, const Doubles& eps,
         int threads) {
        teacher_step_backward(
            {kinds.data(), lr.data(), beta1.data(), beta2.data(), eps.data()},
            at<const T>(d_updates), at<const T>(d_m), at<const T>(d_v), at<const T>(grads),
            at<const T>(m), at<const T>(v), at<T>(in_grads), at<T>(in_m), at<T>(in_v), n, k,
            threads);
      },
      "d_updates"_a, "d_m"_a, "d_v"_a, "grads"_a, "m"_a, "v"_a, "in_grads"_a, "in_m"_a, "in_v"_a,
      py::kw_only(), "n"_a, "k"_a, "kinds"_a, "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "threads"_a,
      WithoutGil());
}

const Binding binding("cpu", [](py::module_& module) {
  bind_teacher_step<float>(module, "float32");
  bind_teacher_step<double>(module, "float64");
});

}  // namespace
}  // namespace amalgam::cpu
