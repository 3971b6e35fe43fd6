// Steps by threads, and which of student_threads.cuh's kernels computes what; a file for each few of them,
// compiled at once.
#pragma once

#include <vector>

#include "student_step.h"

namespace amalgam::cuda {

struct ThreadsLaunch {
  StudentSize size;
  int threads;
  void (*(*kernel)(bool stochastic, bool approximate))(StudentCall);
};

// Of RNNProp, with moments of float32 and cells stored as T.
template <typename T>
std::vector<ThreadsLaunch> rnnprop_launches();

// Of the nominal form, with moments and cells stored as T.
template <typename T>
std::vector<ThreadsLaunch> nominal_launches();

// All that are compiled in.
std::vector<StudentSize> sizes_by_threads(bool nominal);

// On the current device. Throws std::invalid_argument for what is not compiled in.
void step_by_threads(const StudentCall& call, const StudentKind& kind, void* stream);

}  // namespace amalgam::cuda
