// Log distances between R rows of students' parameters and K teachers' in Q rows, which divide R: row r
// is measured to the teachers' rows r % Q. amalgam/operations/teacher_distance.py has the formulas. T is
// float or double; a negative huber_delta stands for no Huber. There are at most 65535 rows, what a grid
// has of them. All pointers are device memory of `device`; `stream` is a cudaStream_t of it. Nothing here
// waits for the device.
#pragma once

#include <cstdint>

namespace amalgam::cuda {

// P: how many partial sums teacher_distance makes per row and teacher.
template <typename T>
int64_t teacher_distance_partials(int64_t n);

template <typename T>
void teacher_distance(const T* students,  // (R, N)
                      const T* teachers,  // (K, Q, N)
                      T* distances,       // (R, K) out
                      T* totals,          // (R, K) out
                      double* partials,   // (R, K, P) scratch
                      int64_t rows, int64_t teacher_rows, int64_t n, int64_t k, double eps,
                      double huber_delta, int device, void* stream);

template <typename T>
void teacher_distance_backward(const T* grad,      // (R, K)
                               const T* students,  // (R, N)
                               const T* teachers,  // (K, Q, N)
                               const T* totals,    // (R, K)
                               T* in_students,     // (R, N) out
                               T* in_teachers,     // (K, 1, N) out, or null unless R = 1
                               int64_t rows, int64_t teacher_rows, int64_t n, int64_t k,
                               double eps, double huber_delta, int device, void* stream);

}  // namespace amalgam::cuda
