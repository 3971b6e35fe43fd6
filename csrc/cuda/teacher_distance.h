// Log distance between a student's parameters and K teachers'; amalgam/operations/teacher_distance.py has
// the formulas. T is float or double; a negative huber_delta stands for no Huber. All pointers are device
// memory of `device`; `stream` is a cudaStream_t of it. Nothing here waits for the device.
#pragma once

#include <cstdint>

namespace amalgam::cuda {

// P: how many partial sums teacher_distance makes per teacher.
template <typename T>
int64_t teacher_distance_partials(int64_t n);

template <typename T>
void teacher_distance(const T* student,   // (N,)
                      const T* teachers,  // (K, N)
                      T* distances,       // (K,) out
                      T* totals,          // (K,) out
                      double* partials,   // (K, P) scratch
                      int64_t n, int64_t k, double eps, double huber_delta, int device,
                      void* stream);

template <typename T>
void teacher_distance_backward(const T* grad,      // (K,)
                               const T* student,   // (N,)
                               const T* teachers,  // (K, N)
                               const T* totals,    // (K,)
                               T* in_student,      // (N,) out
                               T* in_teachers,     // (K, N) out, or null
                               int64_t n, int64_t k, double eps, double huber_delta, int device,
                               void* stream);

}  // namespace amalgam::cuda
