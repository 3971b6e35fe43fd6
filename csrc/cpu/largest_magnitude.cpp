#include "largest_magnitude.h"

#include <algorithm>
#include <numeric>
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
  const std::vector<Part> parts = parts_of(numels, count, kBlock);
  const int64_t total = std::accumulate(numels, numels + count, int64_t(0));
  const int64_t size = static_cast<int64_t>(parts.size());
  std::vector<uint64_t> found(parts.size());
  for_each_block(size, worthwhile_threads(total, kBlock, threads), [&](int64_t i) {
    const auto& [tensor, start, length] = parts[i];
    found[i] = largest(static_cast<const char*>(tensors[tensor]) + start * bytes, length, bytes);
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
