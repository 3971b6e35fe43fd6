// The CUDA runtime as bindings.cpp sees it: no CUDA header, so it compiles with or without CUDA.
#pragma once

namespace amalgam::cuda {

// Version of the runtime linked in, as CUDA counts: 13000 for 13.0.
int runtime_version();

// Number of devices. Throws std::runtime_error where the driver is missing or too old.
int device_count();

}  // namespace amalgam::cuda
