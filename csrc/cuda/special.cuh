// Special functions of NVIDIA's GPUs, an instruction or two each; compiled for the host, by which
// tests run kernels, what these approximate.
#pragma once

#ifndef __CUDACC__
#include <cmath>
#endif

namespace amalgam::cuda {

#ifdef __CUDACC__

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Of denormal numbers, too.
__device__ inline float root_approx(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The number itself, of which the compiler does not know that: adding -0 changes nothing, and it
// does not see through it.
__device__ inline float anew(float x) {
  asm volatile("add.f32 %0, %0, 0f80000000;" : "+f"(x));
  return x;
}

// Where the compiler may carry nothing across that it has read from memory.
__device__ inline void forget_memory() { asm volatile("" ::: "memory"); }

#else

inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float tanh_approx(float x) { return std::tanh(x); }
inline float root_approx(float x) { return std::sqrt(x); }
inline float anew(float x) { return x; }
inline void forget_memory() {}

#endif

}  // namespace amalgam::cuda
