// Neighbouring numbers that one access moves, where they lie at a multiple of its size.
#pragma once

namespace amalgam::cuda {

template <typename T, int count>
struct alignas(sizeof(T) * count >= 16 ? 16 : sizeof(T) * count) Pack {
  T values[count];
};

}  // namespace amalgam::cuda
