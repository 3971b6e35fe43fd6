// How far the signs of two tensors agree; amalgam/operations/sign_agreement.py says what for.
#pragma once

#include <cstdint>

#include "isa.h"

namespace amalgam::cpu {

// A format of IEEE's: how many bytes its numbers have, and the bits of infinity.
struct NumberFormat {
  int bytes;
  uint64_t infinity;
};

struct Numbers {
  const void* at;
  NumberFormat format;
};

// Of each of `count` pairs of tensors the sum of the products of their elements' signs. Zero and
// NaN have none.
void sign_agreements(const Numbers* first, const Numbers* second, const int64_t* numels,
                     int64_t count, double* sums, int threads);

// The same of `count` elements of one pair, fewer than 2^31.
using SignAgreement = int64_t (*)(const Numbers& first, const Numbers& second, int64_t count);

#define AMALGAM_DECLARE(isa)      \
  namespace isa {                 \
  SignAgreement sign_agreement(); \
  }
AMALGAM_FOR_EACH_ISA(AMALGAM_DECLARE)
#undef AMALGAM_DECLARE

}  // namespace amalgam::cpu
