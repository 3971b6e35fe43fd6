// The gradient of many student steps in the weights; the formulas are in
// amalgam/operations/student_unroll_backward.py.
#pragma once

#include <cstdint>

#include "student_step.h"

namespace amalgam::cpu {

// A (T, N) matrix whose rows are `stride` apart.
template <typename T>
struct StepRows {
  const T* first;
  int64_t stride;
};

// state: before the first step. d_weights: one array a weight.
template <typename T>
void student_unroll_backward(int layers, int hidden, const StudentConstants& constants,
                             const T* const* weights, int64_t steps, int64_t n,
                             const StepRows<T>& grads, const StepRows<T>& adjoints,
                             const StudentState<const T>& state, T* const* d_weights, int threads);

}  // namespace amalgam::cpu
