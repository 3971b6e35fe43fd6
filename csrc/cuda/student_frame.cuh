// What every kernel of the student's step in place does around its LSTM: find the block's tensor,
// bring numbers in and out, and follow the moments.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "pack.cuh"
#include "rounding.cuh"
#include "student_step.h"

namespace amalgam::cuda {

// A bfloat16 by its bits, so that it converts without a library.
struct Bfloat16 {
  uint16_t bits;
};

// Neighbouring numbers as they lie in memory, so that none is waited for before the last is asked
// for.
template <typename T, int count>
struct Raw;

template <int count>
struct Raw<float, count> {
  Pack<float, count> pack;

  __device__ void load(const float* from) {
    pack = *reinterpret_cast<const Pack<float, count>*>(from);
  }
  __device__ float operator[](int i) const { return pack.values[i]; }
};

template <int count>
struct Raw<Bfloat16, count> {
  Pack<uint32_t, count / 2> pack;

  __device__ void load(const Bfloat16* from) {
    pack = *reinterpret_cast<const Pack<uint32_t, count / 2>*>(from);
  }
  __device__ float operator[](int i) const {
    return __uint_as_float(i % 2 ? word(i / 2) & 0xffff0000u : word(i / 2) << 16);
  }
  __device__ uint32_t word(int i) const { return pack.values[i]; }
};

template <>
struct Raw<Bfloat16, 1> {
  uint16_t bits;

  __device__ void load(const Bfloat16* from) { bits = from->bits; }
  __device__ float operator[](int) const { return __uint_as_float(word(0) << 16); }
  __device__ uint32_t word(int) const { return bits; }
};

template <int count>
__device__ void store(float* to, const float (&values)[count]) {
  Pack<float, count> pack;
#pragma unroll
  for (int i = 0; i < count; ++i) pack.values[i] = values[i];
  *reinterpret_cast<Pack<float, count>*>(to) = pack;
}

// Rounds to nearest.
template <int count>
__device__ void store(Bfloat16* to, const float (&values)[count]) {
  if constexpr (count == 1) {
    to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(values[0]));
  } else {
    Pack<__nv_bfloat162, count / 2> pack;
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      pack.values[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
    }
    *reinterpret_cast<Pack<__nv_bfloat162, count / 2>*>(to) = pack;
  }
}

// A parameter or gradient, whose storage is known at run time: all threads take the same branch.
// Apart from that of reading, so that nothing waits between two loads.
template <int count>
struct RawOf {
  Raw<float, count> raw;  // of narrow storage, the first half is used

  __device__ void load(const void* from, Stored stored, int64_t at) {
    if (stored == Stored::float32) {
      raw.load(static_cast<const float*>(from) + at);
    } else {
      Raw<Bfloat16, count> narrow;
      narrow.load(static_cast<const Bfloat16*>(from) + at);
#pragma unroll
      for (int i = 0; i < (count + 1) / 2; ++i) raw.pack.values[i] = __uint_as_float(narrow.word(i));
    }
  }

  __device__ void read(Stored stored, float (&values)[count]) const {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const uint32_t two = __float_as_uint(raw[i / 2]);
      if (stored == Stored::float32) {
        values[i] = raw[i];
      } else if (stored == Stored::bfloat16) {
        values[i] = __uint_as_float(i % 2 ? two & 0xffff0000u : two << 16);
      } else {
        values[i] = __half2float(__ushort_as_half(static_cast<uint16_t>(i % 2 ? two >> 16 : two)));
      }
    }
  }
};

template <int count>
__device__ void store(void* to, Stored stored, int64_t at, const float (&values)[count]) {
  if (stored == Stored::float32) {
    store(static_cast<float*>(to) + at, values);
  } else if (stored == Stored::bfloat16) {
    store(static_cast<Bfloat16*>(to) + at, values);
  } else {
    Pack<__half, count> pack;
#pragma unroll
    for (int i = 0; i < count; ++i) pack.values[i] = __float2half_rn(values[i]);
    *reinterpret_cast<Pack<__half, count>*>(static_cast<__half*>(to) + at) = pack;
  }
}

// A row of the table, and which of its coordinates come first in this block.
struct StudentTensor {
  void* param;
  const void* grad;
  void* m;
  void* v;
  void* h;
  void* c;
  int64_t numel;
  const float* step;
  int64_t seed;
  int64_t first;
  int64_t place;  // among biases and corrections
};

constexpr int kColumns = 9;

