// The optimal choice of few units: a lane computes a coordinate, with its gates in registers. What the
// teachers make of it, of which there may be one or eight, it keeps in a column of shared memory.
//
// Sums over coordinates are a warp's own, as in student_unroll.cuh.
#include "choice_step.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "activations.cuh"
#include "launch.cuh"
#include "teacher_pool.cuh"
#include "warp_sums.cuh"

namespace amalgam::cuda {
namespace choice {
namespace {

constexpr int kWarps = 4;  // of a block
constexpr int kThreads = kWarps * kLaneCount;
constexpr int kRanks = 3;                 // that are features
constexpr int kRankRows = kRanks + 1;     // of biases: one for all other ranks
constexpr int kRows = 2 + kRanks;         // of call.weights before the teachers'
constexpr float kIdleLogit = -23.025850929940457f;  // log(1e-10): of the option that moves nothing

struct Pool {
  TeacherConstants<float> teachers[kMostTeachers];
};

// In shared memory. What the time and the rank add to a bias is alike for all coordinates of a rank.
template <int hidden>
struct alignas(16) Weights {
  float4 biases[kRankRows][hidden];
  float4 of_teachers[kMostTeachers][hidden];
  float4 of_h[hidden][hidden];
  float head[kMostTeachers][hidden];
  float head_bias[kMostTeachers];

  __device__ void bring(const ChoiceCall& call) {
    const float4* from = reinterpret_cast<const float4*>(call.weights);
    const int teachers = call.teachers * hidden, before = kRows * hidden;
    for (int at = threadIdx.x; at < kRankRows * hidden; at += kThreads) {
      const int rank = at / hidden, unit = at % hidden;
      float4 sums = from[unit];
      add(sums, from[hidden + unit], call.time);
      if (rank > 0) add(sums, from[(1 + rank) * hidden + unit], 1.0f);
      biases[rank][unit] = sums;
    }
    for (int at = threadIdx.x; at < teachers; at += kThreads) {
      of_teachers[0][at] = from[before + at];
    }
    for (int at = threadIdx.x; at < hidden * hidden; at += kThreads) {
      of_h[0][at] = from[before + teachers + at];
    }
    const float* heads = call.weights + 4 * (before + teachers + hidden * hidden);
    for (int at = threadIdx.x; at < teachers; at += kThreads) head[0][at] = heads[at];
    for (int at = threadIdx.x; at < call.teachers; at += kThreads) {
      head_bias[at] = heads[teachers + at];
    }
    __syncthreads();
  }
};

// The place of a rank among the biases.
__device__ inline int row_of_rank(int64_t rank) {
  return rank >= 1 && rank <= kRanks ? static_cast<int>(rank) : 0;
}

// Calls `body` with each teacher's number, settings, place in a row of (K, N) and old moments, which
// are read while the teacher before is computed.
template <typename Body>
__device__ void for_each_teacher(const ChoiceCall& call, const Pool& pool, int64_t at,
                                 const Body& body) {
  float next_m = call.m[at], next_v = call.v[at];
#pragma unroll 1
  for (int k = 0; k < call.teachers; ++k, at += call.n) {
    const Moments<float> old{next_m, next_v};
    if (k + 1 < call.teachers) {
      next_m = call.m[at + call.n];
      next_v = call.v[at + call.n];
    }
    body(k, pool.teachers[k], at, old);
  }
}

// A coordinate's step of the LSTM.
template <int hidden>
struct Cell {
  float4 gates[hidden];  // sums, and then the gates: i, f, candidate, o
  float squashed[hidden], out[hidden];

  __device__ void begin(const Weights<hidden>& weights, int rank) {
#pragma unroll
    for (int unit = 0; unit < hidden; ++unit) gates[unit] = weights.biases[rank][unit];
  }

  __device__ void see(const float4 (&of)[hidden], float x) {
#pragma unroll
    for (int unit = 0; unit < hidden; ++unit) add(gates[unit], of[unit], x);
  }

