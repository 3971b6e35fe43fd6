#include "largest_magnitude.h"

#include <algorithm>

namespace amalgam::cpu::AMALGAM_ISA {
namespace {

// A plain loop: compilers make vectors of it.
template <typename Bits>
uint64_t largest_of(const void* values, int64_t count) {
  const Bits* from = static_cast<const Bits*>(values);
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits(0)) >> 1;
  Bits largest = 0;
  for (int64_t n = 0; n < count; ++n) {
    largest = std::max(largest, static_cast<Bits>(from[n] & kMagnitude));
  }
  return largest;
}

uint64_t largest(const void* values, int64_t count, int bytes) {
  switch (bytes) {
    case 2: return largest_of<uint16_t>(values, count);
    case 4: return largest_of<uint32_t>(values, count);
    default: return largest_of<uint64_t>(values, count);
  }
}

}  // namespace

LargestBits largest_bits() { return largest; }

}  // namespace amalgam::cpu::AMALGAM_ISA
