// The settings of teachers as kernels take them.
#pragma once

#include <stdexcept>
#include <string>

#include "teacher_kinds.cuh"
#include "teacher_step.h"

namespace amalgam::cuda {

template <typename T>
TeacherConstants<T> constants_of(const TeacherSettings& settings, int64_t row) {
  const int kind = settings.kinds[row];
  if (kind < 0 || kind >= kTeacherKinds) {
    throw std::invalid_argument("kinds must be numbers below " + std::to_string(kTeacherKinds) +
                                ", not " + std::to_string(kind));
  }
  const double rest1 = 1 - settings.beta1[row], rest2 = 1 - settings.beta2[row];
  return {kind,
          static_cast<T>(settings.lr[row]),
          static_cast<T>(settings.beta1[row]),
          static_cast<T>(settings.beta2[row]),
          static_cast<T>(settings.eps[row]),
          static_cast<T>(rest1),
          static_cast<T>(rest2),
          static_cast<T>(1 / rest1),
          static_cast<T>(1 / rest2)};
}

}  // namespace amalgam::cuda
