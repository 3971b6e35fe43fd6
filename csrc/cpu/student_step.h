// One step of a student, of either form; amalgam/operations/student_step.py has the formulas.
//
// Coordinates are the last, fastest dimension of every array. T, float or double, is what is
// computed in and what weights are stored in.
#pragma once

#include <array>
#include <cstdint>

#include "isa.h"
#include "lstm_layout.h"

namespace amalgam::cpu {

enum class Storage;

struct StudentConstants {
  double alpha, beta1, beta2, eps;
};

// What sizes of rows depend on in a form: inputs of the first layer, outputs of the head, and rows
// that the backward pass keeps of them.
struct FormSizes {
  int features, outputs, slopes;
};
inline constexpr FormSizes kRNNProp{2, 1, 1}, kNominal{3, 2, 4};

// A student as PyTorch lays it out.
template <typename T>
struct Student {
  int layers;
  int hidden;
  StudentConstants constants;
  const T* const* weights;  // three arrays a layer (W_ih, W_hh, b) and two of the head
  bool nominal;             // the form; then the first b is (tensors, 4 hidden)
  const T* corrections;     // (tensors, 3) c1, c2 and the pace, of the nominal form
  int64_t tensors;          // 1 of the form RNNProp

  AMALGAM_INLINE FormSizes form() const { return nominal ? kNominal : kRNNProp; }
};

// m, v (n,) and h, c (layers, hidden, n); or gradients in them.
template <typename T>
struct StudentState {
  T *m, *v, *h, *c;
};

// The coordinates of one tensor. New state may lie where the old one does. Python writes a table of
// these, a row of 64-bit words each, by the fields' names.
struct StudentTensor {
  int64_t numel;
  int64_t stride;      // from row to row of h and c, old and new
  int64_t index;       // which of the student's tensors it is
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
  uint64_t key;        // 32 bits: of its random bits, where rounding is stochastic
};

inline constexpr std::array<const char*, 14> kStudentTensorFields = {
    "numel", "stride", "index", "grad",  "m",     "v",   "h",
    "c",     "new_m",  "new_v", "new_h", "new_c", "out", "key"};
static_assert(sizeof(StudentTensor) == 8 * kStudentTensorFields.size());

struct StudentStep {
  Storage grad;
  Storage moments;      // m and v
  Storage cells;        // h and c; of int8 rows have a layer's scale after its units, cell_codes.h
  Storage out;
  bool in_place;
  double keep;          // with in_place: keep p - lr update
  double lr;
  bool stochastic;      // how states and parameters are rounded to bfloat16
  bool bfloat16;        // whether products may take bfloat16, and whether, with them, tanh and
  bool approximate;     // sigmoid may have 11 bits; used where this machine is faster so
};

template <typename T>
void student_step(const Student<T>& student, const StudentStep& step, const StudentTensor* tensors,
                  int64_t count, int threads);

// Gradients of one functional step. sizes: of the student's tensors, which follow each other.
// d_weights: one array a weight.
template <typename T>
void student_step_backward(const Student<T>& student, const int64_t* sizes, const T* grad,
                           const StudentState<const T>& state, const T* d_update,
                           const StudentState<const T>& d_new, T* d_grad,
                           const StudentState<T>& d_state, T* const* d_weights, int threads);

// A student as the inner loops want it.
template <typename T>
struct StudentNetwork {
  LstmNetwork<T> lstm;
  const T* head;                  // (outputs, hidden)
  const T* head_bias;             // (outputs,)
  T alpha, beta1, beta2, eps;
  T one_minus_beta1, one_minus_beta2;
};

// Rows of kTile coordinates.
template <typename T>
struct StudentTile {
  T *grad, *m, *v;                // m, v get the new moments
  T* update;                      // in the backward pass the form's slopes instead
  const T* corrections;           // c1, c2 and the pace of its tensor
  LstmTile<T> lstm;
  // The backward pass alone:
  T *d_update, *d_m, *d_v;        // of the new values, get those of the old ones
  T* d_grad;
};

template <typename T>
struct StudentKernels {
  void (*forward)(const StudentNetwork<T>&, const StudentTile<T>&);
  // Adds to `sums`, a layer's after another, then the head's (outputs, hidden) and its bias.
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
  template <typename T>                \
  StudentKernels<T> nominal_kernels(); \
  }
AMALGAM_FOR_EACH_ISA(AMALGAM_DECLARE)
#undef AMALGAM_DECLARE

}  // namespace amalgam::cpu
