// Launches that are checked.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "check.h"

namespace amalgam::cuda {

// Launches a kernel on a stream of the current device; errors say what was being done.
template <typename... Parameters, typename... Arguments>
void launch(const char* doing, void (*kernel)(Parameters...), dim3 blocks, int threads,
            void* stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), doing);
}

// How many blocks share the work, so that each processor has `each` of them at most.
inline unsigned sharing_blocks(int64_t blocks, int each, int device) {
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "counting processors");
  return static_cast<unsigned>(std::min(blocks, int64_t{processors} * each));
}

}  // namespace amalgam::cuda
