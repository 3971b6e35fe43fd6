#include "student_unroll.cuh"

namespace amalgam::cuda {

template UnrollLaunches unroll_launches<4>();

}  // namespace amalgam::cuda
