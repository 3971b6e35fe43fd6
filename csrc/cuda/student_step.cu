#include "student_step.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "launch.cuh"
#include "student_threads.h"
#include "student_tiles.cuh"
#include "student_tiles.h"

namespace amalgam::cuda {
namespace {

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
  if (!launch.kernel) {
    throw std::invalid_argument("no step of " + std::to_string(kind.layers) + " layers of " +
                                std::to_string(kind.hidden) +
                                " units is compiled in with such products and activations");
  }
  return launch;
}

unsigned blocks_of(const TilesLaunch& launch, int64_t blocks, int device) {
  const int64_t a_block = launch.tile * launch.threads / tiles::kLanes;
  return sharing_blocks((blocks * kTileBlock + a_block - 1) / a_block, launch.blocks, device);
}

template <int layers, Products products>
void pack(const StudentWeights& weights, uint32_t* to, bool approximate, void* stream) {
  constexpr int words = tiles::Packed<layers, products>::kSize, threads = 128;
  launch("pack_student", tiles::pack_for_tiles<layers, products>, (words + threads - 1) / threads,
         threads, stream, weights, approximate, to);
}

// What packs, and how many words, by layers and products.
struct Packing {
  void (*pack)(const StudentWeights&, uint32_t*, bool, void*);
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

const std::vector<StudentSize>& student_sizes(bool nominal) {
  static const std::vector<StudentSize> of_rnnprop = [] {
    std::vector<StudentSize> all = sizes_by_threads(false);
    for (int layers : {1, 2}) all.push_back({layers, tiles::kHidden, kTileBlock});
    return all;
  }();
  static const std::vector<StudentSize> of_nominal = sizes_by_threads(true);
  return nominal ? of_nominal : of_rnnprop;
}

int packed_student_words(int layers, int hidden, Products products) {
  return is_on_tensor_cores(layers, hidden) ? packing_of(layers, products).words : 0;
}

void pack_student(const StudentWeights& weights, uint32_t* to, int layers, Products products,
                  bool approximate, int device, void* stream) {
  use_device(device);
  packing_of(layers, products).pack(weights, to, approximate, stream);
}

void student_step_in_place(const StudentCall& call, const StudentKind& kind, int device,
                           void* stream) {
  use_device(device);
  if (!kind.nominal && is_on_tensor_cores(kind.layers, kind.hidden)) {
    const TilesLaunch by = launch_of_tiles(kind, call.stochastic);
    if (call.blocks == 0) return;
    launch("student_step_", by.kernel, blocks_of(by, call.blocks, device), by.threads, stream,
           call);
    return;
  }
  step_by_threads(call, kind, stream);
}

}  // namespace amalgam::cuda
