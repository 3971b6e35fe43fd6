#include "student_step.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "check.h"
#include "student_threads.cuh"
#include "student_tiles.cuh"
#include "student_tiles.h"

namespace amalgam::cuda {
namespace {

using Kernel = void (*)(StudentCall);

// How a student's step is launched.
struct Launch {
  StudentSize size;
  int threads;
  Kernel (*kernel)(Stored cells, bool stochastic, bool approximate);
};

// `count` coordinates a thread; at least `blocks` blocks a processor, which bounds registers;
// `unroll` units in the loop's body.
template <int layers, int hidden, int count, int threads, int blocks, int unroll>
constexpr Launch by_threads() {
  const auto kernel = [](Stored cells, bool stochastic, bool approximate) -> Kernel {
    if (cells == Stored::float32) {
      return approximate ? student_threads<layers, hidden, float, false, true, count, threads,
                                           blocks, unroll>
                         : student_threads<layers, hidden, float, false, false, count, threads,
                                           blocks, unroll>;
    }
    if (stochastic) {
      return approximate ? student_threads<layers, hidden, Bfloat16, true, true, count, threads,
                                           blocks, unroll>
                         : student_threads<layers, hidden, Bfloat16, true, false, count, threads,
                                           blocks, unroll>;
    }
    return approximate ? student_threads<layers, hidden, Bfloat16, false, true, count, threads,
                                         blocks, unroll>
                       : student_threads<layers, hidden, Bfloat16, false, false, count, threads,
                                         blocks, unroll>;
  };
  return {{layers, hidden, count * threads}, threads, kernel};
}

// By registers, spills and instructions of the machine code for sm_90.
constexpr Launch kLaunches[] = {
    by_threads<1, 4, 4, 128, 6, 2>(), by_threads<1, 8, 4, 128, 4, 2>(),
    by_threads<1, 16, 4, 128, 3, 1>(), by_threads<2, 4, 4, 128, 3, 1>(),
    by_threads<2, 8, 2, 128, 3, 1>(),
};

[[noreturn]] void refuse(int layers, int hidden, const char* why) {
  throw std::invalid_argument("no step of " + std::to_string(layers) + " layers of " +
                              std::to_string(hidden) + " units is compiled in" + why);
}

const Launch& launch_of(int layers, int hidden) {
  for (const Launch& launch : kLaunches) {
    if (launch.size.layers == layers && launch.size.hidden == hidden) return launch;
  }
  refuse(layers, hidden, "");
}

bool is_on_tensor_cores(int layers, int hidden) {
  return hidden == tiles::kHidden && (layers == 1 || layers == 2);
}

TilesLaunch launch_of_tiles(const StudentKind& kind, bool stochastic) {
  const bool narrow = kind.cells == Stored::bfloat16;
  const auto of = kind.layers == 1 ? (narrow ? tiles_launch<1, Stored::bfloat16>
                                             : tiles_launch<1, Stored::float32>)
                                   : (narrow ? tiles_launch<2, Stored::bfloat16>
                                             : tiles_launch<2, Stored::float32>);
  const TilesLaunch launch = of(kind, stochastic);
  if (!launch.kernel) refuse(kind.layers, kind.hidden, " with such products and activations");
  return launch;
}

unsigned blocks_of(const TilesLaunch& launch, int64_t blocks, int device) {
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "counting processors");
  const int64_t a_block = launch.tile * launch.threads / tiles::kLanes;
  const int64_t all = (blocks * kTileBlock + a_block - 1) / a_block;
  return static_cast<unsigned>(std::min(all, int64_t{processors} * launch.blocks));
}

template <int layers, Products products>
void pack(const StudentWeights& weights, uint32_t* to, bool approximate, cudaStream_t stream) {
  constexpr int words = tiles::Packed<layers, products>::kSize, threads = 128;
  tiles::pack_for_tiles<layers, products>
      <<<(words + threads - 1) / threads, threads, 0, stream>>>(weights, approximate, to);
  check(cudaGetLastError(), "pack_student");
}

// What packs, and how many words, by layers and products.
struct Packing {
  void (*pack)(const StudentWeights&, uint32_t*, bool, cudaStream_t);
  int words;
};

template <int layers>
Packing packing_of(Products products) {
  constexpr Products split = Products::kSplit, tf32 = Products::kTf32, bf16 = Products::kBf16;
  if (products == split) return {pack<layers, split>, tiles::Packed<layers, split>::kSize};
  if (products == tf32) return {pack<layers, tf32>, tiles::Packed<layers, tf32>::kSize};
  return {pack<layers, bf16>, tiles::Packed<layers, bf16>::kSize};
}

Packing packing_of(int layers, Products products) {
  return layers == 1 ? packing_of<1>(products) : packing_of<2>(products);
}

}  // namespace

const std::vector<StudentSize>& student_sizes() {
  static const std::vector<StudentSize> sizes = [] {
    std::vector<StudentSize> all;
    for (const Launch& launch : kLaunches) all.push_back(launch.size);
    for (int layers : {1, 2}) all.push_back({layers, tiles::kHidden, kTileBlock});
    return all;
  }();
  return sizes;
}

int packed_student_words(int layers, int hidden, Products products) {
  return is_on_tensor_cores(layers, hidden) ? packing_of(layers, products).words : 0;
}

void pack_student(const StudentWeights& weights, uint32_t* to, int layers, Products products,
                  bool approximate, int device, void* stream) {
  use_device(device);
  packing_of(layers, products).pack(weights, to, approximate, static_cast<cudaStream_t>(stream));
}

void student_step_in_place(const StudentCall& call, const StudentKind& kind, int device,
                           void* stream) {
  const bool tiles = is_on_tensor_cores(kind.layers, kind.hidden);
  Kernel kernel;
  unsigned blocks;
  int threads;
  use_device(device);
  if (tiles) {
    const TilesLaunch launch = launch_of_tiles(kind, call.stochastic);
    kernel = launch.kernel;
    blocks = blocks_of(launch, call.blocks, device);
    threads = launch.threads;
  } else {
    const Launch& launch = launch_of(kind.layers, kind.hidden);
    kernel = launch.kernel(kind.cells, call.stochastic, kind.approximate);
    blocks = static_cast<unsigned>(call.blocks);
    threads = launch.threads;
  }
  if (call.blocks == 0) return;
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(call);
  check(cudaGetLastError(), "student_step_");
}

}  // namespace amalgam::cuda
