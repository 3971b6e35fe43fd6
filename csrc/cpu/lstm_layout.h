// How an LSTM's weights and a tile's rows lie in memory; shared by compiled-once and per-ISA files.
#pragma once

#include <cstdint>

namespace amalgam::cpu {

inline constexpr int kTile = 64;         // coordinates computed together: four AVX-512 vectors of float
inline constexpr int kRowGroup = 4;      // rows of `in` whose gradients are computed together
inline constexpr int kColumnAlign = 16;  // columns of weight gradients come in whole vectors

// Always inlined, because files for different instruction sets share this header: the linker would
// keep one copy of an inline function, perhaps AVX-512's, for all.
#define AMALGAM_INLINE inline __attribute__((always_inline))

struct LayerShape {
  int inputs;
  int hidden;

  AMALGAM_INLINE int rows() const { return inputs + hidden; }
  // Weights by unit: four biases, then four weights a row of `in`.
  AMALGAM_INLINE int64_t by_unit_size() const { return int64_t(hidden) * 4 * (rows() + 1); }
  // Weights by input: groups of kRowGroup rows, gate by gate, zeros where the last group ends early.
  AMALGAM_INLINE int64_t by_input_size() const {
    return int64_t((rows() + kRowGroup - 1) / kRowGroup) * kRowGroup * 4 * hidden;
  }
  // Columns of the weights' gradients: a row of `in` each, the bias, and padding.
  AMALGAM_INLINE int columns() const { return (rows() + 1 + kColumnAlign - 1) / kColumnAlign * kColumnAlign; }
  AMALGAM_INLINE int64_t gradient_size() const { return int64_t(4) * hidden * columns(); }
};

}  // namespace amalgam::cpu
