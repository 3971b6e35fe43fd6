// As much of CUDA as csrc/cuda takes, on the host: kernels run there, a block after another, and what
// they compute can be held to the reference where no GPU is. A block's threads are fibers: one runs
// until it waits for others, then the next. So all of it is computed in one order, always the same.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __builtin_assume(condition) static_cast<void>(0)
#define __isGlobal(pointer) true

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// --- The runtime ---

using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorNoKernelImageForDevice = 209;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "of the host"; }
inline const char* cudaGetErrorString(cudaError_t) { return "of the host"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }

// Few, so that blocks share work and each takes several parts of it.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 2, cudaSuccess;
}

// --- A block ---

namespace on_host {

constexpr int kWarp = 32;
constexpr size_t kStack = 1 << 18;

// Where threads wait until all that are expected have come.
struct Barrier {
  int expected = 0, arrived = 0, turn = 0;

  void leave() {
    --expected;
    release();
  }
  void release() {
    if (arrived < expected || expected == 0) return;
    arrived = 0;
    ++turn;
  }
};

struct Warp {
  Barrier barrier;
  uint32_t values[kWarp];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Warp> warps;
inline Barrier of_block;
inline ucontext_t scheduler;
inline std::function<void()> kernel;

inline void yield() {
  const unsigned thread = threadIdx.x;
  swapcontext(&fibers[thread]->context, &scheduler);
  threadIdx.x = thread;
}

inline void wait(Barrier& barrier) {
  const int turn = barrier.turn;
  ++barrier.arrived;
  barrier.release();
  while (barrier.turn == turn) yield();
}

inline void run_thread() {
  kernel();
  const unsigned thread = threadIdx.x;
  warps[thread / kWarp].barrier.leave();
  of_block.leave();
  fibers[thread]->done = true;
  setcontext(&scheduler);
}

inline void run_block(int threads) {
  while (static_cast<int>(fibers.size()) < threads) fibers.emplace_back(new Fiber);
  warps.assign((threads + kWarp - 1) / kWarp, {});
  of_block = {threads};
  for (int thread = 0; thread < threads; ++thread) {
    Fiber& fiber = *fibers[thread];
    ++warps[thread / kWarp].barrier.expected;
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, run_thread, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (int thread = 0; thread < threads; ++thread) {
      if (fibers[thread]->done) continue;
      any = true;
      threadIdx.x = thread;
      swapcontext(&scheduler, &fibers[thread]->context);
    }
  }
}

// What another lane of the warp has; all lanes ask at once.
inline uint32_t from_lane(uint32_t value, int lane) {
  Warp& warp = warps[threadIdx.x / kWarp];
  warp.values[threadIdx.x % kWarp] = value;
  wait(warp.barrier);
  const uint32_t found = warp.values[lane % kWarp];
  wait(warp.barrier);
  return found;
}

template <typename T>
T word_by_word(T value, int lane) {
  uint32_t words[sizeof(T) / 4];
  std::memcpy(words, &value, sizeof(T));
  for (uint32_t& word : words) word = from_lane(word, lane);
  std::memcpy(&value, words, sizeof(T));
  return value;
}

}  // namespace on_host

inline void __syncthreads() { on_host::wait(on_host::of_block); }

inline void __syncwarp(unsigned = 0xffffffffu) {
  on_host::wait(on_host::warps[threadIdx.x / on_host::kWarp].barrier);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int bits) {
  return on_host::word_by_word(value, static_cast<int>(threadIdx.x % on_host::kWarp) ^ bits);
}

template <typename T>
T __shfl_down_sync(unsigned, T value, int by) {
  const int lane = static_cast<int>(threadIdx.x % on_host::kWarp), from = lane + by;
  return on_host::word_by_word(value, from < on_host::kWarp ? from : lane);
}

// One thread of the host runs all of a kernel's.
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long value) {
  const unsigned long long before = *to;
  *to += value;
  return before;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  on_host::kernel = [=] { kernel(Parameters(arguments)...); };
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        on_host::run_block(static_cast<int>(blockDim.x));
      }
    }
  }
  return cudaSuccess;
}

// --- Arithmetic: as named, each operation rounded once ---

inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }
inline double __ddiv_rn(double x, double y) { return x / y; }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::fabs;

template <typename To, typename From>
To as_bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline uint32_t __float_as_uint(float x) { return as_bits_of<uint32_t>(x); }
inline int __float_as_int(float x) { return as_bits_of<int>(x); }
inline float __uint_as_float(uint32_t x) { return as_bits_of<float>(x); }
inline float __int_as_float(int x) { return as_bits_of<float>(x); }
inline long long __double_as_longlong(double x) { return as_bits_of<long long>(x); }
inline double __longlong_as_double(long long x) { return as_bits_of<double>(x); }

struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// --- Narrow numbers ---

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct __half {
  _Float16 value;
};

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t raw = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((raw + 0x7fffu + (raw >> 16 & 1)) >> 16)};
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __half __ushort_as_half(uint16_t x) { return as_bits_of<__half>(x); }
inline float __half2float(__half x) { return x.value; }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
