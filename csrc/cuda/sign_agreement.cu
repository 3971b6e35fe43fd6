#include "sign_agreement.h"

#include <algorithm>

#include "launch.cuh"

namespace amalgam::cuda {
namespace signs {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kBlock = 1 << 14;  // elements
constexpr int kAtOnce = 4;       // loads of a thread on their way
constexpr int kRows = 136;       // pairs of one launch: as many as its parameters' 4 KB hold

// Pairs of one launch travel as its parameters: there is no table to be copied to the device.
struct Rows {
  const void* first[kRows];
  const void* second[kRows];
  int64_t numel[kRows];
  unsigned first_block[kRows + 1];  // of each, and how many there are
  Format first_format[kRows];
  Format second_format[kRows];
  int count;
};
static_assert(sizeof(Rows) + sizeof(int64_t*) <= 4096, "as parameters of a kernel");

// 1, -1 or 0 of a number's bits.
template <typename Bits>
__device__ __forceinline__ int sign_of(Bits bits, Bits infinity) {
  constexpr int kSign = 8 * sizeof(Bits) - 1;
  const Bits size = static_cast<Bits>(bits & ((Bits(1) << kSign) - 1));
  const int sign = bits >> kSign ? -1 : 1;
  return size != 0 && size <= infinity ? sign : 0;
}

template <typename A, typename B>
__device__ int agreement(const void* first, const void* second, A a_infinity, B b_infinity,
                         int64_t start, int64_t end) {
  const A* a = static_cast<const A*>(first);
  const B* b = static_cast<const B*>(second);
  int sum = 0;
  for (int64_t at = start + threadIdx.x; at < end; at += kThreads * kAtOnce) {
    A ones[kAtOnce];
    B others[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t here = at + i * kThreads;
      ones[i] = here < end ? a[here] : A(0);
      others[i] = here < end ? b[here] : B(0);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      sum += sign_of(ones[i], a_infinity) * sign_of(others[i], b_infinity);
    }
  }
  return sum;
}

template <typename A>
__device__ int agreement_with(const Rows& rows, int row, A infinity, int64_t start, int64_t end) {
  const void* first = rows.first[row];
  const void* second = rows.second[row];
  switch (rows.second_format[row]) {
    case Format::float64:
      return agreement<A, uint64_t>(first, second, infinity, 0x7ff0000000000000, start, end);
    case Format::float32:
      return agreement<A, uint32_t>(first, second, infinity, 0x7f800000, start, end);
    case Format::bfloat16:
      return agreement<A, uint16_t>(first, second, infinity, 0x7f80, start, end);
    default:
      return agreement<A, uint16_t>(first, second, infinity, 0x7c00, start, end);
  }
}

// Each block adds up a part of one pair. Sums are of integers, so in any order the same.
__global__ void __launch_bounds__(kThreads)
    agree(const __grid_constant__ Rows rows, int64_t* __restrict__ sums) {
  int row = 0;
  for (int beyond = rows.count; beyond - row > 1;) {
    const int middle = (row + beyond) / 2;
    (blockIdx.x < rows.first_block[middle] ? beyond : row) = middle;
  }
  const int64_t start = int64_t{blockIdx.x - rows.first_block[row]} * kBlock;
  const int64_t numel = rows.numel[row];
  const int64_t end = start + kBlock < numel ? start + kBlock : numel;
  int sum = 0;
  switch (rows.first_format[row]) {
    case Format::float64:
      sum = agreement_with<uint64_t>(rows, row, 0x7ff0000000000000, start, end);
      break;
    case Format::float32:
      sum = agreement_with<uint32_t>(rows, row, 0x7f800000, start, end);
      break;
    case Format::bfloat16:
      sum = agreement_with<uint16_t>(rows, row, 0x7f80, start, end);
      break;
    default:
      sum = agreement_with<uint16_t>(rows, row, 0x7c00, start, end);
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum += __shfl_down_sync(0xffffffffu, sum, offset);
  }
  if (threadIdx.x % kWarp == 0 && sum != 0) {
    // Two's complement: adding as unsigned is adding as signed.
    atomicAdd(reinterpret_cast<unsigned long long*>(sums + row),
              static_cast<unsigned long long>(static_cast<long long>(sum)));
  }
}

}  // namespace
}  // namespace signs

void sign_agreements(const SignPair* pairs, int64_t count, int64_t* sums, int device,
                     void* stream) {
  using signs::kBlock;
  using signs::kRows;
  use_device(device);
  for (int64_t begin = 0; begin < count; begin += kRows) {
    signs::Rows rows{};
    rows.count = static_cast<int>(std::min<int64_t>(kRows, count - begin));
    for (int row = 0; row < rows.count; ++row) {
      const SignPair& pair = pairs[begin + row];
      rows.first[row] = pair.first;
      rows.second[row] = pair.second;
      rows.numel[row] = pair.numel;
      rows.first_format[row] = pair.first_format;
      rows.second_format[row] = pair.second_format;
      const auto blocks = static_cast<unsigned>((pair.numel + kBlock - 1) / kBlock);
      rows.first_block[row + 1] = rows.first_block[row] + blocks;
    }
    const unsigned blocks = rows.first_block[rows.count];
    if (blocks == 0) continue;
    launch("sign_agreement", signs::agree, dim3(blocks), signs::kThreads, stream, rows,
           sums + begin);
  }
}

}  // namespace amalgam::cuda
