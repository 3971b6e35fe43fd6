#include "student_unroll.cuh"

namespace amalgam::cuda {

template UnrollLaunches unroll_launches<8>();

}  // namespace amalgam::cuda
