// Log distance between a student's parameters and K teachers'; amalgam/operations/teacher_distance.py has
// the formulas. T is float or double; a negative huber_delta stands for no Huber.
#pragma once

#include <cstdint>

#include "isa.h"

namespace amalgam::cpu {

// threads: the most threads to use, the caller's included.
template <typename T>
void teacher_distance(const T* student,   // (N,)
                      const T* teachers,  // (K, N)
                      T* distances,       // (K,) out
                      T* totals,          // (K,) out
                      int64_t n, int64_t k, double eps, double huber_delta, int threads);

template <typename T>
void teacher_distance_backward(const T* grad,      // (K,)
                               const T* student,   // (N,)
                               const T* teachers,  // (K, N)
                               const T* totals,    // (K,)
                               T* in_student,      // (N,) out
                               T* in_teachers,     // (K, N) out, or null
                               int64_t n, int64_t k, double eps, double huber_delta, int threads);

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
