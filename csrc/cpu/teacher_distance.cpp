#include "teacher_distance.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../binding.h"
#include "dispatch.h"
#include "parallel.h"

namespace amalgam::cpu {
namespace {

// Of the student a block stays in a core's cache while the K teachers pass by, so that memory is
// read once.
constexpr int64_t kBlock = 8192;

// Teachers' elements that make a thread worth waking: some 10 us.
constexpr int64_t kGrain = 1 << 16;

int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

double pairwise_sum(const double* values, int64_t count) {
  if (count < 3) return (count > 0 ? values[0] : 0.0) + (count > 1 ? values[1] : 0.0);
  const int64_t half = count / 2;
  return pairwise_sum(values, half) + pairwise_sum(values + half, count - half);
}

}  // namespace

template <typename T>
void teacher_distance(const T* student, const T* teachers, T* distances, T* totals, int64_t n,
                      int64_t k, double eps, double huber_delta, int threads) {
  const TeacherDistanceKernels<T> kernels = AMALGAM_DISPATCH(teacher_distance_kernels<T>);
  const T delta = static_cast<T>(huber_delta);
  const int64_t blocks = blocks_of(n);
  std::vector<double> sums(blocks * k);
  const int team = worthwhile_threads(n * k, kGrain, threads);
  for_each_block(blocks, team, [&](int64_t block) {
    const int64_t start = block * kBlock;
    const int64_t count = std::min(kBlock, n - start);
    for (int64_t row = 0; row < k; ++row) {
      sums[row * blocks + block] =
          kernels.sum(student + start, teachers + row * n + start, count, delta);
    }
  });
  const double log_n = std::log(static_cast<double>(std::max<int64_t>(n, 1)));
  for (int64_t row = 0; row < k; ++row) {
    const double total = pairwise_sum(sums.data() + row * blocks, blocks);
    totals[row] = static_cast<T>(total);
    distances[row] = static_cast<T>(std::log(total + eps) - log_n);
  }
}

template <typename T>
void teacher_distance_backward(const T* grad, const T* student, const T* teachers, const T* totals,
                               T* in_student, T* in_teachers, int64_t n, int64_t k, double eps,
                               double huber_delta, int threads) {
  const TeacherDistanceKernels<T> kernels = AMALGAM_DISPATCH(teacher_distance_kernels<T>);
  const T delta = static_cast<T>(huber_delta);
  std::vector<T> weights(k);
  for (int64_t row = 0; row < k; ++row) {
    weights[row] = static_cast<T>(grad[row] / (totals[row] + eps));
  }
  const int team = worthwhile_threads(n * k, kGrain, threads);
  for_each_block(blocks_of(n), team, [&](int64_t block) {
    const int64_t start = block * kBlock;
    kernels.gradients(weights.data(), student + start, teachers + start, in_student + start,
                      in_teachers ? in_teachers + start : nullptr, std::min(kBlock, n - start), n,
                      k, delta);
  });
}

namespace {

template <typename T>
void bind_teacher_distance(py::module_& module, const std::string& dtype) {
  using namespace py::literals;
  module.def(
      ("teacher_distance_" + dtype).c_str(),
      [](Address student, Address teachers, Address distances, Address totals, int64_t n,
         int64_t k, double eps, double huber_delta, int threads) {
        cpu::teacher_distance(at<const T>(student), at<const T>(teachers), at<T>(distances),
                              at<T>(totals), n, k, eps, huber_delta, threads);
      },
      "student"_a, "teachers"_a, "distances"_a, "totals"_a, py::kw_only(), "n"_a, "k"_a, "eps"_a,
      "huber_delta"_a, "threads"_a, WithoutGil());
  module.def(
      ("teacher_distance_backward_" + dtype).c_str(),
      [](Address grad, Address student, Address teachers, Address totals, Address in_student,
         Address in_teachers, int64_t n, int64_t k, double eps, double huber_delta, int threads) {
        cpu::teacher_distance_backward(
            at<const T>(grad), at<const T>(student), at<const T>(teachers), at<const T>(totals),
            at<T>(in_student), at<T>(in_teachers), n, k, eps, huber_delta, threads);
      },
      "grad"_a, "student"_a, "teachers"_a, "totals"_a, "in_student"_a, "in_teachers"_a,
      py::kw_only(), "n"_a, "k"_a, "eps"_a, "huber_delta"_a, "threads"_a, WithoutGil());
}

const Binding binding("cpu", [](py::module_& module) {
  bind_teacher_distance<float>(module, "float32");
  bind_teacher_distance<double>(module, "float64");
});

}  // namespace
}  // namespace amalgam::cpu
