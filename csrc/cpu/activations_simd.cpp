#include "activations.h"

#include "activation_sweep.h"

namespace amalgam::cpu::AMALGAM_ISA {
namespace {

template <Vector<float> (*function)(Vector<float>)>
void apply(const float* from, float* to, int64_t count) {
  for (int64_t at = 0; at < count; at += kLanes<float>) {
    const int64_t rest = count - at;
    float in[kLanes<float>] = {}, out[kLanes<float>];
    const int64_t size = (rest < kLanes<float> ? rest : kLanes<float>) * sizeof(float);
    __builtin_memcpy(in, from + at, size);
    store(out, function(load(in)));
    __builtin_memcpy(to + at, out, size);
  }
}

}  // namespace

ActivationKernels activation_kernels() {
  return {apply<tanh>, apply<sigmoid>, apply<tanh_slope>, apply<exp<1>>};
}

}  // namespace amalgam::cpu::AMALGAM_ISA
