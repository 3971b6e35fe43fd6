#include "teacher_distance.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "launch.cuh"
#include "warp_sums.cuh"

namespace amalgam::cuda {
namespace {
namespace distance {

constexpr int kWarp = kLaneCount;
constexpr int kThreads = 256;
constexpr int kFinalThreads = 512;
constexpr int kPacks = 4;

// What one wide load brings.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// Coordinates of one block. Fixed, so sums do not depend on the device.
template <typename T>
constexpr int kTile = kThreads * kPacks * Pack<T>::kSize;

template <typename T>
int64_t tiles_of(int64_t n) {
  return (n + kTile<T> - 1) / kTile<T>;
}

__device__ bool is_wide(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// First coordinate of this thread's pack number `pack`.
template <typename T>
__device__ int64_t pack_start(int pack) {
  return int64_t{blockIdx.x} * kTile<T> + (pack * kThreads + threadIdx.x) * Pack<T>::kSize;
}

// This thread's coordinates of one row; zeros beyond its end.
template <typename T>
__device__ void load(Pack<T> (&packs)[kPacks], const T* __restrict__ row, int64_t n) {
  if (is_wide(row) && (int64_t{blockIdx.x} + 1) * kTile<T> <= n) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      packs[p] = *reinterpret_cast<const Pack<T>*>(row + pack_start<T>(p));
    }
    return;
  }
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i) {
      const int64_t at = pack_start<T>(p) + i;
      packs[p].values[i] = at < n ? row[at] : T(0);
    }
  }
}

template <typename T>
__device__ void store(T* __restrict__ row, const Pack<T> (&packs)[kPacks], int64_t n) {
  if (is_wide(row) && (int64_t{blockIdx.x} + 1) * kTile<T> <= n) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      *reinterpret_cast<Pack<T>*>(row + pack_start<T>(p)) = packs[p];
    }
    return;
  }
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i) {
      const int64_t at = pack_start<T>(p) + i;
      if (at < n) row[at] = packs[p].values[i];
    }
  }
}

template <bool huber, typename T>
__device__ T penalty(T difference, T delta) {
  const T square = T(0.5) * difference * difference;
  if constexpr (huber) {
    const T size = fabs(difference);
    return size < delta ? square : delta * (size - T(0.5) * delta);
  }
  return square;
}

// Comparisons with NaN are false, so NaN passes through as in torch.clamp.
template <bool huber, typename T>
__device__ T slope(T difference, T delta) {
  if constexpr (huber) {
    difference = difference > delta ? delta : difference;
    difference = difference < -delta ? -delta : difference;
  }
  return difference;
}

// The first of a row's teachers, of (K, Q, N). The next one is Q rows further.
template <typename T>
__device__ T* teachers_of(T* teachers, int64_t row, unsigned teacher_rows, int64_t n) {
  return teachers + static_cast<unsigned>(row) % teacher_rows * n;
}

// First stage, a part of a row a block: each warp leaves one partial sum per teacher; no barrier, no
// atomics.
template <bool huber, typename T>
__global__ void __launch_bounds__(kThreads)
    sum_tiles(const T* __restrict__ students,  // (R, N)
              const T* __restrict__ teachers,  // (K, Q, N)
              double* __restrict__ partials,   // (R, K, P) out
              int64_t n, int64_t k, unsigned teacher_rows, T delta) {
  const int64_t count = int64_t{gridDim.x} * (kThreads / kWarp);
  const int64_t mine = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t row = blockIdx.y, stride = teacher_rows * n;
  const T* own = teachers_of(teachers, row, teacher_rows, n);
  partials += row * k * count;
  Pack<T> at_student[kPacks];
  load(at_student, students + row * n, n);
  for (int64_t teacher = 0; teacher < k; ++teacher) {
    Pack<T> at_teacher[kPacks];
    load(at_teacher, own + teacher * stride, n);
    T sum = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int i = 0; i < Pack<T>::kSize; ++i) {
        sum += penalty<huber>(at_student[p].values[i] - at_teacher[p].values[i], delta);
      }
    }
    const double of_warp = warp_sum(double{sum});
    if (threadIdx.x % kWarp == 0) partials[teacher * count + mine] = of_warp;
  }
}

