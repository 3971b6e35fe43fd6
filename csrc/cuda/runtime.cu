#include "runtime.h"

#include <stdexcept>
#include <string>

#include "check.h"

namespace amalgam::cuda {

void check(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return;
  // Clears the error: a launch failure reported here must not fail the next launch too.
  cudaGetLastError();
  std::string hint;
  if (status == cudaErrorNoKernelImageForDevice) {
    hint = "; built for sm_" AMALGAM_CUDA_ARCHS
           ", rebuild with AMALGAM_CUDA_ARCHS naming this GPU's architecture";
  }
  throw std::runtime_error(std::string(doing) + ": CUDA error " + std::to_string(status) + " (" +
                           cudaGetErrorName(status) + "): " + cudaGetErrorString(status) + hint);
}

void use_device(int device) { check(cudaSetDevice(device), "choosing the device"); }

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "asking for the runtime's version");
  return version;
}

int device_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "counting devices");
  return count;
}

}  // namespace amalgam::cuda
