// What a warp's sums over coordinates are made of.
#pragma once

namespace amalgam::cuda {

constexpr int kLaneCount = 32;

// From row to row of what a warp stages, of 32 numbers and four to spare: eight rows next to each other
// then lie in different banks.
constexpr int kStageStride = kLaneCount + 4;

// The sum of a warp's values, in its first lane.
template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int offset = kLaneCount / 2; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  return value;
}

// A sum and what it has lost (Kahan): a warp adds thousands of tiles' sums.
struct LongSum {
  float sum = 0.0f, lost = 0.0f;

  __device__ void add(float x) {
    const float mended = __fsub_rn(x, lost);
    const float next = __fadd_rn(sum, mended);
    lost = __fsub_rn(__fsub_rn(next, sum), mended);
    sum = next;
  }
  __device__ double value() const { return double(sum) - double(lost); }
};

__device__ inline float dot(float4 x, float4 y, float onto) {
  onto = __fmaf_rn(x.x, y.x, onto);
  onto = __fmaf_rn(x.y, y.y, onto);
  onto = __fmaf_rn(x.z, y.z, onto);
  return __fmaf_rn(x.w, y.w, onto);
}

// Adds to the sums of four gates.
__device__ inline void add(float4& sums, float4 weight, float x) {
  sums.x = __fmaf_rn(weight.x, x, sums.x);
  sums.y = __fmaf_rn(weight.y, x, sums.y);
  sums.z = __fmaf_rn(weight.z, x, sums.z);
  sums.w = __fmaf_rn(weight.w, x, sums.w);
}

__device__ inline float only(bool inside, float x) { return inside ? x : 0.0f; }

}  // namespace amalgam::cuda
