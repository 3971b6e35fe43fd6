// MurmurHash3's finalizer, of a number or of a vector's; amalgam/operations/rounding.py says what for.
#pragma once

#include "lstm_layout.h"

namespace amalgam::cpu {

template <typename Word>
AMALGAM_INLINE Word mix(Word x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ (x >> 16);
}

}  // namespace amalgam::cpu
