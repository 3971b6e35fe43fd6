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

// Of T steps, each with its own first bias and corrections in the nominal form, (T, tensors, ...).
// sizes: of the student's tensors. state: before the first step. d_weights: one array a weight.
template <typename T>
void student_unroll_backward(const Student<T>& student, int64_t steps, const int64_t* sizes,
                             const StepRows<T>& grads, const StepRows<T>& adjoints,
                             const StudentState<const T>& state, T* const* d_weights, int threads);

}  // namespace amalgam::cpu
