// Stochastic rounding to bfloat16; amalgam/operations/rounding.py has the arithmetic.
#pragma once

#ifdef AMALGAM_ISA
#error "rounding.h is for files compiled once: AVX-512's copy of its functions could be linked for all"
#endif

#include <cmath>
#include <cstdint>

#include "mix.h"
#include "storage.h"

namespace amalgam::cpu {

// Where a row's rounding gets its bits: 32 a place, of which a use takes the upper or lower half.
class RowOfBits {
 public:
  RowOfBits(uint32_t tensor_key, int64_t row)
      : key_(mix(tensor_key + static_cast<uint32_t>(row) * 0x9e3779b1u)) {}

  uint32_t at(int64_t place) const {
    const uint64_t wide = static_cast<uint64_t>(place);
    const uint32_t low = static_cast<uint32_t>(wide), high = static_cast<uint32_t>(wide >> 32);
    return mix((low * 0x85ebca77u + high * 0xc2b2ae3du) ^ key_);
  }

 private:
  uint32_t key_;
};

enum class Half { lower = 0, upper = 16 };

template <typename T>
void store_row_stochastically(const RowOfBits& bits, Half half, const T* from, int64_t count,
                              uint16_t* to, int64_t at) {
  for (int64_t n = 0; n < count; ++n) {
    const float value = static_cast<float>(from[n]);
    const uint32_t random = (bits.at(at + n) >> static_cast<int>(half)) & 0xffff;
    to[at + n] = std::isfinite(value) ? static_cast<uint16_t>((to_bits(value) + random) >> 16)
                                      : to_bfloat16(value);
  }
}

// How a row is stored; the bits of row `row` grow from the key.
struct Rounding {
  Storage storage;
  bool stochastic;  // to bfloat16 alone
  uint32_t key;
  int64_t row;
};

// The numbers from place `at` on, of a row that begins at element `first`.
template <typename T>
void store_rounded(const Rounding& how, Half half, const T* from, int64_t count, void* to,
                   int64_t first, int64_t at) {
  if (how.stochastic && how.storage == Storage::bfloat16) {
    uint16_t* row = static_cast<uint16_t*>(to) + first;
    store_row_stochastically(RowOfBits(how.key, how.row), half, from, count, row, at);
  } else {
    store_row(how.storage, from, count, to, first + at);
  }
}

}  // namespace amalgam::cpu
