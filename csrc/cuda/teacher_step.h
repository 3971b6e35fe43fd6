// One step of a pool of analytical teachers; amalgam/operations/teacher_kinds.py has the formulas. T is
// float or double. All pointers are device memory of `device`; `stream` is a cudaStream_t of it.
// Nothing here waits for the device, and settings go along with the launch, not by way of memory.
#pragma once

#include <cstdint>

namespace amalgam::cuda {

// The K teachers' settings, arrays of K on the host.
struct TeacherSettings {
  const int* kinds;   // places in KINDS of amalgam/operations/teacher_kinds.py
  const double* lr;
  const double* beta1;
  const double* beta2;
  const double* eps;
};

// Throws std::invalid_argument where there is no such kind.
template <typename T>
void teacher_step(const TeacherSettings& settings,
                  const T* grads,  // (K, N)
                  const T* m,      // (K, N)
                  const T* v,      // (K, N)
                  T* updates,      // (K, N) out
                  T* new_m,        // (K, N) out
                  T* new_v,        // (K, N) out
                  int64_t n, int64_t k, int device, void* stream);

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
                           int64_t n, int64_t k, int device, void* stream);

}  // namespace amalgam::cuda