  // Steps c.
  __device__ void run(const Weights<hidden>& weights, const float (&h)[hidden],
                      float (&c)[hidden]) {
#pragma unroll
    for (int from = 0; from < hidden; ++from) see(weights.of_h[from], h[from]);
#pragma unroll
    for (int unit = 0; unit < hidden; ++unit) {
      float4& gate = gates[unit];
      gate.x = sigmoid_of<false>(gate.x);
      gate.y = sigmoid_of<false>(gate.y);
      gate.z = tanh_of<false>(gate.z);
      gate.w = sigmoid_of<false>(gate.w);
      c[unit] = __fmaf_rn(gate.x, gate.z, __fmul_rn(gate.y, c[unit]));
      squashed[unit] = tanh<false>(c[unit]);
      out[unit] = __fmul_rn(gate.w, squashed[unit]);
    }
  }

  // Writes what each teacher counts for to a column; returns the mixture of the updates in another.
  __device__ float mix(const Weights<hidden>& weights, int teachers, const float* updates,
                       float* shares) const {
    float largest = kIdleLogit;
#pragma unroll 1
    for (int k = 0; k < teachers; ++k) {
      float logit = weights.head_bias[k];
#pragma unroll
      for (int unit = 0; unit < hidden; ++unit) {
        logit = __fmaf_rn(weights.head[k][unit], out[unit], logit);
      }
      shares[k * kStageStride] = logit;
      largest = logit > largest ? logit : largest;
    }
    float total = power_of(kIdleLogit - largest);
#pragma unroll 1
    for (int k = 0; k < teachers; ++k) {
      const float term = power_of(shares[k * kStageStride] - largest);
      shares[k * kStageStride] = term;
      total += term;
    }
    const float scale = reciprocal(total);
    float mixed = 0.0f;
#pragma unroll 1
    for (int k = 0; k < teachers; ++k) {
      const float share = shares[k * kStageStride] * scale;
      shares[k * kStageStride] = share;
      mixed = __fmaf_rn(share, updates[k * kStageStride], mixed);
    }
    return mixed;
  }

