#include "sign_agreement.h"

namespace amalgam::cpu::AMALGAM_ISA {
namespace {

// -1, 0 or 1.
template <typename Bits>
int sign_of(Bits bits, Bits infinity) {
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits(0)) >> 1;
  const Bits magnitude = bits & kMagnitude;
  const int some = magnitude != 0 && magnitude <= infinity;
  return bits > kMagnitude ? -some : some;
}

// A plain loop: compilers make vectors of it.
template <typename First, typename Second>
Signs count_of(const void* first, First first_infinity, const void* second,
               Second second_infinity, int64_t count) {
  const First* one = static_cast<const First*>(first);
  const Second* other = static_cast<const Second*>(second);
  int sum = 0;
  int both = 0;  // have signs
  for (int64_t n = 0; n < count; ++n) {
    const int product =
        sign_of<First>(one[n], first_infinity) * sign_of<Second>(other[n], second_infinity);
    sum += product;
    both += product & 1;
  }
  const int64_t agree = (int64_t{both} + sum) / 2;
  return {agree, both - agree};
}

// Calls `body` with a zero of the unsigned integers that are as wide as a format's numbers.
template <typename Body>
Signs with_bits(int bytes, const Body& body) {
  switch (bytes) {
    case 2: return body(uint16_t());
    case 4: return body(uint32_t());
    default: return body(uint64_t());
  }
}

Signs count(const Numbers& first, const Numbers& second, int64_t length) {
  return with_bits(first.format.bytes, [&](auto one) {
    return with_bits(second.format.bytes, [&](auto other) {
      using First = decltype(one);
      using Second = decltype(other);
      return count_of<First, Second>(first.at, static_cast<First>(first.format.infinity),
                                     second.at, static_cast<Second>(second.format.infinity),
                                     length);
    });
  });
}

}  // namespace

SignAgreement sign_agreement() { return count; }

}  // namespace amalgam::cpu::AMALGAM_ISA
