// Which kernel of student_tiles.cuh computes what; a file for each few of them, compiled at once.
#pragma once

#include "student_step.h"

namespace amalgam::cuda {

struct TilesLaunch {
  void (*kernel)(StudentCall);
  int tile;     // coordinates of a warp
  int threads;
  int blocks;   // of a processor, which bounds registers
};

template <int layers, Stored cells>
TilesLaunch tiles_launch(const StudentKind& kind, bool stochastic);

}  // namespace amalgam::cuda