  __device__ static float power_of(float x) {
    const auto [two, rest] = exponential(x);
    return fused(two, rest, two);
  }
};

template <int hidden>
__device__ void load_rows(float (&to)[hidden], const float* from, int64_t n, int64_t at) {
#pragma unroll
  for (int unit = 0; unit < hidden; ++unit) to[unit] = from[unit * n + at];
}

__device__ inline int64_t this_warp() {
  return int64_t{blockIdx.x} * kWarps + threadIdx.x / kLaneCount;
}

__host__ __device__ inline int64_t tiles_of(int64_t n) { return (n + kLaneCount - 1) / kLaneCount; }

// So many blocks a processor has at once: registers bound them.
template <int hidden>
constexpr int kStepBlocks = hidden <= 4 ? 5 : 4;

template <int hidden>
__global__ void __launch_bounds__(kThreads, kStepBlocks<hidden>)
    choice_forward(const ChoiceCall call, const Pool pool, float* update, const ChoiceState to,
                   float* mixture) {
  __shared__ Weights<hidden> weights;
  __shared__ float columns[kWarps][2 * kMostTeachers][kStageStride];
  weights.bring(call);
  const int lane = threadIdx.x % kLaneCount;
  float* const updates = &columns[threadIdx.x / kLaneCount][0][lane];
  float* const shares = updates + kMostTeachers * kStageStride;
  const int64_t n = call.n, tiles = tiles_of(n), warps = int64_t{gridDim.x} * kWarps;
#pragma unroll 1
  for (int64_t tile = this_warp(); tile < tiles; tile += warps) {
    forget_memory();  // or weights would be read before the loop, and wait in memory of the thread
    const int64_t at = tile * kLaneCount + lane;
    if (at >= n) return;
    const float g = call.grad[at];
    const int rank = row_of_rank(call.ranks[at]);
    float h[hidden], c[hidden];
    load_rows(h, call.h, n, at);
    load_rows(c, call.c, n, at);
    Cell<hidden> cell;
    cell.begin(weights, rank);
    for_each_teacher(call, pool, at, [&](int k, const TeacherConstants<float>& teacher,
                                         int64_t place, Moments<float> old) {
      with_kind(teacher.kind, [&](auto kind) {
        using Kind = decltype(kind);
        const Moments<float> now = moments<Kind, float>(teacher, g, old);
        to.m[place] = now.m;
        to.v[place] = now.v;
        updates[k * kStageStride] = Kind::update(teacher, g, now);
      });
      cell.see(weights.of_teachers[k], updates[k * kStageStride]);
    });
    cell.run(weights, h, c);
#pragma unroll
    for (int unit = 0; unit < hidden; ++unit) {
      to.h[unit * n + at] = cell.out[unit];
      to.c[unit * n + at] = c[unit];
    }
    const float mixed = cell.mix(weights, call.teachers, updates, shares);
    update[at] = __fmul_rn(call.learning_rate, mixed);
#pragma unroll 1
    for (int k = 0; k < call.teachers; ++k) mixture[k * n + at] = shares[k * kStageStride];
  }
}

// What a warp stages of 32 coordinates, and how its lanes share the products of the rows of gates by
// those of inputs, which are one for each rank's bias, the teachers' updates and h.
template <int hidden, int pool>
struct alignas(16) Stage {
  static constexpr int kGates = 4 * hidden, kInputs = kRankRows + pool + hidden;
  static constexpr int kInputGroups = 4, kGateGroups = kLaneCount / kInputGroups;
  static constexpr int kGatesOfLane = kGates / kGateGroups;
  static constexpr int kInputsOfLane = kInputs / kInputGroups;
  static_assert(kGates % kGateGroups == 0 && kInputs % kInputGroups == 0, "lanes have as many");
  static constexpr int kHeadSums = pool * (hidden + 1);
  static constexpr int kHeadOfLane = (kHeadSums + kLaneCount - 1) / kLaneCount;
  static constexpr int kSums = kGates * kInputs + kHeadSums;

  using Row = float[kStageStride];
  Row gates[kGates];
  Row ranks[kRankRows], updates[pool], h[hidden];  // the inputs
  Row logits[pool];
  Row out[hidden], ones;                           // what the head's weights multiply
  Row shares[pool];

  __device__ static float4 four(const Row& row, int at) {
    return *reinterpret_cast<const float4*>(row + at);
  }
  __device__ const Row& input(int index) const { return *(ranks + index); }
  __device__ const Row& of_head(int index) const { return *(out + index); }

  // What of it no step writes.
  __device__ void begin(int lane) {
    ones[lane] = 1.0f;
#pragma unroll
    for (int k = 0; k < pool; ++k) updates[k][lane] = logits[k][lane] = 0.0f;
  }
};

// A lane's part of the sums over coordinates.
template <int hidden, int pool>
struct LaneSums {
  using Staged = Stage<hidden, pool>;
  static constexpr int kGates = Staged::kGatesOfLane, kInputs = Staged::kInputsOfLane;
  LongSum of_gates[kGates][kInputs], of_head[Staged::kHeadOfLane];

  // Its rows, those of different lanes lie next to each other, so in different banks.
  __device__ static int gate(int lane, int each) {
    return lane / Staged::kInputGroups + each * Staged::kGateGroups;
  }
  __device__ static int input(int lane, int each) {
    return lane % Staged::kInputGroups + each * Staged::kInputGroups;
  }

