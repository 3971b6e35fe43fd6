#pragma once

#include "student_threads.cuh"
#include "student_threads.h"

namespace amalgam::cuda {

// `count` coordinates a thread, `groups` times; at least `blocks` blocks a processor, which bounds registers;
// `unroll` units in the loop's body. Nothing is rounded at random where all is float32.
template <template <bool, int> typename Form, typename Moments, typename Cells, int layers,
          int hidden, int count, int groups, int threads, int blocks, int unroll>
constexpr ThreadsLaunch by_threads() {
  using Kernel = void (*)(StudentCall);
  const auto kernel = [](bool stochastic, bool approximate) -> Kernel {
    constexpr bool narrow = sizeof(Cells) < sizeof(float) || sizeof(Moments) < sizeof(float);
    if (stochastic) {
      return approximate ? student_threads<Form, layers, hidden, Moments, Cells, narrow, true,
                                           count, groups, threads, blocks, unroll>
                         : student_threads<Form, layers, hidden, Moments, Cells, narrow, false,
                                           count, groups, threads, blocks, unroll>;
    }
    return approximate ? student_threads<Form, layers, hidden, Moments, Cells, false, true, count,
                                         groups, threads, blocks, unroll>
                       : student_threads<Form, layers, hidden, Moments, Cells, false, false, count,
                                         groups, threads, blocks, unroll>;
  };
  return {{layers, hidden, count * groups * threads}, threads, kernel};
}

// Both tables are by registers, spills and instructions of the machine code for sm_90.
template <typename T>
std::vector<ThreadsLaunch> rnnprop_launches() {
  return {by_threads<RnnProp, float, T, 1, 4, 4, 1, 128, 6, 2>(),
          by_threads<RnnProp, float, T, 1, 8, 4, 1, 128, 4, 2>(),
          by_threads<RnnProp, float, T, 1, 16, 4, 1, 128, 3, 1>(),
          by_threads<RnnProp, float, T, 2, 4, 4, 1, 128, 3, 1>(),
          by_threads<RnnProp, float, T, 2, 8, 2, 1, 128, 3, 1>()};
}

template <typename T>
std::vector<ThreadsLaunch> nominal_launches() {
  return {by_threads<Nominal, T, T, 1, 4, 4, 2, 64, 6, 2>(),
          by_threads<Nominal, T, T, 1, 8, 4, 2, 64, 6, 2>(),
          by_threads<Nominal, T, T, 1, 16, 4, 2, 128, 3, 1>()};
}

}  // namespace amalgam::cuda
