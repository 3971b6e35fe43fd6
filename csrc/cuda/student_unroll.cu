#include "student_unroll.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "launch.cuh"
#include "student_unroll_launches.h"

namespace amalgam::cuda {
namespace {

const UnrollLaunches& launches_of(int hidden) {
  static const UnrollLaunches all[] = {unroll_launches<4>(), unroll_launches<8>()};
  for (const UnrollLaunches& each : all) {
    if (each.hidden == hidden) return each;
  }
  throw std::invalid_argument("no gradients of a layer of " + std::to_string(hidden) +
                              " units are compiled in");
}

}  // namespace

const std::vector<int>& unroll_sizes() {
  static const std::vector<int> sizes{4, 8};
  return sizes;
}

int unroll_sums(int hidden) { return launches_of(hidden).sums; }

int64_t unroll_warps(int hidden, int64_t tiles, int device) {
  const int64_t blocks = sharing_blocks(tiles, launches_of(hidden).unroll_blocks, device);
  return std::min(tiles, blocks * kUnrollWarps);
}

void nominal_step(const UnrollCall& call, int hidden, float* update, const UnrollState& to,
                  int device, void* stream) {
  const UnrollLaunches& by = launches_of(hidden);
  if (call.tiles == 0) return;
  use_device(device);
  const int64_t blocks = (call.tiles + kUnrollWarps - 1) / kUnrollWarps;
  by.forward(call, update, to, sharing_blocks(blocks, by.step_blocks, device), stream);
}

void nominal_step_backward(const UnrollCall& call, int hidden, const UnrollState& in_new,
                           float* in_grad, const UnrollState& in_old, const UnrollSums& sums,
                           float* in_weights, float* in_biases, int device, void* stream) {
  const UnrollLaunches& by = launches_of(hidden);
  use_device(device);
  if (call.tiles > 0) by.backward(call, in_new, in_grad, in_old, sums, stream);
  by.add(call, sums, in_weights, in_biases, stream);
}

void nominal_unroll_backward(const UnrollCall& call, int hidden, const UnrollSums& sums,
                             float* in_weights, float* in_biases, int device, void* stream) {
  const UnrollLaunches& by = launches_of(hidden);
  use_device(device);
  if (call.tiles > 0) by.unroll(call, sums, stream);
  by.add(call, sums, in_weights, in_biases, stream);
}

}  // namespace amalgam::cuda
