// CUDA errors as exceptions.
#pragma once

#include <cuda_runtime_api.h>

namespace amalgam::cuda {

// Throws std::runtime_error that names `doing`, the error's number and what CUDA says of it.
void check(cudaError_t status, const char* doing);

// Makes `device` current for the kernels that follow. The caller restores its own: PyTorch links
// another copy of the runtime, and only its guard knows which device that copy believes current.
void use_device(int device);

}  // namespace amalgam::cuda
