// An LSTM whose products take pairs of bfloat16, two products to an instruction.
//
// Rows of h, and the inputs of all layers but the first, are rounded to bfloat16 and interleaved: a
// row of pairs holds two rows of each coordinate. Weights are packed alike. The first layer's inputs,
// their weights and all biases stay float32, and so do the sums.
#pragma once

#ifdef AMALGAM_ISA
#error "lstm_pairs.h is for files compiled once: AVX-512's copy of its functions could be linked for all"
#endif

#include <cstdint>
#include <vector>

#include "lstm_layout.h"

namespace amalgam::cpu {

class PairedLstm {
 public:
  // `lstm` has its weights packed by unit; what it points to must outlive this. With `approximate`,
  // tanh and sigmoid have 13 bits, else 19. Only where multiplies_bfloat16().
  PairedLstm(const LstmNetwork<float>& lstm, bool approximate);
  PairedLstm(const PairedLstm&) = delete;

  const LstmNetwork<float>& network() const { return network_; }

 private:
  LstmNetwork<float> network_;
  std::vector<uint32_t> storage_;
  std::vector<const uint32_t*> by_pair_;
};

}  // namespace amalgam::cpu