  __device__ void add(const Staged& stage, int lane) {
    float sums[kGates][kInputs] = {};
#pragma unroll 2
    for (int at = 0; at < kLaneCount; at += 4) {
      float4 d[kGates], x[kInputs];
#pragma unroll
      for (int each = 0; each < kGates; ++each) {
        d[each] = Staged::four(stage.gates[gate(lane, each)], at);
      }
#pragma unroll
      for (int each = 0; each < kInputs; ++each) {
        x[each] = Staged::four(stage.input(input(lane, each)), at);
      }
#pragma unroll
      for (int one = 0; one < kGates; ++one) {
#pragma unroll
        for (int other = 0; other < kInputs; ++other) {
          sums[one][other] = dot(d[one], x[other], sums[one][other]);
        }
      }
    }
#pragma unroll
    for (int one = 0; one < kGates; ++one) {
#pragma unroll
      for (int other = 0; other < kInputs; ++other) of_gates[one][other].add(sums[one][other]);
    }
#pragma unroll
    for (int each = 0; each < Staged::kHeadOfLane; ++each) {
      const int index = (lane + each * kLaneCount) % Staged::kHeadSums;
      const auto& logits = stage.logits[index / (hidden + 1)];
      const auto& out = stage.of_head(index % (hidden + 1));
      float sum = 0.0f;
#pragma unroll 2
      for (int at = 0; at < kLaneCount; at += 4) {
        sum = dot(Staged::four(logits, at), Staged::four(out, at), sum);
      }
      of_head[each].add(sum);
    }
  }

