// In how many signs pairs of tensors agree; amalgam/operations/sign_agreement.py says what
// for. All pointers but `pairs` are device memory of `device`; `stream` is a cudaStream_t of it.
// Nothing here waits for the device.
#pragma once

#include <cstdint>

namespace amalgam::cuda {

// Formats of IEEE's, in the order of the dtypes of amalgam/backends/sign_agreement.py.
enum class Format : uint8_t { float64, float32, bfloat16, float16 };

struct SignPair {
  const void* first;
  const void* second;
  int64_t numel;
  Format first_format;
  Format second_format;
};

// Of each of `count` pairs how many elements agree in sign, and how many do not. Zero and NaN have
// no sign.
void sign_agreements(const SignPair* pairs, int64_t count,
                     int64_t* found,  // (count, 2) in and out: zeros before
                     int device, void* stream);

}  // namespace amalgam::cuda