// Second stage: a block per row and teacher adds its partial sums in a fixed order.
template <typename T>
__global__ void __launch_bounds__(kFinalThreads)
    finish(const double* __restrict__ partials,  // (R, K, count)
           T* __restrict__ distances,            // (R, K) out
           T* __restrict__ totals,               // (R, K) out
           int64_t count, double eps, double log_n) {
  __shared__ double of_warps[kFinalThreads / kWarp];
  const int64_t pair = blockIdx.x;
  double sum = 0;
  for (int64_t at = threadIdx.x; at < count; at += kFinalThreads) {
    sum += partials[pair * count + at];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  const double total = warp_sum(threadIdx.x < kFinalThreads / kWarp ? of_warps[threadIdx.x] : 0.0);
  if (threadIdx.x == 0) {
    totals[pair] = static_cast<T>(total);
    distances[pair] = static_cast<T>(log(total + eps) - log_n);
  }
}

template <bool huber, bool with_teachers, typename T>
__global__ void __launch_bounds__(kThreads)
    gradients(const T* __restrict__ grad,      // (R, K)
              const T* __restrict__ students,  // (R, N)
              const T* __restrict__ teachers,  // (K, Q, N)
              const T* __restrict__ totals,    // (R, K)
              T* __restrict__ in_students,     // (R, N) out
              T* __restrict__ in_teachers,     // (K, 1, N) out
              int64_t n, int64_t k, unsigned teacher_rows, T eps, T delta) {
  const int64_t row = blockIdx.y, stride = teacher_rows * n;
  const T* own = teachers_of(teachers, row, teacher_rows, n);
  grad += row * k;
  totals += row * k;
  Pack<T> at_student[kPacks];
  Pack<T> sums[kPacks] = {};
  load(at_student, students + row * n, n);
  for (int64_t teacher = 0; teacher < k; ++teacher) {
    const T weight = grad[teacher] / (totals[teacher] + eps);
    Pack<T> packs[kPacks];
    load(packs, own + teacher * stride, n);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int i = 0; i < Pack<T>::kSize; ++i) {
        const T weighted =
            weight * slope<huber>(at_student[p].values[i] - packs[p].values[i], delta);
        sums[p].values[i] += weighted;
        packs[p].values[i] = -weighted;
      }
    }
    if constexpr (with_teachers) store(in_teachers + teacher * n, packs, n);
  }
  store(in_students + row * n, sums, n);
}

}  // namespace distance
}  // namespace

template <typename T>
int64_t teacher_distance_partials(int64_t n) {
  return distance::tiles_of<T>(n) * (distance::kThreads / distance::kWarp);
}

template <typename T>
void teacher_distance(const T* students, const T* teachers, T* distances, T* totals,
                      double* partials, int64_t rows, int64_t teacher_rows, int64_t n, int64_t k,
                      double eps, double huber_delta, int device, void* stream) {
  if (rows == 0 || k == 0) return;
  use_device(device);
  const auto tiles = static_cast<unsigned>(distance::tiles_of<T>(n));
  if (tiles > 0) {
    const auto kernel =
        huber_delta >= 0 ? distance::sum_tiles<true, T> : distance::sum_tiles<false, T>;
    launch("teacher_distance, first stage", kernel, dim3(tiles, static_cast<unsigned>(rows)),
           distance::kThreads, stream, students, teachers, partials, n, k, teacher_rows,
           huber_delta);
  }
  launch("teacher_distance, second stage", distance::finish<T>,
         dim3(static_cast<unsigned>(rows * k)), distance::kFinalThreads, stream, partials,
         distances, totals, teacher_distance_partials<T>(n), eps,
         std::log(static_cast<double>(std::max<int64_t>(n, 1))));
}

template <typename T>
void teacher_distance_backward(const T* grad, const T* students, const T* teachers,
                               const T* totals, T* in_students, T* in_teachers, int64_t rows,
                               int64_t teacher_rows, int64_t n, int64_t k, double eps,
                               double huber_delta, int device, void* stream) {
  if (rows == 0 || n == 0) return;
  use_device(device);
  using namespace distance;
  const auto kernel =
      huber_delta >= 0 ? (in_teachers ? gradients<true, true, T> : gradients<true, false, T>)
                      : (in_teachers ? gradients<false, true, T> : gradients<false, false, T>);
  const dim3 blocks(static_cast<unsigned>(tiles_of<T>(n)), static_cast<unsigned>(rows));
  launch("teacher_distance_backward", kernel, blocks, kThreads, stream, grad, students, teachers,
         totals, in_students, in_teachers, n, k, teacher_rows, eps, huber_delta);
}

#define AMALGAM_INSTANTIATE(T)                                                                    \
  template int64_t teacher_distance_partials<T>(int64_t);                                         \
  template void teacher_distance(const T*, const T*, T*, T*, double*, int64_t, int64_t, int64_t,  \
                                 int64_t, double, double, int, void*);                            \
  template void teacher_distance_backward(const T*, const T*, const T*, const T*, T*, T*, int64_t, \
                                          int64_t, int64_t, int64_t, double, double, int, void*);
AMALGAM_INSTANTIATE(float)
AMALGAM_INSTANTIATE(double)
#undef AMALGAM_INSTANTIATE

}  // namespace amalgam::cuda
