// One step of the optimal choice and its gradients; amalgam/operations/choice_step.py has the formulas.
// Of an LSTM of one layer. All pointers but the settings' are device memory of `device`; `stream` is a
// cudaStream_t of it. Nothing here waits for the device.
#pragma once

#include <cstdint>
#include <vector>

#include "teacher_step.h"

namespace amalgam::cuda {

constexpr int kMostTeachers = 8;  // of a pool

// N coordinates and K teachers.
struct ChoiceCall {
  // Rows of the units' four numbers (gates i, f, a, o), scaled as student_step.h has them: of the
  // bias, of the time, of three ranks, of each teacher's update, of each h. Then the head (K, hidden)
  // and its bias (K,).
  const float* weights;
  const float* grad;     // (N,)
  const int64_t* ranks;  // (N,)
  const float* m;        // (K, N)
  const float* v;        // (K, N)
  const float* h;        // (hidden, N)
  const float* c;        // (hidden, N)
  int64_t n;
  int teachers;
  float time, learning_rate;
};

// The new state, or gradients in a state.
struct ChoiceState {
  float* m;  // (K, N)
  float* v;  // (K, N)
  float* h;  // (hidden, N)
  float* c;  // (hidden, N)
};

// Units that are compiled in.
const std::vector<int>& choice_sizes();

// How many sums of weights a warp has: for every gate and unit those of the coordinates of no rank
// that is a feature and of three ranks, of `choice_pool` teachers' updates, and of h; then for each
// of those teachers those of the new h and of ones.
int choice_sums(int hidden, int teachers);

// For how many teachers there are sums; those beyond K are zeros.
int choice_pool(int teachers);

// How many warps share so many coordinates of a backward.
int64_t choice_warps(int hidden, int teachers, int64_t n, int device);

// Throws std::invalid_argument where there is no such kind, or no kernel of so many units or teachers.
void choice_step(const ChoiceCall& call, const TeacherSettings& settings, int hidden,
                 float* update,   // (N,) out
                 const ChoiceState& to,
                 float* mixture,  // (K, N) out
                 int device, void* stream);

void choice_step_backward(const ChoiceCall& call, const TeacherSettings& settings, int hidden,
                          const float* d_update,   // (N,)
                          const ChoiceState& d_new,
                          const float* d_mixture,  // (K, N)
                          float* d_grad,           // (N,) out
                          const ChoiceState& d_old,
                          double* sums,            // (warps, choice_sums) out
                          int64_t warps, int device, void* stream);

}  // namespace amalgam::cuda
