// PTX instructions that a warp's tensor-core code is written in; NaN passes through all of them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace amalgam::cuda {

// Float32 rounded to TF32's 11 bits: tensor cores would truncate.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
#if __CUDA_ARCH__ >= 900
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#endif
  return bits;
}

// Two numbers as bfloat16 in one register, `low` in its lower half.
__device__ __forceinline__ uint32_t to_bf16x2(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// a (16, 8) times b (8, 8), onto c. With q a lane's place in its quad and g its quad, a holds
// (g, q), (g + 8, q), (g, q + 4), (g + 8, q + 4); b (q, g), (q + 4, g); c and d (g, 2q), (g, 2q + 1),
// (g + 8, 2q), (g + 8, 2q + 1).
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1, const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

// Of bfloat16, (16, 16) times (16, 8): every register holds two neighbours of the inner dimension,
// a (g, 2q ...), (g + 8, 2q ...), (g, 2q + 8 ...), (g + 8, 2q + 8 ...); b (2q ..., g), (2q + 8 ..., g).
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1, const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

// Its first half: (16, 8) times (8, 8).
__device__ __forceinline__ void mma_bf16_half(float (&d)[4], const uint32_t (&a)[2], uint32_t b,
                                              const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// `kWords` registers (a power of two, four at most) from and to memory that is used once, where
// `inside`; zeros otherwise. Without a branch, across which nothing could be scheduled.
template <int kWords>
__device__ __forceinline__ void load_once(uint32_t* to, const void* from, bool inside) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4, "as one instruction loads");
  if constexpr (kWords == 1) {
    asm volatile(
        "{.reg .pred p; setp.ne.s32 p, %2, 0; mov.b32 %0, 0; @p ld.global.cs.b32 %0, [%1];}"
        : "=&r"(to[0])
        : "l"(from), "r"(int(inside)));
  } else if constexpr (kWords == 2) {
    asm volatile(
        "{.reg .pred p; setp.ne.s32 p, %3, 0; mov.b32 %0, 0; mov.b32 %1, 0; "
        "@p ld.global.cs.v2.b32 {%0, %1}, [%2];}"
        : "=&r"(to[0]), "=&r"(to[1])
        : "l"(from), "r"(int(inside)));
  } else {
    asm volatile(
        "{.reg .pred p; setp.ne.s32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; "
        "mov.b32 %3, 0; @p ld.global.cs.v4.b32 {%0, %1, %2, %3}, [%4];}"
        : "=&r"(to[0]), "=&r"(to[1]), "=&r"(to[2]), "=&r"(to[3])
        : "l"(from), "r"(int(inside)));
  }
}

template <int kWords>
__device__ __forceinline__ void store_once(void* to, const uint32_t* from, bool inside) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4, "as one instruction stores");
  if constexpr (kWords == 1) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.cs.b32 [%0], %1;}" ::"l"(to),
                 "r"(from[0]), "r"(int(inside))
                 : "memory");
  } else if constexpr (kWords == 2) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %3, 0; @p st.global.cs.v2.b32 [%0], {%1, %2};}" ::"l"(
                     to),
                 "r"(from[0]), "r"(from[1]), "r"(int(inside))
                 : "memory");
  } else {
    asm volatile(
        "{.reg .pred p; setp.ne.s32 p, %5, 0; @p st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};}" ::"l"(
            to),
        "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3]), "r"(int(inside))
        : "memory");
  }
}

// The same for 16 bits.
__device__ __forceinline__ uint16_t load_once(const uint16_t* from, bool inside) {
  uint16_t to;
  asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; mov.b16 %0, 0; @p ld.global.cs.b16 %0, [%1];}"
               : "=&h"(to)
               : "l"(from), "r"(int(inside)));
  return to;
}

__device__ __forceinline__ void store_once(uint16_t* to, uint16_t from, bool inside) {
  asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.cs.b16 [%0], %1;}" ::"l"(to),
               "h"(from), "r"(int(inside))
               : "memory");
}

__device__ __forceinline__ float load_once(const float* from, bool inside) {
  uint32_t to;
  load_once<1>(&to, from, inside);
  return __uint_as_float(to);
}

__device__ __forceinline__ void store_once(float* to, float from, bool inside) {
  const uint32_t bits = __float_as_uint(from);
  store_once<1>(to, &bits, inside);
}

// The same pointer, of which the compiler does not know that: it computes addresses anew from it
// instead of keeping those of before in registers.
template <typename T>
__device__ __forceinline__ T* anew(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

// The value that another lane, or the one whose number differs by these bits, has.
__device__ __forceinline__ float from_lane(float x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}

__device__ __forceinline__ float from_other(float x, int bits) {
  return __shfl_xor_sync(0xffffffffu, x, bits);
}

}  // namespace amalgam::cuda
