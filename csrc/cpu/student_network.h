// A student's weights as the inner loops want them, and their gradients as PyTorch wants them.
#pragma once

#ifdef AMALGAM_ISA
#error "student_network.h is for files compiled once: AVX-512's copy of its functions could be linked for all"
#endif

#include <cstdint>

#include "lstm_weights.h"
#include "student_step.h"

namespace amalgam::cpu {

inline constexpr int kFeatures = 2;

template <typename T>
StudentNetwork<T> network_of(const PackedLstm<T>& lstm, const StudentConstants& constants,
                             const T* const* head) {
  return {lstm.network(),
          head[0],
          head[1][0],
          static_cast<T>(constants.alpha),
          static_cast<T>(constants.beta1),
          static_cast<T>(constants.beta2),
          static_cast<T>(constants.eps),
          static_cast<T>(1 - constants.beta1),
          static_cast<T>(1 - constants.beta2)};
}

// How many sums a student's weights' gradients are: its layers', then the head's and its bias's.
template <typename T>
int64_t gradient_size(const PackedLstm<T>& lstm) {
  return lstm.gradient_size() + lstm.shapes()[0].hidden + 1;
}

// Writes the sums to one array a weight.
template <typename T>
void unpack_gradients(const PackedLstm<T>& lstm, const double* sums, T* const* d_weights) {
  const int64_t layers = static_cast<int64_t>(lstm.shapes().size());
  const int hidden = lstm.shapes()[0].hidden;
  const double* of_head = lstm.unpack_gradients(sums, d_weights);
  for (int unit = 0; unit < hidden; ++unit) {
    d_weights[3 * layers][unit] = static_cast<T>(of_head[unit]);
  }
  d_weights[3 * layers + 1][0] = static_cast<T>(of_head[hidden]);
}

}  // namespace amalgam::cpu
