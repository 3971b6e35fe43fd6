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

// A part of a row that a thread computes at once.
struct RowPart {
  int64_t start, count, row;
};

// Parts of all rows follow each other: rows that share teachers find them in the cache.
RowPart part_of(int64_t index, int64_t rows, int64_t n) {
  const int64_t start = index / rows * kBlock;
  return {start, std::min(kBlock, n - start), index % rows};
}

double pairwise_sum(const double* values, int64_t count) {
  if (count < 3) return (count > 0 ? values[0] : 0.0) + (count > 1 ? values[1] : 0.0);
  const int64_t half = count / 2;
  return pairwise_sum(values, half) + pairwise_sum(values + half, count - half);
}

}  // namespace

template <typename T>
void teacher_distance(const T* students, const T* teachers, T* distances, T* totals, int64_t rows,
                      int64_t teacher_rows, int64_t n, int64_t k, double eps, double huber_delta,
                      int threads) {
  const TeacherDistanceKernels<T> kernels = AMALGAM_DISPATCH(teacher_distance_kernels<T>);
  const T delta = static_cast<T>(huber_delta);
  const int64_t blocks = blocks_of(n);
  std::vector<double> sums(rows * k * blocks);
  const int team = worthwhile_threads(rows * n * k, kGrain, threads);
  for_each_block(blocks * rows, team, [&](int64_t index) {
    const auto [start, count, row] = part_of(index, rows, n);
    const T* student = students + row * n + start;
    const T* own = teachers + row % teacher_rows * n + start;
    for (int64_t teacher = 0; teacher < k; ++teacher) {
      sums[(row * k + teacher) * blocks + start / kBlock] =
          kernels.sum(student, own + teacher * teacher_rows * n, count, delta);
    }
  });
  const double log_n = std::log(static_cast<double>(std::max<int64_t>(n, 1)));
  for (int64_t pair = 0; pair < rows * k; ++pair) {
    const double total = pairwise_sum(sums.data() + pair * blocks, blocks);
    totals[pair] = static_cast<T>(total);
    distances[pair] = static_cast<T>(std::log(total + eps) - log_n);
  }
}

template <typename T>
void teacher_distance_backward(const T* grad, const T* students, const T* teachers,
                               const T* totals, T* in_students, T* in_teachers, int64_t rows,
                               int64_t teacher_rows, int64_t n, int64_t k, double eps,
                               double huber_delta, int threads) {
  const TeacherDistanceKernels<T> kernels = AMALGAM_DISPATCH(teacher_distance_kernels<T>);
  const T delta = static_cast<T>(huber_delta);
  std::vector<T> weights(rows * k);
  for (int64_t pair = 0; pair < rows * k; ++pair) {
    weights[pair] = static_cast<T>(grad[pair] / (totals[pair] + eps));
  }
  const int team = worthwhile_threads(rows * n * k, kGrain, threads);
  for_each_block(blocks_of(n) * rows, team, [&](int64_t index) {
    const auto [start, count, row] = part_of(index, rows, n);
    const T* own = teachers + row % teacher_rows * n + start;
    kernels.gradients(weights.data() + row * k, students + row * n + start, own,
                      in_students + row * n + start, in_teachers ? in_teachers + start : nullptr,
                      count, teacher_rows * n, k, delta);
  });
}

namespace {

template <typename T>
void bind_teacher_distance(py::module_& module, const std::string& dtype) {
  using namespace py::literals;
  module.def(
      ("teacher_distance_" + dtype).c_str(),
      [](Address students, Address teachers, Address distances, Address totals, int64_t rows,
         int64_t teacher_rows, int64_t n, int64_t k, double eps, double huber_delta, int threads) {
        cpu::teacher_distance(at<const T>(students), at<const T>(teachers), at<T>(distances),
                              at<T>(totals), rows, teacher_rows, n, k, eps, huber_delta, threads);
      },
      "students"_a, "teachers"_a, "distances"_a, "totals"_a, py::kw_only(), "rows"_a,
      "teacher_rows"_a, "n"_a, "k"_a, "eps"_a, "huber_delta"_a, "threads"_a, WithoutGil());
  module.def(
      ("teacher_distance_backward_" + dtype).c_str(),
      [](Address grad, Address students, Address teachers, Address totals, Address in_students,
         Address in_teachers, int64_t rows, int64_t teacher_rows, int64_t n, int64_t k, double eps,
         double huber_delta, int threads) {
        cpu::teacher_distance_backward(
            at<const T>(grad), at<const T>(students), at<const T>(teachers), at<const T>(totals),
            at<T>(in_students), at<T>(in_teachers), rows, teacher_rows, n, k, eps, huber_delta,
            threads);
      },
      "grad"_a, "students"_a, "teachers"_a, "totals"_a, "in_students"_a, "in_teachers"_a,
      py::kw_only(), "rows"_a, "teacher_rows"_a, "n"_a, "k"_a, "eps"_a, "huber_delta"_a,
      "threads"_a, WithoutGil());
}

const Binding binding("cpu", [](py::module_& module) {
  bind_teacher_distance<float>(module, "float32");
  bind_teacher_distance<double>(module, "float64");
});

}  // namespace
}  // namespace amalgam::cpu
