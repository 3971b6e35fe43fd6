// How the coordinates of several tensors are cut into tiles.
#pragma once

#ifdef AMALGAM_ISA
#error "tiling.h is for files compiled once: AVX-512's copy of its functions could be linked for all"
#endif

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "tiles.h"

namespace amalgam::cpu {

// Tensors follow each other without a gap, or, where they lie apart, each begins a tile: then what is
// one a tensor is one a tile.
class Tiling {
 public:
  Tiling(std::vector<int64_t> sizes, bool apart) : sizes_(std::move(sizes)) {
    begins_.push_back(0);
    offsets_.push_back(0);
    for (int64_t size : sizes_) {
      begins_.push_back(begins_.back() + (apart ? tiles_of(size) * kTile : size));
      offsets_.push_back(offsets_.back() + size);
    }
  }

  int64_t tiles() const { return tiles_of(begins_.back()); }

  // Calls body(piece) for each piece of some tiles, whose places are counted from the first one's.
  template <typename Body>
  void for_each_piece(int64_t tile, int64_t tiles, const Body& body) const {
    const int64_t first = tile * kTile, last = std::min(begins_.back(), first + tiles * kTile);
    int64_t tensor = tensor_at(first);
    for (int64_t at = first; at < last; ++tensor) {
      const int64_t begin = begins_[tensor], stop = std::min(last, begin + sizes_[tensor]);
      if (stop > at) body(Piece{tensor, at - begin, stop - at, at - first});
      at = std::max(at, std::min(last, begins_[tensor + 1]));
    }
  }

  // The one piece of a tile, of tensors that lie apart; it starts where it does in one vector of all.
  Piece only_piece(int64_t tile) const {
    const int64_t at = tile * kTile, tensor = tensor_at(at), start = at - begins_[tensor];
    return {tensor, offsets_[tensor] + start, std::min<int64_t>(kTile, sizes_[tensor] - start), 0};
  }

  // The first tile of a tensor that lies apart, and the one after its last.
  std::pair<int64_t, int64_t> tiles_of_tensor(int64_t tensor) const {
    return {begins_[tensor] / kTile, begins_[tensor + 1] / kTile};
  }

 private:
  // The tensor of the coordinate at `at`; empty ones have none.
  int64_t tensor_at(int64_t at) const {
    return std::upper_bound(begins_.begin(), begins_.end(), at) - begins_.begin() - 1;
  }

  std::vector<int64_t> sizes_, begins_, offsets_;
};

}  // namespace amalgam::cpu
