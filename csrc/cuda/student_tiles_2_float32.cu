#include "student_tiles_launch.cuh"

namespace amalgam::cuda {

template TilesLaunch tiles_launch<2, Stored::float32>(const StudentKind& kind, bool stochastic);

}  // namespace amalgam::cuda
