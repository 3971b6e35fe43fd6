// The activations on whole arrays, so that tests can hold every float to the exact value.
#pragma once

#include <cstdint>

#include "isa.h"

namespace amalgam::cpu {

using ActivationKernel = void (*)(const float* from, float* to, int64_t count);

struct ActivationKernels {
  ActivationKernel tanh, sigmoid, tanh_slope, exp;  // exp of arguments up to 1
};

#define AMALGAM_DECLARE(isa)              \
  namespace isa {                         \
  ActivationKernels activation_kernels(); \
  }
AMALGAM_FOR_EACH_ISA(AMALGAM_DECLARE)
#undef AMALGAM_DECLARE

}  // namespace amalgam::cpu
