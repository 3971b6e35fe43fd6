// A student's weights as the inner loops want them, and their gradients as PyTorch wants them.
#pragma once

#ifdef AMALGAM_ISA
#error "student_network.h is for files compiled once: AVX-512's copy of its functions could be linked for all"
#endif

#include <cstdint>
#include <vector>

#include "dispatch.h"
#include "lstm_weights.h"
#include "student_step.h"
#include "tiling.h"

namespace amalgam::cpu {

// What runs a student, and its weights packed.
template <typename T>
class PackedStudent {
 public:
  PackedStudent(const Student<T>& student, bool for_backward)
      : kernels(student.nominal ? AMALGAM_DISPATCH(nominal_kernels<T>)
                                : AMALGAM_DISPATCH(student_kernels<T>)),
        student_(student),
        no_bias_(4 * student.hidden),
        lstm_(student.layers, student.hidden, student.form().features,
              with_bias(student.weights, no_bias_.data()).data(), for_backward) {}

  const StudentKernels<T> kernels;

  const std::vector<LayerShape>& shapes() const { return lstm_.shapes(); }

  StudentNetwork<T> network() const {
    const StudentConstants& constants = student_.constants;
    const T* const* head = student_.weights + 3 * student_.layers;
    return {lstm_.network(),
            head[0],
            head[1],
            static_cast<T>(constants.alpha),
            static_cast<T>(constants.beta1),
            static_cast<T>(constants.beta2),
            static_cast<T>(constants.eps),
            static_cast<T>(1 - constants.beta1),
            static_cast<T>(1 - constants.beta2)};
  }

  // Gives a tile what is one a tensor; `row` is the tensor's, or of an unroll its and its step's.
  void of_tensor(int64_t row, StudentTile<T>& tile) const {
    if (!student_.nominal) return;
    tile.lstm.bias = student_.weights[2] + row * 4 * student_.hidden;
    tile.corrections = student_.corrections + row * 3;
  }

  // How many sums the weights' gradients are: the layers', then the head's and its bias's.
  int64_t gradient_size() const {
    return lstm_.gradient_size() + (student_.hidden + 1) * student_.form().outputs;
  }

  // Takes the sums of the first layer's bias out of the sums.
  void move_bias_sums(double* sums, double* to) const {
    const LayerShape& shape = shapes()[0];
    for (int output = 0; output < 4 * shape.hidden; ++output, sums += shape.columns()) {
      to[output] += sums[shape.rows()];
      sums[shape.rows()] = 0;
    }
  }

  // Writes those of one tensor.
  void unpack_bias(const double* sums, T* d_bias) const {
    for (int unit = 0; unit < student_.hidden; ++unit) {
      for (int gate = 0; gate < 4; ++gate) {
        d_bias[gate * student_.hidden + unit] = static_cast<T>(*sums++);
      }
    }
  }

  // Writes the sums to one array a weight; in the nominal form not to that of the first bias.
  void unpack_gradients(const double* sums, T* const* d_weights) const {
    std::vector<T> no_bias(4 * student_.hidden);
    sums = lstm_.unpack_gradients(sums, with_bias(d_weights, no_bias.data()).data());
    const int outputs = student_.form().outputs;
    T* const* d_head = d_weights + 3 * student_.layers;
    for (int i = 0; i < outputs * student_.hidden; ++i) d_head[0][i] = static_cast<T>(*sums++);
    for (int i = 0; i < outputs; ++i) d_head[1][i] = static_cast<T>(*sums++);
  }

 private:
  // In the nominal form with this in place of the first bias.
  template <typename Pointer>
  std::vector<Pointer> with_bias(const Pointer* weights, Pointer bias) const {
    std::vector<Pointer> pointers(weights, weights + 3 * student_.layers + 2);
    if (student_.nominal) pointers[2] = bias;
    return pointers;
  }

  const Student<T> student_;
  const std::vector<T> no_bias_;
  const PackedLstm<T> lstm_;
};

// Sums of the first layer's bias's gradients, of each tensor apart: in the nominal form, whose tensors
// lie apart.
template <typename T>
class BiasSums {
 public:
  // rows: of each tensor; of an unroll its steps, else 1.
  BiasSums(const PackedStudent<T>& student, const Tiling& tiling, int64_t tensors, int64_t rows,
           int64_t tiles_a_sum)
      : student_(student),
        tiling_(tiling),
        tensors_(tensors),
        rows_(rows),
        size_(4 * student.shapes()[0].hidden),
        tiles_a_sum_(tiles_a_sum),
        sums_((tiling.tiles() / tiles_a_sum + tensors + 1) * rows * size_) {}

  // Moves those of a tile out of all sums.
  void take(int64_t tile, int64_t tensor, int64_t row, double* sums) {
    student_.move_bias_sums(sums, at(tile, tensor, row));
  }

  // Writes (rows, tensors, 4 hidden).
  void unpack(T* d_bias) {
    std::vector<double> total(size_);
    for (int64_t tensor = 0; tensor < tensors_; ++tensor) {
      const auto [first, last] = tiling_.tiles_of_tensor(tensor);
      for (int64_t row = 0; row < rows_; ++row) {
        std::fill(total.begin(), total.end(), 0.0);
        for (int64_t tile = first; tile < last; tile = (tile / tiles_a_sum_ + 1) * tiles_a_sum_) {
          const double* sums = at(tile, tensor, row);
          for (int64_t i = 0; i < size_; ++i) total[i] += sums[i];
        }
        student_.unpack_bias(total.data(), d_bias + (row * tensors_ + tensor) * size_);
      }
    }
  }

 private:
  // Tiles that are summed together, by one thread, share a tensor's sums. Where one of the two numbers
  // grows from tile to tile, so does their sum, and no two pairs have the same.
  double* at(int64_t tile, int64_t tensor, int64_t row) {
    return sums_.data() + ((tile / tiles_a_sum_ + tensor) * rows_ + row) * size_;
  }

  const PackedStudent<T>& student_;
  const Tiling& tiling_;
  const int64_t tensors_, rows_, size_, tiles_a_sum_;
  std::vector<double> sums_;
};

}  // namespace amalgam::cpu
