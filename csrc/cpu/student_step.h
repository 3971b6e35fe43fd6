// One step of the RNNProp student; amalgam/operations/student_step.py has the formulas.
//
// Coordinates are the last, fastest dimension of every array. T, float or double, is what is
// computed in and what weights and moments are stored in.
#pragma once

#include <cstdint>

#include "isa.h"
#include "lstm_layout.h"

namespace amalgam::cpu {

enum class Storage;

struct StudentConstants {
  double alpha, beta1, beta2, eps;
};

// The coordinates of one tensor. New state may lie where the old one does.
struct StudentTensor {
  int64_t numel;
  const void* grad;
  const void* m;       // (numel,)
  const void* v;       // (numel,)
  const void* h;       // (layers, hidden, numel)
  const void* c;       // (layers, hidden, numel)
  void* new_m;
  void* new_v;
  void* new_h;
  void* new_c;
  void* out;           // the update where `in_place` is false, else the parameter to move
  uint32_t key;        // of its random bits, where rounding is stochastic
};

struct StudentStep {
  int layers;
  int hidden;
  StudentConstants constants;
  Storage grad;
  Storage cells;                // h and c
  Storage out;
  bool in_place;
  double keep;          // with in_place: keep p - lr update
  double lr;
  bool stochastic;      // how h, c and parameters are rounded to bfloat16
};

// weights: three arrays a layer (W_ih, W_hh, b) and two of the head, as PyTorch lays them out.
template <typename T>
void student_step(const StudentStep& step, const T* const* weights, const StudentTensor* tensors,
                  int64_t count, int threads);

// Gradients of one functional step on n coordinates. d_weights: one array a weight.
template <typename T>
void student_step_backward(int layers, int hidden, const StudentConstants& constants,
                           const T* const* weights, int64_t n,
                           const T* grad, const T* m, const T* v, const T* h, const T* c,
                           const T* d_update, const T* d_new_m, const T* d_new_v, const T* d_new_h,
                           const T* d_new_c,
                           T* d_grad, T* d_m, T* d_v, T* d_h, T* d_c, T* const* d_weights,
                           int threads);

// A student as the inner loops want it.
template <typename T>
struct StudentNetwork {
  LstmNetwork<T> lstm;
  const T* head;                  // (hidden,)
  T head_bias;
  T alpha, beta1, beta2, eps;
  T one_minus_beta1, one_minus_beta2;
};

// Rows of kTile coordinates.
template <typename T>
struct StudentTile {
  T *grad, *m, *v;                // m, v get the new moments
  T* update;                      // in the backward pass the head's slope instead
  LstmTile<T> lstm;
  // The backward pass alone:
  T *d_update, *d_m, *d_v;        // of the new values, get those of the old ones
  T* d_grad;
};

template <typename T>
struct StudentKernels {
  void (*forward)(const StudentNetwork<T>&, const StudentTile<T>&);
  // Adds to `sums`, a layer's after another, then the head's (hidden) and its bias.
  void (*backward)(const StudentNetwork<T>&, const StudentTile<T>&, double* sums);
  // The backward pass in two halves, without gradients in the moments and the gradient, which don't
  // depend on the weights: the step, keeping what the second half needs of it, and that half.
  void (*keep)(const StudentNetwork<T>&, const StudentTile<T>&);
  void (*gradients)(const StudentNetwork<T>&, const StudentTile<T>&, double* sums);
};

#define AMALGAM_DECLARE(isa)           \
  namespace isa {                      \
  template <typename T>                \
  StudentKernels<T> student_kernels(); \
  }
AMALGAM_FOR_EACH_ISA(AMALGAM_DECLARE)
#undef AMALGAM_DECLARE

}  // namespace amalgam::cpu
