// What the bindings of the student's operations share.
#pragma once

#include "../binding.h"
#include "student_step.h"

namespace amalgam::cpu {

inline StudentConstants student_constants(const Constants& values) {
  const auto [alpha, beta1, beta2, eps] = values;
  return {alpha, beta1, beta2, eps};
}

template <typename T>
StudentState<T> student_state(const StateAddresses& addresses) {
  const auto [m, v, h, c] = addresses;
  return {at<T>(m), at<T>(v), at<T>(h), at<T>(c)};
}

}  // namespace amalgam::cpu
