// One step of the RNNProp student in place, for all tensors of one kind in one launch;
// amalgam/ops/student_step.py has the formulas, amalgam/backends/table.py the table of tensors.
// All pointers are device memory of `device`; `stream` is a cudaStream_t of it. Nothing here waits
// for the device.
#pragma once

#include <cstdint>
#include <vector>

namespace amalgam::cuda {

// How numbers lie in memory.
enum class Stored { float32, bfloat16, float16 };

// What a launch computes by. Fits into the kernel's parameters, where operands are free.
struct StudentCall {
  // Of student_threads, a unit after another: four numbers (gates i, f, a, o) of the bias, of each
  // input and of each of the layer's h; then the head and its bias, and zeros up to 16 bytes.
  const float* weights;
  const int64_t* table;        // (count, 9): param, grad, m, v, h, c, numel, step, seed
  const int64_t* first_block;  // (count,)
  const double* control;       // (4,): keep, lr, warm-up's rate, skip; or null
  int count;
  int warmup_steps;
  Stored param, grad;
  bool stochastic;             // how h, c and parameters are rounded to bfloat16
  float keep, lr;              // where there is no control: keep p - lr update
  float alpha, beta1, beta2;
  float of_grad, of_square;    // 1 - beta1, 1 - beta2
  float per_m, per_v;          // and one over them
  float eps;
};

// A student whose step is compiled in.
struct StudentSize {
  int layers, hidden;
  int block;                   // coordinates of a block, whatever the cells' storage
};

const std::vector<StudentSize>& student_sizes();

// Throws std::invalid_argument for a size that is not compiled in.
void student_step_in_place(const StudentCall& call, int layers, int hidden, Stored cells,
                           bool approximate, int64_t blocks, int device, void* stream);

}  // namespace amalgam::cuda
