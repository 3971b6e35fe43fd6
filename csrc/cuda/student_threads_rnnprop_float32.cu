#include "student_threads_launch.cuh"

namespace amalgam::cuda {

template std::vector<ThreadsLaunch> rnnprop_launches<float>();

}  // namespace amalgam::cuda
