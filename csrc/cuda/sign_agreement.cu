#include "sign_agreement.h"

#include <algorithm>

#include "launch.cuh"
#include "warp_sums.cuh"

namespace amalgam::cuda {
namespace signs {
namespace {

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

struct Signs {
  int agree;
  int disagree;
};

template <typename A, typename B>
__device__ Signs agreement(const void* first, const void* second, A a_infinity, B b_infinity,
                         int64_t start, int64_t end) {
  const A* a = static_cast<const A*>(first);
  const B* b = static_cast<const B*>(second);
  Signs found{0, 0};
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
      const int product = sign_of(ones[i], a_infinity) * sign_of(others[i], b_infinity);
      found.agree += product > 0;
      found.disagree += product < 0;
    }
  }
  return found;
}

// What a function makes of a format's infinity, given as bits as wide as the format's numbers.
template <typename Function>
__device__ Signs with_infinity(Format format, const Function& function) {
  switch (format) {
    case Format::float64:
      return function(uint64_t{0x7ff0000000000000});
    case Format::float32:
      return function(uint32_t{0x7f800000});
    case Format::bfloat16:
      return function(uint16_t{0x7f80});
    default:
      return function(uint16_t{0x7c00});
  }
}

__device__ __forceinline__ void add(int64_t* to, int count) {
  if (count != 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(count));
  }
}

// Each block counts in a part of one pair. Counts are integers, so in any order the same.
__global__ void __launch_bounds__(kThreads)
    agree(const __grid_constant__ Rows rows, int64_t* __restrict__ found) {
  int row = 0;
  for (int beyond = rows.count; beyond - row > 1;) {
    const int middle = (row + beyond) / 2;
    (blockIdx.x < rows.first_block[middle] ? beyond : row) = middle;
  }
  const int64_t start = int64_t{blockIdx.x - rows.first_block[row]} * kBlock;
  const int64_t numel = rows.numel[row];
  const int64_t end = start + kBlock < numel ? start + kBlock : numel;
  const Signs of_thread = with_infinity(rows.first_format[row], [&](auto infinity) {
    return with_infinity(rows.second_format[row], [&](auto other_infinity) {
      return agreement(rows.first[row], rows.second[row], infinity, other_infinity, start, end);
    });
  });
  const Signs of_warp{warp_sum(of_thread.agree), warp_sum(of_thread.disagree)};
  if (threadIdx.x % kLaneCount == 0) {
    add(found + 2 * row, of_warp.agree);
    add(found + 2 * row + 1, of_warp.disagree);
  }
}

}  // namespace
}  // namespace signs

void sign_agreements(const SignPair* pairs, int64_t count, int64_t* found, int device,
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
           found + 2 * begin);
  }
}

}  // namespace amalgam::cuda
