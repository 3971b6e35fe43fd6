// Vectors of the instruction set this file is compiled for, by the compilers' vector extensions.
//
// Files that include it include no standard header with inline functions: of an inline function that
// several files compile, the linker keeps one copy, and one compiled with AVX-512 would crash a
// machine without it.
#pragma once

#ifndef AMALGAM_ISA
#error "simd.h is for *_simd.cpp, which setup.py compiles once per instruction set with AMALGAM_ISA"
#endif

#include <cstdint>

namespace amalgam::cpu::AMALGAM_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

// Loops advance by a chunk of several vectors: independent sums hide the latency of addition. It
// has one size for all instruction sets, so they all sum in the same order.
inline constexpr int kChunkBytes = 128;
inline constexpr int kVectors = kChunkBytes / kVectorBytes;

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

template <int bytes>
struct IntOf;
template <>
struct IntOf<4> {
  typedef int32_t type;
};
template <>
struct IntOf<8> {
  typedef int64_t type;
};

template <typename T>
inline constexpr int kLanes = kVectorBytes / sizeof(T);
template <typename T>
inline constexpr int kChunk = kChunkBytes / sizeof(T);

template <typename T>
inline Vector<T> load(const T* from) {
  Vector<T> vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

template <typename T>
inline void store(T* to, const Vector<T>& vector) {
  __builtin_memcpy(to, &vector, sizeof vector);
}

// Lane (i, j) of kLanes vectors to lane (j, i): blocks swap across the diagonal, then blocks in them.
template <typename T>
inline void transpose_square(Vector<T>* rows) {
  typedef typename IntOf<sizeof(T)>::type Indices __attribute__((vector_size(kVectorBytes)));
  for (int half = kLanes<T> / 2; half; half /= 2) {
    Indices low, high;
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      low[lane] = lane & half ? kLanes<T> + lane - half : lane;
      high[lane] = lane & half ? kLanes<T> + lane : lane + half;
    }
    for (int row = 0; row < kLanes<T>; ++row) {
      if (row & half) continue;
      const Vector<T> a = rows[row], b = rows[row + half];
      rows[row] = __builtin_shuffle(a, b, low);
      rows[row + half] = __builtin_shuffle(a, b, high);
    }
  }
}

template <typename T>
inline Vector<T> splat(T value) {
  return value - Vector<T>{};
}

}  // namespace amalgam::cpu::AMALGAM_ISA
