// What the bindings of the student's operations share.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "../binding.h"
#include "student_step.h"

namespace amalgam::cpu {

// layers, hidden, constants, weights; whether the form is nominal, its corrections, how many tensors.
using StudentAddresses =
    std::tuple<int, int, Constants, std::vector<Address>, bool, Address, int64_t>;

template <typename T>
class GivenStudent {
 public:
  explicit GivenStudent(const StudentAddresses& given)
      : given_(given), weights_(all_at<const T>(std::get<3>(given))) {}

  Student<T> student() const {
    const auto& [layers, hidden, constants, weights, nominal, corrections, tensors] = given_;
    const auto [alpha, beta1, beta2, eps] = constants;
    return {layers,  hidden,  {alpha, beta1, beta2, eps}, weights_.data(),
            nominal, at<const T>(corrections), tensors};
  }

 private:
  const StudentAddresses given_;
  const std::vector<const T*> weights_;
};

template <typename T>
StudentState<T> student_state(const StateAddresses& addresses) {
  const auto [m, v, h, c] = addresses;
  return {at<T>(m), at<T>(v), at<T>(h), at<T>(c)};
}

}  // namespace amalgam::cpu
