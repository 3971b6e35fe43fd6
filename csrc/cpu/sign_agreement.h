// In how many signs two tensors agree; amalgam/operations/sign_agreement.py says what for.
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

// How many elements agree in sign, and how many do not.
struct Signs {
  int64_t agree;
  int64_t disagree;
};

// Of each of `count` pairs of tensors. Zero and NaN have no sign.
void sign_agreements(const Numbers* first, const Numbers* second, const int64_t* numels,
                     int64_t count,
                     double* found,  // (count, 2)
                     int threads);

// The same of `count` elements of one pair, fewer than 2^31.
using SignAgreement = Signs (*)(const Numbers& first, const Numbers& second, int64_t count);

#define AMALGAM_DECLARE(isa)      \
  namespace isa {                 \
  SignAgreement sign_agreement(); \
  }
AMALGAM_FOR_EACH_ISA(AMALGAM_DECLARE)
#undef AMALGAM_DECLARE

}  // namespace amalgam::cpu
