// Runs fixed blocks of work on the caller's number of threads.
#pragma once

#ifdef AMALGAM_ISA
#error "parallel.h is for files compiled once: AVX-512's copy of its functions could be linked for all"
#endif

#include <algorithm>
#include <cstdint>
#include <vector>

namespace amalgam::cpu {

// At most `threads`, but no more than have `grain` elements each: waking one costs microseconds.
inline int worthwhile_threads(int64_t elements, int64_t grain, int threads) {
  return static_cast<int>(std::clamp<int64_t>(elements / grain, 1, std::max(threads, 1)));
}

// OpenMP, because PyTorch's Linux wheels run on libgomp too and it is loaded before this module:
// the loader resolves libgomp.so.1 to that copy, so both share one pool and no core is taken twice.
// (Where a wheel bundles libgomp under another name there are two pools, never active at once.)
// Blocks do not depend on the number of threads, so results don't either.
template <typename Body>
void for_each_block(int64_t blocks, int threads, const Body& body) {
  const int team = static_cast<int>(std::min<int64_t>(blocks, threads));
  if (team < 2) {
    for (int64_t block = 0; block < blocks; ++block) body(block);
    return;
  }
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) body(block);
}

// Some of a tensor's elements.
struct Part {
  int64_t tensor, start, count;
};

// All elements of `count` tensors, in parts of at most `most`.
inline std::vector<Part> parts_of(const int64_t* numels, int64_t count, int64_t most) {
  std::vector<Part> parts;
  for (int64_t tensor = 0; tensor < count; ++tensor) {
    for (int64_t at = 0; at < numels[tensor]; at += most) {
      parts.push_back({tensor, at, std::min(most, numels[tensor] - at)});
    }
  }
  return parts;
}

}  // namespace amalgam::cpu
