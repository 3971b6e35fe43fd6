#include "lstm_pairs.h"

#include "lstm_bf16.h"
#include "storage.h"

namespace amalgam::cpu {

PairedLstm::PairedLstm(const LstmNetwork<float>& lstm, bool approximate) : network_(lstm) {
  std::vector<int64_t> starts;
  for (int layer = 0; layer < lstm.layers; ++layer) {
    starts.push_back(static_cast<int64_t>(storage_.size()));
    const LayerShape& shape = lstm.shapes[layer];
    const int exact = exact_rows(shape, layer), rows = shape.rows();
    for (int unit = 0; unit < shape.hidden; ++unit) {
      const float* of_rows = lstm.by_unit[layer] + int64_t(unit) * 4 * (rows + 1) + 4;
      for (int row = exact; row < rows; row += 2) {
        for (int gate = 0; gate < 4; ++gate) {
          const uint32_t low = to_bfloat16(of_rows[4 * row + gate]);
          const uint32_t high = row + 1 < rows ? to_bfloat16(of_rows[4 * (row + 1) + gate]) : 0;
          storage_.push_back(low | high << 16);
        }
      }
    }
  }
  for (const int64_t start : starts) by_pair_.push_back(storage_.data() + start);
  network_.by_pair = by_pair_.data();
#ifdef AMALGAM_BF16
  network_.forward = avx512_bf16::lstm_forward_in_pairs(approximate);
#else
  (void)approximate;
#endif
}

}  // namespace amalgam::cpu
