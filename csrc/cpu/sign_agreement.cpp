#include "sign_agreement.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "../binding.h"
#include "dispatch.h"
#include "parallel.h"

namespace amalgam::cpu {
namespace {

// How many elements a block has; so many are also worth waking a thread for.
constexpr int64_t kBlock = 1 << 16;

Numbers from(const Numbers& numbers, int64_t start) {
  const auto* at = static_cast<const char*>(numbers.at) + start * numbers.format.bytes;
  return {at, numbers.format};
}

}  // namespace

void sign_agreements(const Numbers* first, const Numbers* second, const int64_t* numels,
                     int64_t count, double* found, int threads) {
  const SignAgreement agreement = AMALGAM_DISPATCH(sign_agreement);
  const std::vector<Part> parts = parts_of(numels, count, kBlock);
  const int64_t total = std::accumulate(numels, numels + count, int64_t(0));
  const int64_t size = static_cast<int64_t>(parts.size());
  std::vector<Signs> of_parts(parts.size());
  for_each_block(size, worthwhile_threads(total, kBlock, threads), [&](int64_t i) {
    const auto& [tensor, start, length] = parts[i];
    of_parts[i] = agreement(from(first[tensor], start), from(second[tensor], start), length);
  });
  std::fill_n(found, 2 * count, 0.0);
  for (int64_t i = 0; i < size; ++i) {
    double* of_tensor = found + 2 * parts[i].tensor;
    of_tensor[0] += static_cast<double>(of_parts[i].agree);
    of_tensor[1] += static_cast<double>(of_parts[i].disagree);
  }
}

namespace {

// The number's bytes and the bits of infinity, in the order of the dtypes of
// amalgam/backends/sign_agreement.py.
constexpr NumberFormat kFormats[] = {
    {8, 0x7ff0000000000000}, {4, 0x7f800000}, {2, 0x7f80}, {2, 0x7c00}};

std::vector<Numbers> numbers_at(const std::vector<Address>& addresses,
                                const std::vector<int>& formats) {
  std::vector<Numbers> found;
  for (size_t i = 0; i < addresses.size(); ++i) {
    found.push_back({at<const void>(addresses[i]), kFormats[formats[i]]});
  }
  return found;
}

const Binding binding("cpu", [](py::module_& module) {
  using namespace py::literals;
  module.def(
      "sign_agreements",
      [](const std::vector<Address>& first, const std::vector<int>& first_formats,
         const std::vector<Address>& second, const std::vector<int>& second_formats,
         const std::vector<int64_t>& numels, Address found, int threads) {
        const auto ones = numbers_at(first, first_formats);
        const auto others = numbers_at(second, second_formats);
        cpu::sign_agreements(ones.data(), others.data(), numels.data(),
                             static_cast<int64_t>(ones.size()), at<double>(found), threads);
      },
      "first"_a, "first_formats"_a, "second"_a, "second_formats"_a, "numels"_a, "found"_a,
      py::kw_only(), "threads"_a, WithoutGil());
});

}  // namespace
}  // namespace amalgam::cpu
