#include "student_threads_launch.cuh"

namespace amalgam::cuda {

template std::vector<ThreadsLaunch> nominal_launches<Bfloat16>();

}  // namespace amalgam::cuda