  __device__ void store(double* to, int lane) const {
#pragma unroll
    for (int one = 0; one < kGates; ++one) {
#pragma unroll
      for (int other = 0; other < kInputs; ++other) {
        to[gate(lane, one) * Staged::kInputs + input(lane, other)] = of_gates[one][other].value();
      }
    }
#pragma unroll
    for (int each = 0; each < Staged::kHeadOfLane; ++each) {
      const int index = lane + each * kLaneCount;
      if (index < Staged::kHeadSums) {
        to[Staged::kGates * Staged::kInputs + index] = of_head[each].value();
      }
    }
  }
};

template <int hidden>
constexpr int kGradientBlocks = hidden <= 4 ? 4 : 2;

template <int hidden, int most>
__global__ void __launch_bounds__(kThreads, kGradientBlocks<hidden>)
    choice_backward(const ChoiceCall call, const Pool pool, const float* d_update,
                    const ChoiceState d_new, const float* d_mixture, float* d_grad,
                    const ChoiceState d_old, double* sums, int64_t warps) {
  __shared__ Weights<hidden> weights;
  __shared__ Stage<hidden, most> stages[kWarps];
  weights.bring(call);
  if (this_warp() >= warps) return;
  const int lane = threadIdx.x % kLaneCount;
  Stage<hidden, most>& stage = stages[threadIdx.x / kLaneCount];
  stage.begin(lane);
  LaneSums<hidden, most> lane_sums;
  const int64_t n = call.n, tiles = tiles_of(n);
#pragma unroll 1
  for (int64_t tile = this_warp(); tile < tiles; tile += warps) {
    forget_memory();
    // A lane without a coordinate takes the tile's first, whose gradients are zeros there.
    const bool inside = tile * kLaneCount + lane < n;
    const int64_t at = tile * kLaneCount + (inside ? lane : 0);
    const float g = call.grad[at];
    const int rank = row_of_rank(call.ranks[at]);
    float h[hidden], c[hidden], d_h[hidden];
    load_rows(h, call.h, n, at);
    load_rows(c, call.c, n, at);
    Cell<hidden> cell;
    cell.begin(weights, rank);
    for_each_teacher(call, pool, at, [&](int k, const TeacherConstants<float>& teacher, int64_t,
                                         Moments<float> old) {
      float u;
      with_kind(teacher.kind, [&](auto kind) {
        using Kind = decltype(kind);
        u = Kind::update(teacher, g, moments<Kind, float>(teacher, g, old));
      });
      stage.updates[k][lane] = u;
      cell.see(weights.of_teachers[k], u);
    });
    float new_c[hidden];
#pragma unroll
    for (int unit = 0; unit < hidden; ++unit) {
      stage.h[unit][lane] = h[unit];
      new_c[unit] = c[unit];
    }
#pragma unroll
    for (int row = 0; row < kRankRows; ++row) stage.ranks[row][lane] = row == rank ? 1.0f : 0.0f;
    cell.run(weights, h, new_c);
    cell.mix(weights, call.teachers, &stage.updates[0][lane], &stage.shares[0][lane]);

    const float d_mixed = __fmul_rn(call.learning_rate, only(inside, d_update[at]));
    float mean = 0.0f;
#pragma unroll 1
    for (int k = 0; k < call.teachers; ++k) {
      const float d_share = __fmaf_rn(d_mixed, stage.updates[k][lane],
                                      only(inside, d_mixture[k * n + at]));
      stage.logits[k][lane] = d_share;
      mean = __fmaf_rn(stage.shares[k][lane], d_share, mean);
    }
#pragma unroll
    for (int unit = 0; unit < hidden; ++unit) {
      stage.out[unit][lane] = cell.out[unit];
      d_h[unit] = only(inside, d_new.h[unit * n + at]);
    }
#pragma unroll 1
    for (int k = 0; k < call.teachers; ++k) {
      const float d_logit = stage.shares[k][lane] * (stage.logits[k][lane] - mean);
      stage.logits[k][lane] = d_logit;
#pragma unroll
      for (int unit = 0; unit < hidden; ++unit) {
        d_h[unit] = __fmaf_rn(weights.head[k][unit], d_logit, d_h[unit]);
      }
    }

    forget_memory();  // likewise: weights are read again
    // One over what the sums of gates are scaled by: the weights are, too.
    constexpr float of_sigmoid = float(1 / double(kSigmoidScale));
    constexpr float of_tanh = float(1 / double(kTanhScale));
#pragma unroll
    for (int unit = 0; unit < hidden; ++unit) {
      float4& gate = cell.gates[unit];
      const float s = cell.squashed[unit];
      const float d_cell = __fmaf_rn(d_h[unit] * gate.w, 1.0f - s * s,
                                     only(inside, d_new.c[unit * n + at]));
      if (inside) d_old.c[unit * n + at] = d_cell * gate.y;
      const float i = d_cell * gate.z * gate.x * (1.0f - gate.x);
      const float f = d_cell * c[unit] * gate.y * (1.0f - gate.y);
      const float a = d_cell * gate.x * (1.0f - gate.z * gate.z);
      const float o = d_h[unit] * s * gate.w * (1.0f - gate.w);
      stage.gates[unit][lane] = i;
      stage.gates[hidden + unit][lane] = f;
      stage.gates[2 * hidden + unit][lane] = a;
      stage.gates[3 * hidden + unit][lane] = o;
      gate = make_float4(i * of_sigmoid, f * of_sigmoid, a * of_tanh, o * of_sigmoid);
    }
#pragma unroll
    for (int from = 0; from < hidden; ++from) {
      float d = 0.0f;
#pragma unroll
      for (int unit = 0; unit < hidden; ++unit) {
        d = dot(weights.of_h[from][unit], cell.gates[unit], d);
      }
      if (inside) d_old.h[from * n + at] = d;
    }
    float d_g = 0.0f;
    for_each_teacher(call, pool, at, [&](int k, const TeacherConstants<float>& teacher,
                                         int64_t place, Moments<float> old) {
      float d_u = d_mixed * stage.shares[k][lane];
#pragma unroll
      for (int unit = 0; unit < hidden; ++unit) {
        d_u = dot(weights.of_teachers[k][unit], cell.gates[unit], d_u);
      }
      const Moments<float> d_now{d_new.m[place], d_new.v[place]};
      with_kind(teacher.kind, [&](auto kind) {
        using Kind = decltype(kind);
        const Moments<float> now = moments<Kind, float>(teacher, g, old);
        const Gradients<float> d = step_gradients<Kind, float>(teacher, d_u, d_now, g, now);
        d_g += d.g;
        if (inside) {
          d_old.m[place] = d.m;
          d_old.v[place] = d.v;
        }
      });
    });
    if (inside) d_grad[at] = d_g;
    __syncwarp();
    lane_sums.add(stage, lane);
    __syncwarp();
  }
  lane_sums.store(sums + this_warp() * Stage<hidden, most>::kSums, lane);
}

// The kernels of so many units; gradients are for four teachers at most, or for all.
struct Kernels {
  int hidden;
  void (*forward)(ChoiceCall, Pool, float*, ChoiceState, float*);
  int blocks;  // that a processor has at once
  struct Gradients {
    int teachers, sums;
    void (*backward)(ChoiceCall, Pool, const float*, ChoiceState, const float*, float*,
                     ChoiceState, double*, int64_t);
  } gradients[2];
  int gradient_blocks;