// What the table holds is global memory, which the compiler can't know: generic accesses cost more.
template <typename T>
__device__ T* global(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

__device__ inline StudentTensor with_global(StudentTensor tensor) {
  return {global(tensor.param), global(tensor.grad), global(tensor.m), global(tensor.v),
          global(tensor.h),     global(tensor.c),    tensor.numel,     tensor.step,
          tensor.seed,          tensor.first,     tensor.place};
}

// Which tensor a block belongs to.
__device__ inline int index_of(const StudentCall& call, int64_t block) {
  int index = 0;
#pragma unroll 1
  for (int after = call.count; after - index > 1;) {
    const int middle = (index + after) / 2;
    if (call.first_block[middle] <= block) {
      index = middle;
    } else {
      after = middle;
    }
  }
  return index;
}

// For a warp: its lanes write what this block's tensor is. A barrier must follow.
__device__ inline void find_tensor(const StudentCall& call, int block, StudentTensor* tensor) {
  const int index = index_of(call, blockIdx.x);
  const int lane = threadIdx.x % 32;
  auto* const columns = reinterpret_cast<int64_t*>(tensor);
  if (lane < kColumns) columns[lane] = call.table[int64_t{index} * kColumns + lane];
  if (lane == kColumns) columns[lane] = (int64_t{blockIdx.x} - call.first_block[index]) * block;
  if (lane == kColumns + 1) columns[lane] = call.places ? call.places[index] : 0;
}

// Whether `count` neighbouring numbers can be read and written at once, everywhere in the tensor.
__device__ inline bool is_wide(const StudentTensor& tensor, int count) {
  const auto addresses = reinterpret_cast<uintptr_t>(tensor.param) |
                         reinterpret_cast<uintptr_t>(tensor.grad) |
                         reinterpret_cast<uintptr_t>(tensor.m) |
                         reinterpret_cast<uintptr_t>(tensor.v) |
                         reinterpret_cast<uintptr_t>(tensor.h) |
                         reinterpret_cast<uintptr_t>(tensor.c);
  return addresses % 16 == 0 && tensor.numel % count == 0;
}

// What the nominal form multiplies moments by, so that they forget that they began at zero, and
// updates: alpha times the tensor's pace.
struct Corrections {
  float of_m, of_v, alpha;
};

// By what a parameter moves in this step.
struct Rates {
  float keep, lr;
  float warm;  // instead of lr, of a step of SGD
  bool is_warm;
  uint32_t key;
};

__device__ inline Rates rates_of(const StudentCall& call, const StudentTensor& tensor) {
  Rates rates{call.keep, call.lr, 0.0f, false, 0};
  const float step = tensor.step ? *global(tensor.step) : 0.0f;
  if (call.control) {
    rates.keep = static_cast<float>(call.control[0]);
    rates.lr = static_cast<float>(call.control[1]);
    rates.warm = static_cast<float>(call.control[2]);
    rates.is_warm = step < static_cast<float>(call.warmup_steps);
  }
  if (call.stochastic) rates.key = key_of(static_cast<uint32_t>(tensor.seed), step);
  return rates;
}

// Multiplications and additions are named one by one here and in the kernels: left to the compiler,
// which of them it fuses would differ between storages, and so would the last bit.
__device__ inline void follow(const StudentCall& call, float g, float& m, float& v) {
  m = __fmaf_rn(call.beta1, m, __fmul_rn(call.of_grad, g));
  v = __fmaf_rn(call.beta2, v, __fmul_rn(call.of_square, __fmul_rn(g, g)));
}

// The network's two inputs.
__device__ inline void features(const StudentCall& call, float g, float m, float v, float& of_m,
                                float& of_g) {
  const float scale = rsqrtf(__fmaf_rn(v, call.per_v, call.eps));
  of_m = __fmul_rn(__fmul_rn(m, call.per_m), scale);
  of_g = __fmul_rn(g, scale);
}

// keep p - rate update as it is to be stored; `row` is the parameter's among the rows of random
// bits.
template <int count>
__device__ void moved(const StudentCall& call, const Rates& rates, float rate, int row, int64_t at,
                      const float (&old)[count], const float (&update)[count],
                      float (&to)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    to[i] = __fmaf_rn(-rate, update[i], __fmul_rn(rates.keep, old[i]));
  }
  if (call.stochastic && call.param == Stored::bfloat16) {
    const uint32_t key = key_of_row(rates.key, row);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      to[i] = rounded(to[i], random_bits(key, counted(at + i)) >> 16);
    }
  }
}

template <int count>
__device__ void move(const StudentCall& call, const StudentTensor& tensor, const Rates& rates,
                     float rate, int row, int64_t at, const float (&old)[count],
                     const float (&update)[count]) {
  float to[count];
  moved(call, rates, rate, row, at, old, update, to);
  store(tensor.param, call.param, at, to);
}

}  // namespace amalgam::cuda
