#include "teacher_step.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

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

#define AMALGAM_INSTANTIATE(T)                                                                    \
  template TeacherConstants<T> teacher_constants(const TeacherSettings&, int64_t);                \
  template void teacher_step(const TeacherSettings&, const T*, const T*, const T*, T*, T*, T*,    \
                             int64_t, int64_t, int);                                              \
  template void teacher_step_backward(const TeacherSettings&, const T*, const T*, const T*,       \
                                      const T*, const T*, const T*, T*, T*, T*, int64_t, int64_t, \
                                      int);
AMALGAM_INSTANTIATE(float)
AMALGAM_INSTANTIATE(double)
#undef AMALGAM_INSTANTIATE

}  // namespace amalgam::cpu
