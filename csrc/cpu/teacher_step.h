// One step of a pool of analytical teachers; amalgam/operations/teacher_kinds.py has the formulas. T is
// float or double.
#pragma once

#include <cstdint>

#include "isa.h"

namespace amalgam::cpu {

// The K teachers' settings, arrays of K.
struct TeacherSettings {
  const int* kinds;   // places in KINDS of amalgam/operations/teacher_kinds.py
  const double* lr;
  const double* beta1;
  const double* beta2;
  const double* eps;
};

// threads: the most threads to use, the caller's included.
template <typename T>
void teacher_step(const TeacherSettings& settings,
                  const T* grads,  // (K, N)
                  const T* m,      // (K, N)
                  const T* v,      // (K, N)
                  T* updates,      // (K, N) out
                  T* new_m,        // (K, N) out
                  T* new_v,        // (K, N) out
                  int64_t n, int64_t k, int threads);

template <typename T>
void teacher_step_backward(const TeacherSettings& settings,
                           const T* d_updates,  // (K, N)
                           const T* d_m,        // (K, N) gradient in the new m
                           const T* d_v,        // (K, N) gradient in the new v
                           const T* grads,      // (K, N)
                           const T* m,          // (K, N)
                           const T* v,          // (K, N)
                           T* in_grads,         // (K, N) out
                           T* in_m,             // (K, N) out
                           T* in_v,             // (K, N) out
                           int64_t n, int64_t k, int threads);

// One teacher's settings, and what the loops make of them.
template <typename T>
struct TeacherConstants {
  int kind;
  T lr;
  T beta1;
  T beta2;
  T eps;
  T rest1;  // 1 - beta1
  T rest2;  // 1 - beta2
};

// Of the teacher in that row. Throws std::invalid_argument where this core has no such kind.
template <typename T>
TeacherConstants<T> teacher_constants(const TeacherSettings& settings, int64_t row);

template <typename T>
struct TeacherStepKernels {
  int kinds;  // how many there are

  // Of one teacher and `count` coordinates. Outputs may lie where inputs do.
  void (*step)(const TeacherConstants<T>& constants, const T* grad, const T* m, const T* v,
               T* update, T* new_m, T* new_v, int64_t count);

  void (*gradients)(const TeacherConstants<T>& constants, const T* d_update, const T* d_m,
                    const T* d_v, const T* grad, const T* m, const T* v, T* in_grad, T* in_m,
                    T* in_v, int64_t count);
};

#define AMALGAM_DECLARE(isa)                    \
  namespace isa {                               \
  template <typename T>                         \
  TeacherStepKernels<T> teacher_step_kernels(); \
  }
AMALGAM_FOR_EACH_ISA(AMALGAM_DECLARE)
#undef AMALGAM_DECLARE

}  // namespace amalgam::cpu
