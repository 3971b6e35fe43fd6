// Functional steps of the nominal student and their gradients; amalgam/operations/student_forms.py has the
// formulas. All pointers are device memory of `device`; `stream` is a cudaStream_t of it. Nothing here
// waits for the device.
#pragma once

#include <cstdint>
#include <vector>

namespace amalgam::cuda {

// N coordinates of several tensors, one tensor after another. Every tensor begins a new tile of 32.
// All but the bounds is there once for each student, one student's after another's. Either steps or
// students are one.
struct UnrollCall {
  // A unit after another, four numbers each (gates i, f, a, o): zeros, what it takes of each feature
  // and of each h; then the head's rows and its biases, and zeros up to 16 bytes. Scaled as
  // student_step.h has them.
  const float* weights;
  const float* biases;       // (steps, tensors, 4 hidden)
  const float* corrections;  // (steps, tensors, 3)
  const int64_t* bounds;     // (2, tensors + 1): each tensor's first tile, and its first coordinate
  const float* grads;        // (steps, N), from row to row grads_stride
  const float* adjoints;     // (steps, N) gradients in the updates, from row to row adjoints_stride
  int64_t grads_stride, adjoints_stride;
  const float* m;            // (N,)
  const float* v;            // (N,)
  const float* h;            // (hidden, N)
  const float* c;            // (hidden, N)
  int64_t n, tiles;
  int tensors, steps, students;
  float alpha, beta1, beta2, eps;
  float of_grad, of_square;  // 1 - beta1, 1 - beta2
};

inline void set_constants(UnrollCall& call, double alpha, double beta1, double beta2, double eps) {
  call.alpha = static_cast<float>(alpha);
  call.beta1 = static_cast<float>(beta1);
  call.beta2 = static_cast<float>(beta2);
  call.of_grad = static_cast<float>(1 - beta1);
  call.of_square = static_cast<float>(1 - beta2);
  call.eps = static_cast<float>(eps);
}

// A new state, or gradients in one.
struct UnrollState {
  float* m;  // (N,)
  float* v;  // (N,)
  float* h;  // (hidden, N)
  float* c;  // (hidden, N)
};

// What a backward sums over coordinates: a row for each warp, and of biases for each tensor that a
// warp has coordinates of, the row of the sum of their numbers. Of several students likewise.
struct UnrollSums {
  double* weights;  // (warps, unroll_sums)
  double* biases;   // (warps + tensors, steps, 4 hidden)
  float* states;    // (warps, steps, 2 hidden + 2, 32) scratch; of one step none
  int64_t warps;    // of a student, at most as many as tiles, and one or more where there are tiles
};

// Of one layer.
const std::vector<int>& unroll_sizes();

// How many sums of weights there are: for every gate and unit those of the features and of h; then
// for each output of the head those of h and of its bias.
int unroll_sums(int hidden);

// So many students at once, at most: a grid has no more rows, and no more planes.
constexpr int kMostStudents = 65535;

// How many warps share so many tiles of a student.
int64_t unroll_warps(int hidden, int64_t tiles, int device);

// Writes the update (N,) and the new state; one step, without adjoints.
void nominal_step(const UnrollCall& call, int hidden, float* update, const UnrollState& to,
                  int device, void* stream);

// Of one step, gradients in grad (N,), in the old state and in the weights, of those in the update
// and in the new state.
void nominal_step_backward(const UnrollCall& call, int hidden, const UnrollState& in_new,
                           float* in_grad, const UnrollState& in_old, const UnrollSums& sums,
                           float* in_weights, float* in_biases, int device, void* stream);

// Of all steps, gradients in the weights: (unroll_sums,), and (steps, tensors, 4 hidden).
void nominal_unroll_backward(const UnrollCall& call, int hidden, const UnrollSums& sums,
                             float* in_weights, float* in_biases, int device, void* stream);

}  // namespace amalgam::cuda