  const Gradients& of(int teachers) const { return gradients[teachers > gradients[0].teachers]; }
};

template <int hidden>
constexpr Kernels kernels() {
  return {hidden,
          choice_forward<hidden>,
          kStepBlocks<hidden>,
          {{4, Stage<hidden, 4>::kSums, choice_backward<hidden, 4>},
           {kMostTeachers, Stage<hidden, kMostTeachers>::kSums,
            choice_backward<hidden, kMostTeachers>}},
          kGradientBlocks<hidden>};
}

const Kernels& kernels_of(int hidden, int teachers) {
  static const Kernels all[] = {kernels<4>(), kernels<8>()};
  if (teachers < 1 || teachers > kMostTeachers) {
    throw std::invalid_argument("pools must have 1 to " + std::to_string(kMostTeachers) +
                                " teachers, not " + std::to_string(teachers));
  }
  for (const Kernels& each : all) {
    if (each.hidden == hidden) return each;
  }
  throw std::invalid_argument("no choice by a layer of " + std::to_string(hidden) +
                              " units is compiled in");
}

Pool pool_of(const TeacherSettings& settings, int teachers) {
  Pool pool{};
  for (int k = 0; k < teachers; ++k) pool.teachers[k] = constants_of<float>(settings, k);
  return pool;
}

}  // namespace
}  // namespace choice

const std::vector<int>& choice_sizes() {
  static const std::vector<int> sizes{4, 8};
  return sizes;
}

int choice_pool(int teachers) { return choice::kernels_of(choice_sizes()[0], teachers).of(teachers).teachers; }

int choice_sums(int hidden, int teachers) {
  return choice::kernels_of(hidden, teachers).of(teachers).sums;
}

int64_t choice_warps(int hidden, int teachers, int64_t n, int device) {
  const choice::Kernels& by = choice::kernels_of(hidden, teachers);
  const int64_t tiles = choice::tiles_of(n);
  const int64_t blocks = sharing_blocks(tiles, by.gradient_blocks, device);
  return std::min(tiles, blocks * choice::kWarps);
}

void choice_step(const ChoiceCall& call, const TeacherSettings& settings, int hidden,
                 float* update, const ChoiceState& to, float* mixture, int device, void* stream) {
  const choice::Kernels& by = choice::kernels_of(hidden, call.teachers);
  const choice::Pool pool = choice::pool_of(settings, call.teachers);
  if (call.n == 0) return;
  use_device(device);
  const int64_t blocks = (choice::tiles_of(call.n) + choice::kWarps - 1) / choice::kWarps;
  launch("choice_step", by.forward, sharing_blocks(blocks, by.blocks, device), choice::kThreads, stream,
         call, pool, update, to, mixture);
}

void choice_step_backward(const ChoiceCall& call, const TeacherSettings& settings, int hidden,
                          const float* d_update, const ChoiceState& d_new, const float* d_mixture,
                          float* d_grad, const ChoiceState& d_old, double* sums, int64_t warps,
                          int device, void* stream) {
  const auto& by = choice::kernels_of(hidden, call.teachers).of(call.teachers);
  const choice::Pool pool = choice::pool_of(settings, call.teachers);
  if (call.n == 0) return;
  use_device(device);
  const auto blocks = static_cast<unsigned>((warps + choice::kWarps - 1) / choice::kWarps);
  launch("choice_step_backward", by.backward, blocks, choice::kThreads, stream, call, pool, d_update, d_new,
         d_mixture, d_grad, d_old, sums, warps);
}

}  // namespace amalgam::cuda
