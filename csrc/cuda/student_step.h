// One step of a student in place, for all tensors of one kind in one launch;
// amalgam/operations/student_forms.py has the formulas, amalgam/operations/table.py the table of tensors.
// All pointers are device memory of `device`; `stream` is a cudaStream_t of it. Nothing here waits
// for the device.
#pragma once

#include <cstdint>
#include <vector>

namespace amalgam::cuda {

// How numbers lie in memory.
enum class Stored { float32, bfloat16, float16 };

// What a launch computes by. Fits into the kernel's parameters, where operands are free.
struct StudentCall {
  // Of student_threads, a unit after another: four numbers (gates i, f, a, o) of the bias, of each
  // input and of each of the layer's h; then the head's rows and its biases, and zeros up to 16
  // bytes. Of student_tiles, what pack_student gives.
  const void* weights;
  const float* biases;         // of the nominal form: (tensors, 4 hidden), the first layer's
  const float* corrections;    // likewise: (tensors, 3)
  const int64_t* places;       // likewise: (count,), each tensor's place among them
  const int64_t* table;        // (count, 9): param, grad, m, v, h, c, numel, step, seed
  const int64_t* first_block;  // (count,)
  const double* control;       // (4,): keep, lr, warm-up's rate, skip; or null
  int64_t blocks;              // of all tensors
  int count;
  int warmup_steps;
  Stored param, grad;
  bool stochastic;             // how h, c and parameters are rounded to bfloat16
  float keep, lr;              // where there is no control: keep p - lr update
  float alpha, beta1, beta2;
  float of_grad, of_square;    // 1 - beta1, 1 - beta2
  float per_m, per_v;          // and one over them
  float eps;
};

inline void set_constants(StudentCall& call, double alpha, double beta1, double beta2,
                          double eps) {
  call.alpha = static_cast<float>(alpha);
  call.beta1 = static_cast<float>(beta1);
  call.beta2 = static_cast<float>(beta2);
  call.of_grad = static_cast<float>(1 - beta1);
  call.of_square = static_cast<float>(1 - beta2);
  call.per_m = static_cast<float>(1 / (1 - beta1));
  call.per_v = static_cast<float>(1 / (1 - beta2));
  call.eps = static_cast<float>(eps);
}

// A student whose step is compiled in.
struct StudentSize {
  int layers, hidden;
  int block;                   // coordinates of a block, whatever the cells' storage
};

// Of the form RNNProp, or of the nominal form.
const std::vector<StudentSize>& student_sizes(bool nominal);

// Of students on tensor cores.
constexpr int kTileBlock = 64;

// How sums of products err: as float32 does (from tensor cores, three products of TF32 for one), or
// as factors of TF32 or bfloat16 do. Kernels without tensor cores compute in float32 by all of them.
enum class Products { kSplit, kTf32, kBf16 };

// What the cells of one launch have in common, and what kernels may do for speed.
struct StudentKind {
  bool nominal;
  int layers, hidden;
  Stored moments, cells;
  bool aligned;                // whether all rows of h and c begin at multiples of 16 bytes
  Products products;
  bool approximate;
};

// Weights as PyTorch lays them out; gates in the order input, forget, candidate, output.
struct StudentWeights {
  const float* w_ih[2];        // (4 hidden, inputs)
  const float* w_hh[2];        // (4 hidden, hidden)
  const float* b[2];           // (4 hidden,)
  const float* head;           // (hidden,)
  const float* head_bias;
};

// How many 32-bit words pack_student writes; none for students whose weights Python packs.
int packed_student_words(int layers, int hidden, Products products);

// Writes the weights, on the device, as kernels for tensor cores read them.
void pack_student(const StudentWeights& weights, uint32_t* to, int layers, Products products,
                  bool approximate, int device, void* stream);

// Throws std::invalid_argument for a size that is not compiled in.
void student_step_in_place(const StudentCall& call, const StudentKind& kind, int device,
                           void* stream);

}  // namespace amalgam::cuda
