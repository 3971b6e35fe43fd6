#include "largest_magnitude.h"

#include <algorithm>
#include <vector>

#include "../binding.h"
#include "dispatch.h"
#include "parallel.h"

namespace amalgam::cpu {
namespace {

// How many elements a block has; so many are also worth waking a thread for.
constexpr int64_t kBlock = 1 << 17;

}  // namespace

uint64_t largest_magnitude(const void* const* tensors, const int64_t* numels, int64_t count,
                           int bytes, int threads) {
  const LargestBits largest = AMALGAM_DISPATCH(largest_bits);
  struct Part {
    const char* first;
    int64_t count;
  };
  std::vector<Part> parts;
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    total += numels[i];
    for (int64_t at = 0; at < numels[i]; at += kBlock) {
      parts.push_back({static_cast<const char*>(tensors[i]) + at * bytes,
                       std::min(kBlock, numels[i] - at)});
    }
  }
  const int64_t size = static_cast<int64_t>(parts.size());
  std::vector<uint64_t> found(parts.size());
  for_each_block(size, worthwhile_threads(total, kBlock, threads), [&](int64_t i) {
    found[i] = largest(parts[i].first, parts[i].count, bytes);
  });
  return found.empty() ? 0 : *std::max_element(found.begin(), found.end());
}

namespace {

const Binding binding("cpu", [](py::module_& module) {
  using namespace py::literals;
  module.def(
      "largest_magnitude",
      [](const std::vector<Address>& tensors, const std::vector<int64_t>& numels, int bytes,
         int threads) {
        const std::vector<const void*> pointers = all_at<const void>(tensors);
        return cpu::largest_magnitude(pointers.data(), numels.data(),
                                      static_cast<int64_t>(pointers.size()), bytes, threads);
      },
      "tensors"_a, "numels"_a, py::kw_only(), "bytes"_a, "threads"_a, WithoutGil());
});

}  // namespace
}  // namespace amalgam::cpu
