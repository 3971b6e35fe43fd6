// The step of small students of the nominal form, computed in float: of one layer, whose h the core's
// registers hold. Coordinates go from memory to registers and back.
#pragma once

#include <cstdint>

#include "isa.h"
#include "lstm_layout.h"
#include "student_step.h"

namespace amalgam::cpu {

inline constexpr int kSmall[] = {4, 8, 16};  // units

// Weights are multiplied by what makes their sums the logarithms, to base 2, of what activations are
// made of: exp(-x) in sigmoid, exp(-2x) in tanh, exp(x) in the update's factor.
inline constexpr double kLog2E = 1.4426950408889634;
inline constexpr double kOfSigmoid = -kLog2E, kOfTanh = -2 * kLog2E, kOfExp = kLog2E;
inline constexpr double kOfGate[4] = {kOfSigmoid, kOfSigmoid, kOfTanh, kOfSigmoid};

struct SmallStudent {
  const float* weights;       // (hidden, 3 + hidden, 4) of a unit and a row of its inputs, by gate
  const float* head;          // (hidden, 2)
  float head_bias[2];
  float alpha, beta1, beta2, eps, one_minus_beta1, one_minus_beta2;
};

// Some coordinates of a tensor, from the first one on. Numbers are float, or bfloat16 where narrow.
struct SmallPiece {
  int64_t place, count;       // the first one's in its tensor, and how many they are
  const float* bias;          // (4 hidden) as PyTorch has it
  const float* corrections;   // c1, c2 and the pace
  int64_t stride;             // from row to row of h and c
  const void *grad, *m, *v, *h, *c;
  void *new_m, *new_v, *new_h, *new_c, *out;
  uint32_t key;
};

struct SmallStep {
  bool narrow_grad, narrow_moments, narrow_cells, narrow_out;
  bool in_place;              // out: keep out - lr update, else the update
  float keep, lr;
  bool stochastic;            // how what is narrow is rounded
};

using SmallKernel = void (*)(const SmallStudent&, const SmallStep&, const SmallPiece&);

struct SmallKernels {
  SmallKernel (*of)(int hidden, bool narrow_cells);
};

#define AMALGAM_DECLARE(isa)      \
  namespace isa {                 \
  SmallKernels small_kernels();   \
  }
AMALGAM_FOR_EACH_ISA(AMALGAM_DECLARE)
#undef AMALGAM_DECLARE

// Whether there is a kernel for this; else tiles compute it.
bool is_small(const Student<float>& student, const StudentStep& step);

void small_student_step(const Student<float>& student, const StudentStep& step,
                        const StudentTensor* tensors, int64_t count, int threads);

}  // namespace amalgam::cpu
