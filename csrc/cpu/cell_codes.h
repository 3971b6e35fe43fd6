// An LSTM's cells as 8-bit codes; amalgam/operations/cell_codes.py has the arithmetic.
#pragma once

#include <cstdint>

#include "isa.h"

namespace amalgam::cpu {

// So many coordinates are loaded or stored at once, at most.
inline constexpr int64_t kMostCoded = 256;

// A layer's units for some coordinates: `hidden` rows of numbers, and hidden + 1 of codes.
struct CodedRows {
  int hidden;
  int64_t count;    // coordinates
  int64_t stride;   // from row to row of numbers
  int64_t numel;    // from row to row of codes
};

// How numbers are rounded to codes: to nearest, or by half of a place's random bits.
struct CodeRounding {
  bool stochastic;
  uint32_t key;     // of the tensor
  int64_t row;      // of random bits, the first unit's
  int64_t place;    // of the first coordinate
  int shift;        // 16 for the upper half, else 0
};

struct CodeKernels {
  void (*load)(const CodedRows& rows, const int8_t* codes, float* numbers);
  void (*store)(const CodedRows& rows, const CodeRounding& how, const float* numbers, int8_t* codes);
};

#define AMALGAM_DECLARE(isa)     \
  namespace isa {                \
  CodeKernels code_kernels();    \
  }
AMALGAM_FOR_EACH_ISA(AMALGAM_DECLARE)
#undef AMALGAM_DECLARE

}  // namespace amalgam::cpu
