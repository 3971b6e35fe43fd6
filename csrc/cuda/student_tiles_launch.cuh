#pragma once

#include "student_tiles.cuh"
#include "student_tiles.h"

namespace amalgam::cuda {

// By times on an H200, and spills where there are none: rows that are read by 16 bytes, of float32
// from two tiles a warp on and of bfloat16 from four; as many tiles as registers hold.
template <int layers, Products products, bool approximate, typename Cell, bool wide,
          tiles::Rounds rounds>
constexpr TilesLaunch tiles_by() {
  constexpr bool narrow = sizeof(Cell) == 2;
  constexpr int count = wide && (narrow || approximate) ? 4 : 2;
  constexpr int warps = 4;
  constexpr int blocks = count == 4 ? (layers == 1 && !narrow ? 3 : 2) : layers == 1 && wide ? 4 : 3;
  return {tiles::student_tiles<layers, products, approximate, Cell, count, wide, rounds, warps,
                               blocks>,
          16 * count, 32 * warps, blocks};
}

// All that are compiled in; others have no kernel.
template <int layers, Stored cells>
TilesLaunch tiles_launch(const StudentKind& kind, bool stochastic) {
  using tiles::Rounds;
  constexpr Products split = Products::kSplit, tf32 = Products::kTf32, bf16 = Products::kBf16;
  constexpr Rounds nearest = Rounds::kNearest, random = Rounds::kAtRandom, either = Rounds::kEither;
  const auto is = [&](Products products, bool approximate) {
    return kind.products == products && kind.approximate == approximate;
  };
  if constexpr (cells == Stored::float32) {
    if (!kind.aligned) {
      if (is(split, false)) return tiles_by<layers, split, false, float, false, nearest>();
      return {};
    }
    if (is(split, false)) return tiles_by<layers, split, false, float, true, nearest>();
    if (is(tf32, false)) return tiles_by<layers, tf32, false, float, true, nearest>();
    if (is(tf32, true)) return tiles_by<layers, tf32, true, float, true, nearest>();
  } else {
    if (!kind.aligned) {
      if (is(split, false)) return tiles_by<layers, split, false, Bfloat16, false, either>();
      return {};
    }
    if (is(split, false)) {
      return stochastic ? tiles_by<layers, split, false, Bfloat16, true, random>()
                        : tiles_by<layers, split, false, Bfloat16, true, nearest>();
    }
    if (is(tf32, false)) {
      return stochastic ? tiles_by<layers, tf32, false, Bfloat16, true, random>()
                        : tiles_by<layers, tf32, false, Bfloat16, true, nearest>();
    }
    if (is(bf16, true)) {
      return stochastic ? tiles_by<layers, bf16, true, Bfloat16, true, random>()
                        : tiles_by<layers, bf16, true, Bfloat16, true, nearest>();
    }
  }
  return {};
}

}  // namespace amalgam::cuda
