#include "student_step.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "check.h"
#include "student_threads.cuh"

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
    by_threads<1, 16, 4, 128, 3, 1>(), by_threads<2, 4, 4, 128, 4, 1>(),
    by_threads<2, 8, 2, 128, 3, 1>(),
};

const Launch& launch_of(int layers, int hidden) {
  for (const Launch& launch : kLaunches) {
    if (launch.size.layers == layers && launch.size.hidden == hidden) return launch;
  }
  throw std::invalid_argument("no step of " + std::to_string(layers) + " layers of " +
                              std::to_string(hidden) + " units is compiled in");
}

}  // namespace

const std::vector<StudentSize>& student_sizes() {
  static const std::vector<StudentSize> sizes = [] {
    std::vector<StudentSize> all;
    for (const Launch& launch : kLaunches) all.push_back(launch.size);
    return all;
  }();
  return sizes;
}

void student_step_in_place(const StudentCall& call, int layers, int hidden, Stored cells,
                           bool approximate, int64_t blocks, int device, void* stream) {
  const Launch& launch = launch_of(layers, hidden);
  if (blocks == 0) return;
  use_device(device);
  const Kernel kernel = launch.kernel(cells, call.stochastic, approximate);
  kernel<<<static_cast<unsigned>(blocks), launch.threads, 0, static_cast<cudaStream_t>(stream)>>>(
      call);
  check(cudaGetLastError(), "student_step_");
}

}  // namespace amalgam::cuda
