// An LSTM's weights as the inner loops want them, and their gradients as PyTorch wants them.
#pragma once

#ifdef AMALGAM_ISA
#error "lstm_weights.h is for files compiled once: AVX-512's copy of its functions could be linked for all"
#endif

#include <cstdint>
#include <vector>

#include "lstm_layout.h"

namespace amalgam::cpu {

template <typename T>
class PackedLstm {
 public:
  // weights: three arrays a layer (W_ih, W_hh, b), as PyTorch lays them out.
  PackedLstm(int layers, int hidden, int features, const T* const* weights, bool for_backward) {
    int64_t size = 0;
    for (int layer = 0; layer < layers; ++layer) {
      shapes_.push_back({layer ? hidden : features, hidden});
      size += shapes_[layer].by_unit_size() + (for_backward ? shapes_[layer].by_input_size() : 0);
    }
    storage_.resize(size);
    T* to = storage_.data();
    for (int layer = 0; layer < layers; ++layer) {
      by_unit_.push_back(to);
      to = pack_by_unit(shapes_[layer], weights + 3 * layer, to);
      by_input_.push_back(to);
      if (for_backward) to = pack_by_input(shapes_[layer], weights + 3 * layer, to);
    }
  }
  PackedLstm(const PackedLstm&) = delete;

  const std::vector<LayerShape>& shapes() const { return shapes_; }

  LstmNetwork<T> network() const {
    return {static_cast<int>(shapes_.size()), shapes_.data(), by_unit_.data(), by_input_.data()};
  }

  // How many sums the weights' gradients are, a layer's after another.
  int64_t gradient_size() const {
    int64_t size = 0;
    for (const LayerShape& shape : shapes_) size += shape.gradient_size();
    return size;
  }

  // Writes the sums to one array a weight; returns what follows the sums.
  const double* unpack_gradients(const double* sums, T* const* d_weights) const {
    for (const LayerShape& shape : shapes_) {
      for (int unit = 0; unit < shape.hidden; ++unit) {
        for (int gate = 0; gate < 4; ++gate) {
          const int64_t output = int64_t(gate) * shape.hidden + unit;
          for (int row = 0; row < shape.inputs; ++row) {
            d_weights[0][output * shape.inputs + row] = static_cast<T>(sums[row]);
          }
          for (int row = 0; row < shape.hidden; ++row) {
            d_weights[1][output * shape.hidden + row] = static_cast<T>(sums[shape.inputs + row]);
          }
          d_weights[2][output] = static_cast<T>(sums[shape.rows()]);
          sums += shape.columns();
        }
      }
      d_weights += 3;
    }
    return sums;
  }

 private:
  // The weight of a gate (0 to 3) of a unit on a row of `in`.
  static T weight(const LayerShape& shape, const T* const* weights, int gate, int unit, int row) {
    const int64_t output = int64_t(gate) * shape.hidden + unit;
    return row < shape.inputs ? weights[0][output * shape.inputs + row]
                              : weights[1][output * shape.hidden + row - shape.inputs];
  }

  static T* pack_by_unit(const LayerShape& shape, const T* const* weights, T* to) {
    for (int unit = 0; unit < shape.hidden; ++unit) {
      for (int gate = 0; gate < 4; ++gate) *to++ = weights[2][gate * shape.hidden + unit];
      for (int row = 0; row < shape.rows(); ++row) {
        for (int gate = 0; gate < 4; ++gate) *to++ = weight(shape, weights, gate, unit, row);
      }
    }
    return to;
  }

  static T* pack_by_input(const LayerShape& shape, const T* const* weights, T* to) {
    for (int first = 0; first < shape.rows(); first += kRowGroup) {
      for (int unit = 0; unit < shape.hidden; ++unit) {
        for (int gate = 0; gate < 4; ++gate) {
          for (int row = first; row < first + kRowGroup; ++row) {
            *to++ = row < shape.rows() ? weight(shape, weights, gate, unit, row) : T(0);
          }
        }
      }
    }
    return to;
  }

  std::vector<LayerShape> shapes_;
  std::vector<T> storage_;
  std::vector<const T*> by_unit_, by_input_;
};

}  // namespace amalgam::cpu
