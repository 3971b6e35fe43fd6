// Which kernel of student_unroll.cuh computes what; a file for each number of units, compiled at once.
#pragma once

#include "student_unroll.h"

namespace amalgam::cuda {

constexpr int kUnrollWarps = 4;  // of a block

struct UnrollLaunches {
  int hidden;
  int sums;                        // of weights
  int step_blocks, unroll_blocks;  // that a processor has at once
  // `blocks` of each student.
  void (*forward)(const UnrollCall&, float* update, const UnrollState& to, unsigned blocks,
                  void* stream);
  void (*backward)(const UnrollCall&, const UnrollState& in_new, float* in_grad,
                   const UnrollState& in_old, const UnrollSums&, void* stream);
  void (*unroll)(const UnrollCall&, const UnrollSums&, void* stream);
  // The second stage of both.
  void (*add)(const UnrollCall&, const UnrollSums&, float* in_weights, float* in_biases,
              void* stream);
};

template <int hidden>
UnrollLaunches unroll_launches();

}  // namespace amalgam::cuda
