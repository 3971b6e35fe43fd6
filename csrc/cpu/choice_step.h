// One step of the optimal choice; amalgam/operations/choice_step.py has the formulas.
//
// Coordinates are the last, fastest dimension of every array. T is float or double.
#pragma once

#include <cstdint>

#include "isa.h"
#include "lstm_layout.h"
#include "teacher_step.h"

namespace amalgam::cpu {

struct ChoiceSettings {
  int teachers;              // K
  int layers;
  int hidden;
  TeacherSettings pool;
  double time;               // the LSTM's feature
  double learning_rate;
};

// The state, old or new, or gradients in it.
template <typename T>
struct ChoiceState {
  T* m;                      // (K, N)
  T* v;                      // (K, N)
  T* h;                      // (layers, hidden, N)
  T* c;                      // (layers, hidden, N)
};

// weights: three arrays a layer (W_ih, W_hh, b) and two of the head, as PyTorch lays them out.
template <typename T>
void choice_step(const ChoiceSettings& settings, const T* const* weights, int64_t n,
                 const T* grad,          // (N,)
                 const int64_t* ranks,   // (N,)
                 const ChoiceState<const T>& old_state,
                 T* update,              // (N,) out
                 const ChoiceState<T>& new_state,
                 T* mixture,             // (K, N) out
                 int threads);

template <typename T>
void choice_step_backward(const ChoiceSettings& settings, const T* const* weights, int64_t n,
                          const T* grad, const int64_t* ranks,
                          const ChoiceState<const T>& old_state,
                          const T* d_update, const ChoiceState<const T>& d_new_state,
                          const T* d_mixture,
                          T* d_grad, const ChoiceState<T>& d_old_state,
                          T* const* d_weights,  // one array a weight
                          int threads);

// A choice as the inner loops want it.
template <typename T>
struct ChoiceNetwork {
  int teachers;
  const TeacherConstants<T>* pool;  // (K,)
  LstmNetwork<T> lstm;              // of K + 4 features: the teachers' updates come first
  const T* head;                    // (K, hidden)
  const T* head_bias;               // (K,)
  T learning_rate;
};

// Rows of kTile coordinates.
template <typename T>
struct ChoiceTile {
  T* grad;
  T *m, *v;                         // (K)
  T *new_m, *new_v;                 // (K)
  T* update;
  T* mixture;                       // (K)
  LstmTile<T> lstm;                 // its first inputs get the teachers' updates
  // The backward pass alone:
  T* d_update;
  T* d_mixture;                     // (K) gets the logits' gradients
  T *d_m, *d_v;                     // (K) of the new moments, get those of the old ones
  T* d_grad;
  T* d_teachers;                    // (K) of the teachers' updates, then of their gradients
};

template <typename T>
struct ChoiceKernels {
  void (*forward)(const ChoiceNetwork<T>&, const ChoiceTile<T>&);
  // Adds to `sums`: a layer's after another, then the head's, columns_of(hidden) a teacher.
  void (*backward)(const ChoiceNetwork<T>&, const ChoiceTile<T>&, double* sums);
};

#define AMALGAM_DECLARE(isa)         \
  namespace isa {                    \
  template <typename T>              \
  ChoiceKernels<T> choice_kernels(); \
  }
AMALGAM_FOR_EACH_ISA(AMALGAM_DECLARE)
#undef AMALGAM_DECLARE

}  // namespace amalgam::cpu
