// The largest magnitude in many tensors; amalgam/operations/largest_magnitude.py says what for.
//
// Without their sign, numbers of IEEE's formats are ordered as their bits are, infinity above all
// and NaN above infinity: so this is a maximum of integers.
#pragma once

#include <cstdint>

#include "isa.h"

namespace amalgam::cpu {

// Bits of the largest magnitude in `count` tensors of numbers of 2, 4 or 8 bytes; 0 in none.
uint64_t largest_magnitude(const void* const* tensors, const int64_t* numels, int64_t count,
                           int bytes, int threads);

using LargestBits = uint64_t (*)(const void* values, int64_t count, int bytes);

#define AMALGAM_DECLARE(isa) \
  namespace isa {            \
  LargestBits largest_bits(); \
  }
AMALGAM_FOR_EACH_ISA(AMALGAM_DECLARE)
#undef AMALGAM_DECLARE

}  // namespace amalgam::cpu
