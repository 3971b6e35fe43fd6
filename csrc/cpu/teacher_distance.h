// Log distances between R rows of students' parameters and K teachers' in Q rows, which divide R: row r
// is measured to the teachers' rows r % Q. amalgam/operations/teacher_distance.py has the formulas. T is
// float or double; a negative huber_delta stands for no Huber.
#pragma once

#include <cstdint>

#include "isa.h"

namespace amalgam::cpu {

// threads: the most threads to use, the caller's included.
template <typename T>
void teacher_distance(const T* students,  // (R, N)
                      const T* teachers,  // (K, Q, N)
                      T* distances,       // (R, K) out
                      T* totals,          // (R, K) out
                      int64_t rows, int64_t teacher_rows, int64_t n, int64_t k, double eps,
                      double huber_delta, int threads);

template <typename T>
void teacher_distance_backward(const T* grad,      // (R, K)
                               const T* students,  // (R, N)
                               const T* teachers,  // (K, Q, N)
                               const T* totals,    // (R, K)
                               T* in_students,     // (R, N) out
                               T* in_teachers,     // (K, 1, N) out, or null unless R = 1
                               int64_t rows, int64_t teacher_rows, int64_t n, int64_t k,
                               double eps, double huber_delta, int threads);

template <typename T>
struct TeacherDistanceKernels {
  // The sum of the penalties of `count` differences.
  double (*sum)(const T* student, const T* teacher, int64_t count, T huber_delta);

  // Gradients of `count` coordinates; rows of teachers and in_teachers are `stride` apart.
  void (*gradients)(const T* weights,   // (K,) gradient of each teacher's sum
                    const T* student,   // (count,)
                    const T* teachers,  // (K, count)
                    T* in_student,      // (count,) out
                    T* in_teachers,     // (K, count) out, or null
                    int64_t count, int64_t stride, int64_t k, T huber_delta);
};

#define AMALGAM_DECLARE(isa)                            \
  namespace isa {                                       \
  template <typename T>                                 \
  TeacherDistanceKernels<T> teacher_distance_kernels(); \
  }
AMALGAM_FOR_EACH_ISA(AMALGAM_DECLARE)
#undef AMALGAM_DECLARE

}  // namespace amalgam::cpu
