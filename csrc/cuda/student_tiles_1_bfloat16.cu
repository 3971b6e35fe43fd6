#include "student_tiles_launch.cuh"

namespace amalgam::cuda {

template TilesLaunch tiles_launch<1, Stored::bfloat16>(const StudentKind& kind, bool stochastic);

}  // namespace amalgam::cuda
