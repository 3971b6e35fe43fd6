// Numbers in memory of one type, rows of a tile in another.
#pragma once

#ifdef AMALGAM_ISA
#error "storage.h is for files compiled once: AVX-512's copy of its functions could be linked for all"
#endif

#include <cstdint>
#include <cstring>

#include "lstm_layout.h"

namespace amalgam::cpu {

// How numbers lie in memory.
enum class Storage { float32, float64, bfloat16, float16, int8 };  // int8: cell_codes.h

template <typename T>
constexpr Storage storage_of() {
  return sizeof(T) == 4 ? Storage::float32 : Storage::float64;
}

inline int64_t size_of(Storage storage) {
  switch (storage) {
    case Storage::float64:
      return 8;
    case Storage::float32:
      return 4;
    case Storage::int8:
      return 1;
    default:
      return 2;
  }
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bfloat16(uint16_t half) { return from_bits(uint32_t(half) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_float16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | ((rest & 0x3ff) << 13));
  // Below 2^-14 a half has no leading one: its bits count units of 2^-24.
  if (rest < 0x400) return from_bits(sign | to_bits(static_cast<float>(rest) * 0x1p-24f));
  return from_bits(sign | ((rest << 13) + (uint32_t(112) << 23)));
}

inline uint16_t to_float16(float value) {
  const uint32_t bits = to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t size = bits & 0x7fffffff;
  if (size > 0x7f800000) return sign | 0x7e00;
  if (size >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
  if (size < 0x38800000) {
    // Adding 0.5 leaves the half's subnormal bits, rounded to even, at the sum's end.
    return sign | static_cast<uint16_t>(to_bits(from_bits(size) + 0.5f) - to_bits(0.5f));
  }
  const uint32_t rounded = size + 0xfff + ((size >> 13) & 1);
  return sign | static_cast<uint16_t>((rounded - (uint32_t(112) << 23)) >> 13);
}

template <typename T>
void load_row(Storage storage, const void* from, int64_t at, int64_t count, T* to) {
  switch (storage) {
    case Storage::float32: {
      const float* values = static_cast<const float*>(from) + at;
      for (int64_t n = 0; n < count; ++n) to[n] = static_cast<T>(values[n]);
      return;
    }
    case Storage::float64: {
      const double* values = static_cast<const double*>(from) + at;
      for (int64_t n = 0; n < count; ++n) to[n] = static_cast<T>(values[n]);
      return;
    }
    case Storage::bfloat16: {
      const uint16_t* values = static_cast<const uint16_t*>(from) + at;
      for (int64_t n = 0; n < count; ++n) to[n] = from_bfloat16(values[n]);
      return;
    }
    case Storage::float16: {
      const uint16_t* values = static_cast<const uint16_t*>(from) + at;
      for (int64_t n = 0; n < count; ++n) to[n] = from_float16(values[n]);
      return;
    }
    case Storage::int8:
      return;  // codes have no rows of their own
  }
}

template <typename T>
void store_row(Storage storage, const T* from, int64_t count, void* to, int64_t at) {
  switch (storage) {
    case Storage::float32: {
      float* values = static_cast<float*>(to) + at;
      for (int64_t n = 0; n < count; ++n) values[n] = static_cast<float>(from[n]);
      return;
    }
    case Storage::float64: {
      double* values = static_cast<double*>(to) + at;
      for (int64_t n = 0; n < count; ++n) values[n] = static_cast<double>(from[n]);
      return;
    }
    case Storage::bfloat16: {
      uint16_t* values = static_cast<uint16_t*>(to) + at;
      for (int64_t n = 0; n < count; ++n) values[n] = to_bfloat16(static_cast<float>(from[n]));
      return;
    }
    case Storage::float16: {
      uint16_t* values = static_cast<uint16_t*>(to) + at;
      for (int64_t n = 0; n < count; ++n) values[n] = to_float16(static_cast<float>(from[n]));
      return;
    }
    case Storage::int8:
      return;
  }
}

}  // namespace amalgam::cpu
