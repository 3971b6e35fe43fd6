// Stochastic rounding to bfloat16; amalgam/operations/rounding.py has the arithmetic.
#pragma once

#include <cstdint>

namespace amalgam::cuda {

__device__ inline uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ (x >> 16);
}

__device__ inline uint32_t key_of(uint32_t seed, float step) {
  return mix(mix(seed) + static_cast<uint32_t>(static_cast<int>(step)));
}

__device__ inline uint32_t key_of_row(uint32_t key, int row) {
  return mix(key + static_cast<uint32_t>(row) * 0x9e3779b1u);
}

// Of a place, what all its rows share.
__device__ inline uint32_t counted(int64_t place) {
  const auto wide = static_cast<uint64_t>(place);
  return static_cast<uint32_t>(wide) * 0x85ebca77u + static_cast<uint32_t>(wide >> 32) * 0xc2b2ae3du;
}

// 32 bits, of which a use takes the upper or the lower half.
__device__ inline uint32_t random_bits(uint32_t row_key, uint32_t counted) {
  return mix(counted ^ row_key);
}

// What rounding to nearest leaves as it is; NaN and infinity stay.
__device__ inline float rounded(float value, uint32_t sixteen_bits) {
  const uint32_t raw = __float_as_uint(value);
  const bool finite = (raw & 0x7f800000u) != 0x7f800000u;
  return finite ? __uint_as_float((raw + sixteen_bits) & 0xffff0000u) : value;
}

}  // namespace amalgam::cuda
