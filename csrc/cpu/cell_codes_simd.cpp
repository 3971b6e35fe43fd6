#include "cell_codes.h"

#include "mix.h"

// Plain loops: compilers make vectors of them.
namespace amalgam::cpu::AMALGAM_ISA {
namespace {

constexpr int kNotFinite = 127;      // in the exponent's place
constexpr int kCodeBits = 6;         // 2 to this is the least size of a block's largest code
constexpr int kLeastExponent = -126;
constexpr int kMostCode = 127;
constexpr int32_t kInfinity = 0x7f800000;

inline int32_t bits_of(float value) {
  int32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bits(int32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline int32_t magnitude(float value) { return bits_of(value) & 0x7fffffff; }
inline float power_of_two(int exponent) { return from_bits((exponent + 127) * (1 << 23)); }

void load(const CodedRows& rows, const int8_t* codes, float* numbers) {
  float scales[kMostCoded];
  const int8_t* exponents = codes + rows.hidden * rows.numel;
  for (int64_t n = 0; n < rows.count; ++n) {
    const float scale = power_of_two(exponents[n]);
    scales[n] = exponents[n] == kNotFinite ? __builtin_nanf("") : scale;
  }
  for (int unit = 0; unit < rows.hidden; ++unit) {
    const int8_t* __restrict from = codes + unit * rows.numel;
    float* __restrict to = numbers + unit * rows.stride;
    for (int64_t n = 0; n < rows.count; ++n) to[n] = from[n] * scales[n];
  }
}

// Codes of numbers whose sizes in steps are rounded by `round(size, n)`.
template <typename Round>
inline void put(const float* __restrict from, const float* inverses, int64_t count,
                int8_t* __restrict to, const Round& round) {
  for (int64_t n = 0; n < count; ++n) {
    const float value = from[n], size = __builtin_fabsf(value) * inverses[n];
    const int32_t steps = round(inverses[n] == 0.0f ? 0.0f : size, n);
    const int32_t code = steps < kMostCode ? steps : kMostCode;
    to[n] = static_cast<int8_t>(value < 0 ? -code : code);
  }
}

void store(const CodedRows& rows, const CodeRounding& how, const float* numbers, int8_t* codes) {
  const int64_t count = rows.count;
  int32_t largest[kMostCoded] = {};
  for (int unit = 0; unit < rows.hidden; ++unit) {
    const float* from = numbers + unit * rows.stride;
    for (int64_t n = 0; n < count; ++n) {
      const int32_t size = magnitude(from[n]);
      largest[n] = largest[n] < size ? size : largest[n];
    }
  }
  float inverses[kMostCoded];  // 0 where all codes are
  int8_t* exponents = codes + rows.hidden * rows.numel;
  for (int64_t n = 0; n < count; ++n) {
    const int exponent = (largest[n] >> 23) - 127 - kCodeBits;
    const bool finite = largest[n] < kInfinity, small = exponent < kLeastExponent;
    inverses[n] = !finite || small ? 0.0f : power_of_two(small ? 0 : -exponent);
    exponents[n] = static_cast<int8_t>(!finite ? kNotFinite : small ? 0 : exponent);
  }
  for (int unit = 0; unit < rows.hidden; ++unit) {
    const float* from = numbers + unit * rows.stride;
    int8_t* to = codes + unit * rows.numel;
    if (how.stochastic) {
      const uint32_t key = mix(how.key + static_cast<uint32_t>(how.row + unit) * 0x9e3779b1u);
      put(from, inverses, count, to, [&](float size, int64_t n) {
        const uint64_t place = static_cast<uint64_t>(how.place + n);
        const uint32_t low = static_cast<uint32_t>(place), high = static_cast<uint32_t>(place >> 32);
        const uint32_t bits = mix((low * 0x85ebca77u + high * 0xc2b2ae3du) ^ key);
        const int32_t half = static_cast<int32_t>((bits >> how.shift) & 0xffff);
        return static_cast<int32_t>(size + static_cast<float>(half) * 0x1p-16f);
      });
    } else {
      put(from, inverses, count, to, [](float size, int64_t) {
        return static_cast<int32_t>((size + 0x1p23f) - 0x1p23f);  // whole numbers alone lie there
      });
    }
  }
}

}  // namespace

CodeKernels code_kernels() { return {load, store}; }

}  // namespace amalgam::cpu::AMALGAM_ISA
