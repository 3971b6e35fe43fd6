#include "student_small.h"

#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

#include "cell_codes.h"
#include "dispatch.h"
#include "parallel.h"
#include "rounding.h"
#include "storage.h"
#include "tiling.h"

namespace amalgam::cpu {
namespace {

// Tiles that are computed in one go: they take some 10 us, and rows of them fit on a stack.
constexpr int64_t kTilesARun = 16;

constexpr int kMostUnits = 16;
static_assert(kSmall[std::size(kSmall) - 1] == kMostUnits);

bool is_float(Storage storage) {
  return storage == Storage::float32 || storage == Storage::bfloat16;
}

bool narrow(Storage storage) { return storage == Storage::bfloat16; }

class PackedSmall {
 public:
  explicit PackedSmall(const Student<float>& student) {
    const int hidden = student.hidden, inputs = kNominal.features;
    const float* const* from = student.weights;
    for (int unit = 0; unit < hidden; ++unit) {
      for (int row = 0; row < inputs + hidden; ++row) {
        for (int gate = 0; gate < 4; ++gate) {
          const int64_t output = int64_t(gate) * hidden + unit;
          const float weight = row < inputs ? from[0][output * inputs + row]
                                            : from[1][output * hidden + row - inputs];
          weights_.push_back(static_cast<float>(kOfGate[gate] * weight));
        }
      }
      head_.push_back(static_cast<float>(kOfExp * from[3][unit]));
      head_.push_back(from[3][hidden + unit]);
    }
    const StudentConstants& constants = student.constants;
    student_ = {weights_.data(),
                head_.data(),
                {static_cast<float>(kOfExp * from[4][0]), from[4][1]},
                static_cast<float>(constants.alpha),
                static_cast<float>(constants.beta1),
                static_cast<float>(constants.beta2),
                static_cast<float>(constants.eps),
                static_cast<float>(1 - constants.beta1),
                static_cast<float>(1 - constants.beta2)};
  }
  PackedSmall(const PackedSmall&) = delete;

  const SmallStudent& student() const { return student_; }

 private:
  std::vector<float> weights_, head_;
  SmallStudent student_;
};

}  // namespace

bool is_small(const Student<float>& student, const StudentStep& step) {
  const bool has_kernel =
      std::find(std::begin(kSmall), std::end(kSmall), student.hidden) != std::end(kSmall);
  return student.nominal && student.layers == 1 && has_kernel && is_float(step.moments) &&
         (is_float(step.cells) || step.cells == Storage::int8);
}

void small_student_step(const Student<float>& student, const StudentStep& step,
                        const StudentTensor* tensors, int64_t count, int threads) {
  const PackedSmall packed(student);
  const SmallKernel kernel = AMALGAM_DISPATCH(small_kernels).of(student.hidden, narrow(step.cells));
  std::vector<int64_t> sizes(count);
  for (int64_t i = 0; i < count; ++i) sizes[i] = tensors[i].numel;
  const Tiling tiling(std::move(sizes), true);
  const bool direct_grad = is_float(step.grad), direct_out = is_float(step.out);
  const SmallStep how{direct_grad && narrow(step.grad),
                      narrow(step.moments),
                      narrow(step.cells),
                      direct_out && narrow(step.out),
                      step.in_place,
                      static_cast<float>(step.keep),
                      static_cast<float>(step.lr),
                      step.stochastic};

  const bool coded = step.cells == Storage::int8;
  const CodeKernels codes = AMALGAM_DISPATCH(code_kernels);
  const auto run_part = [&](const Piece& piece) {
    const StudentTensor& tensor = tensors[piece.tensor];
    const auto from = [&](const void* rows, Storage storage) {
      return static_cast<const char*>(rows) + piece.start * size_of(storage);
    };
    const auto to = [&](void* rows, Storage storage) {
      return static_cast<char*>(rows) + piece.start * size_of(storage);
    };
    const auto to_codes = [&](void* all) { return static_cast<int8_t*>(all) + piece.start; };
    SmallPiece rows{piece.start,
                    piece.count,
                    student.weights[2] + tensor.index * 4 * student.hidden,
                    student.corrections + tensor.index * 3,
                    tensor.stride,
                    from(tensor.grad, step.grad),
                    from(tensor.m, step.moments),
                    from(tensor.v, step.moments),
                    from(tensor.h, step.cells),
                    from(tensor.c, step.cells),
                    to(tensor.new_m, step.moments),
                    to(tensor.new_v, step.moments),
                    to(tensor.new_h, step.cells),
                    to(tensor.new_c, step.cells),
                    to(tensor.out, step.out),
                    static_cast<uint32_t>(tensor.key)};
    float grad[kTile * kTilesARun], out[kTile * kTilesARun];
    if (!direct_grad) {
      load_row(step.grad, tensor.grad, piece.start, piece.count, grad);
      rows.grad = grad;
    }
    if (!direct_out) {
      if (step.in_place) load_row(step.out, tensor.out, piece.start, piece.count, out);
      rows.out = out;
    }
    float h[kMostUnits * kMostCoded], c[kMostUnits * kMostCoded];
    const CodedRows of_codes{student.hidden, piece.count, kMostCoded, tensor.stride};
    if (coded) {
      codes.load(of_codes, static_cast<const int8_t*>(rows.h), h);
      codes.load(of_codes, static_cast<const int8_t*>(rows.c), c);
      rows.h = rows.new_h = h;
      rows.c = rows.new_c = c;
      rows.stride = kMostCoded;
    }
    kernel(packed.student(), how, rows);
    if (coded) {
      CodeRounding rounding{step.stochastic, rows.key, 0, piece.start, 16};
      codes.store(of_codes, rounding, h, to_codes(tensor.new_h));
      rounding.shift = 0;
      codes.store(of_codes, rounding, c, to_codes(tensor.new_c));
    }
    if (!direct_out) store_row(step.out, out, piece.count, tensor.out, piece.start);
  };
  const auto run_piece = [&](const Piece& piece) {
    const int64_t most = coded ? kMostCoded : piece.count;
    for (int64_t done = 0; done < piece.count; done += most) {
      run_part({piece.tensor, piece.start + done, std::min(most, piece.count - done), 0});
    }
  };
  const int64_t tiles = tiling.tiles(), runs = (tiles + kTilesARun - 1) / kTilesARun;
  for_each_block(runs, worthwhile_threads(tiles, kTilesARun, threads), [&](int64_t run) {
    const int64_t first = run * kTilesARun;
    tiling.for_each_piece(first, std::min(kTilesARun, tiles - first), run_piece);
  });
}

}  // namespace amalgam::cpu
