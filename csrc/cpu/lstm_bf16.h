// All layers' step on a tile, for LstmNetwork::forward; lstm_pairs.h packs what it takes.
#pragma once

#include "lstm_layout.h"

namespace amalgam::cpu {

using LstmForward = void (*)(const LstmNetwork<float>&, const LstmTile<float>&);

namespace avx512_bf16 {
LstmForward lstm_forward_in_pairs(bool approximate);
}

}  // namespace amalgam::cpu
