// The nominal student of few units: a lane computes a coordinate, with all of its state in registers.
//
// Sums over coordinates are a warp's own. It stages what 32 coordinates have of gates and inputs in
// shared memory, and there a lane multiplies a few rows of the ones by a few rows of the others, for
// all 32: weights' gradients stay in its registers from tile to tile. A warp takes tiles that lie one
// after another, so that it seldom comes to another tensor.
#pragma once

#include "activations.cuh"
#include "launch.cuh"
#include "student_forms.cuh"
#include "student_unroll_launches.h"
#include "warp_sums.cuh"

namespace amalgam::cuda {

// How lanes share the products of a gradient's 4 hidden rows and of the inputs' rows, which are the
// features, h and a row of ones.
template <int hidden>
struct Shares {
  static constexpr int kFeatures = 3, kOutputs = 2;
  static constexpr int kGates = 4 * hidden, kInputs = kFeatures + hidden + 1;
  static constexpr int kInputGroups = 4, kGateGroups = kLaneCount / kInputGroups;
  static constexpr int kGatesOfLane = kGates / kGateGroups;
  static constexpr int kInputsOfLane = kInputs / kInputGroups;
  static constexpr int kHeadSums = kOutputs * (hidden + 1);
  static constexpr int kSums = kGates * (kInputs - 1) + kHeadSums;
  static_assert(kGates % kGateGroups == 0 && kInputs % kInputGroups == 0 && kHeadSums <= kLaneCount,
                "every lane has as many");

  static constexpr int kOutputRows = kGates + kInputs, kHeadRows = kOutputRows + kOutputs;
  static constexpr int kRows = kHeadRows + hidden;

  __device__ static int lane() { return threadIdx.x % kLaneCount; }
  // The rows of a lane; those of different lanes lie next to each other, so in different banks.
  __device__ static int gate(int each) { return lane() / kInputGroups + each * kGateGroups; }
  __device__ static int input(int each) { return lane() % kInputGroups + each * kInputGroups; }
};

// What is staged, 16-byte accesses included.
template <int hidden>
struct alignas(16) Stage {
  float rows[Shares<hidden>::kRows][kStageStride];
  float4 bias[hidden];  // of the tile's tensor in the step, scaled

  __device__ void put(int row, float x) { rows[row][Shares<hidden>::lane()] = x; }
  __device__ float4 four(int row, int at) const {
    return *reinterpret_cast<const float4*>(&rows[row][at]);
  }
};

__device__ inline float sign_of(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x; }

template <int hidden>
struct CoordinateState {
  float m, v, h[hidden], c[hidden];

  // `at` is a coordinate's place among all students'; cells hold a student's units one after another.
  __device__ void load(const UnrollCall& call, int64_t student, int64_t at) {
    m = call.m[at];
    v = call.v[at];
    const int64_t first = at + student * (hidden - 1) * call.n;
#pragma unroll
    for (int unit = 0; unit < hidden; ++unit) {
      h[unit] = call.h[unit * call.n + first];
      c[unit] = call.c[unit * call.n + first];
    }
  }
  // Zeros where there is no such coordinate.
  __device__ void load(const UnrollState& from, int64_t n, int64_t student, int64_t at,
                       bool inside) {
    m = only(inside, from.m[at]);
    v = only(inside, from.v[at]);
    const int64_t first = at + student * (hidden - 1) * n;
#pragma unroll
    for (int unit = 0; unit < hidden; ++unit) {
      h[unit] = only(inside, from.h[unit * n + first]);
      c[unit] = only(inside, from.c[unit * n + first]);
    }
  }
  __device__ void store(const UnrollState& to, int64_t n, int64_t student, int64_t at,
                        bool inside) const {
    if (!inside) return;
    to.m[at] = m;
    to.v[at] = v;
    const int64_t first = at + student * (hidden - 1) * n;
#pragma unroll
    for (int unit = 0; unit < hidden; ++unit) {
      to.h[unit * n + first] = h[unit];
      to.c[unit * n + first] = c[unit];
    }
  }

  // To and from a warp's scratch, of (2 hidden + 2, 32) numbers.
  static constexpr int kWords = (2 * hidden + 2) * kLaneCount;

  __device__ void keep(float* words) const {
    words += Shares<hidden>::lane();
    words[0] = m;
    words[kLaneCount] = v;
#pragma unroll
    for (int unit = 0; unit < hidden; ++unit) {
      words[(2 + 2 * unit) * kLaneCount] = h[unit];
      words[(3 + 2 * unit) * kLaneCount] = c[unit];
    }
  }
  __device__ void bring(const float* words) {
    words += Shares<hidden>::lane();
    m = words[0];
    v = words[kLaneCount];
#pragma unroll
    for (int unit = 0; unit < hidden; ++unit) {
      h[unit] = words[(2 + 2 * unit) * kLaneCount];
      c[unit] = words[(3 + 2 * unit) * kLaneCount];
    }
  }
};

// A coordinate's step, and all that its gradients take of it.
template <int hidden>
struct CoordinateStep {
  static constexpr int kFeatures = 3, kUnit = 1 + kFeatures + hidden, kHead = 4 * hidden * kUnit;

  const UnrollCall& call;
  const float* weights;
  const float4* bias;
  Corrections by;
  float root, r, a, b, x[kFeatures];
  float i[hidden], f[hidden], candidate[hidden], o[hidden], squashed[hidden];
  float out[2];  // the head's

  __device__ CoordinateStep(const UnrollCall& call, const float* weights, const float4* bias,
                            Corrections by)
      : call(call), weights(weights), bias(bias), by(by) {}

  // From the weights' places by unit: 0 is the bias's.
  __device__ float4 weight(int unit, int from) const {
    return reinterpret_cast<const float4*>(weights)[unit * kUnit + from];
  }

  // Steps the state.
  __device__ void run(float g, CoordinateState<hidden>& state) {
    // Or weights would be read before the loops over tiles, and wait in memory of the thread.
    forget_memory();
    state.m = __fmaf_rn(call.beta1, state.m, __fmul_rn(call.of_grad, g));
    state.v = __fmaf_rn(call.beta2, state.v, __fmul_rn(call.of_square, __fmul_rn(g, g)));
    root = root_approx(__fmul_rn(state.v, by.of_v));
    r = state.v > 0.0f ? reciprocal(__fadd_rn(root, call.eps)) : 0.0f;
    a = __fmul_rn(__fmul_rn(state.m, by.of_m), r);
    b = __fmul_rn(g, r);
    x[0] = fabsf(a);
    x[1] = tanh<false>(__fmul_rn(a, b));
    x[2] = tanh<false>(fabsf(b));
    out[0] = weights[kHead + 2 * hidden];
    out[1] = weights[kHead + 2 * hidden + 1];
    float old_h[hidden];
#pragma unroll
    for (int unit = 0; unit < hidden; ++unit) old_h[unit] = state.h[unit];
#pragma unroll
    for (int unit = 0; unit < hidden; ++unit) {
      float4 sums = bias[unit];
#pragma unroll
      for (int from = 0; from < kFeatures; ++from) add(sums, weight(unit, 1 + from), x[from]);
#pragma unroll
      for (int from = 0; from < hidden; ++from) {
        add(sums, weight(unit, 1 + kFeatures + from), old_h[from]);
      }
      i[unit] = sigmoid_of<false>(sums.x);
      f[unit] = sigmoid_of<false>(sums.y);
      candidate[unit] = tanh_of<false>(sums.z);
      o[unit] = sigmoid_of<false>(sums.w);
      state.c[unit] =
          __fmaf_rn(i[unit], candidate[unit], __fmul_rn(f[unit], state.c[unit]));
      squashed[unit] = tanh<false>(state.c[unit]);
      state.h[unit] = __fmul_rn(o[unit], squashed[unit]);
#pragma unroll
      for (int output = 0; output < 2; ++output) {
        out[output] =
            __fmaf_rn(weights[kHead + output * hidden + unit], state.h[unit], out[output]);
      }
    }
  }

  __device__ float below() const { return __fmaf_rn(fabsf(b), float(1 / kSoft), 1.0f); }

  __device__ float update() const {
    const float soft = __fmul_rn(b, reciprocal(below()));
    return __fmul_rn(factor_of(by.alpha, out[0]), __fmaf_rn(out[1], soft, a));
  }

  // Of the gradients in the update and in the new state, those in the old one, in whose place they
  // come; returns that in g. Stages those in the gates' sums and in the head's outputs, and what the
  // weights of both multiply.
  __device__ float differentiate(float g, float d_update, const CoordinateState<hidden>& old,
                                 const CoordinateState<hidden>& now, CoordinateState<hidden>& d,
                                 Stage<hidden>& stage) const {
    using Share = Shares<hidden>;
    forget_memory();  // likewise: weights are read again
    const float inverse = reciprocal(below()), soft = b * inverse;
    const float d_scaled = d_update * factor_of(by.alpha, out[0]);
    const bool within = out[0] >= kLeastLog && out[0] <= kMostLog;
    const float d_out[2] = {within ? d_scaled * __fmaf_rn(out[1], soft, a) : 0.0f, d_scaled * soft};
    float d_a = d_scaled, d_b = d_scaled * out[1] * (inverse * inverse);
    stage.put(Share::kOutputRows, d_out[0]);
    stage.put(Share::kOutputRows + 1, d_out[1]);

    // One over what the sums of gates are scaled by: the weights are, too.
    constexpr float of_sigmoid = float(1 / double(kSigmoidScale));
    constexpr float of_tanh = float(1 / double(kTanhScale));
    float d_h[hidden] = {}, d_x[kFeatures] = {};
#pragma unroll
    for (int unit = 0; unit < hidden; ++unit) {
      const float from_head = __fmaf_rn(weights[kHead + unit], d_out[0],
                                        weights[kHead + hidden + unit] * d_out[1]);
      const float d_new = d.h[unit] + from_head;
      const float d_cell =
          __fmaf_rn(d_new * o[unit], 1.0f - squashed[unit] * squashed[unit], d.c[unit]);
      float4 gates;
      gates.x = d_cell * candidate[unit] * i[unit] * (1.0f - i[unit]);
      gates.y = d_cell * old.c[unit] * f[unit] * (1.0f - f[unit]);
      gates.z = d_cell * i[unit] * (1.0f - candidate[unit] * candidate[unit]);
      gates.w = d_new * squashed[unit] * o[unit] * (1.0f - o[unit]);
      d.c[unit] = d_cell * f[unit];
      stage.put(unit, gates.x);
      stage.put(hidden + unit, gates.y);
      stage.put(2 * hidden + unit, gates.z);
      stage.put(3 * hidden + unit, gates.w);
      stage.put(Share::kGates + kFeatures + unit, old.h[unit]);
      stage.put(Share::kHeadRows + unit, now.h[unit]);
      gates.x *= of_sigmoid;
      gates.y *= of_sigmoid;
      gates.z *= of_tanh;
      gates.w *= of_sigmoid;
#pragma unroll
      for (int from = 0; from < kFeatures; ++from) {
        d_x[from] = dot(weight(unit, 1 + from), gates, d_x[from]);
      }
#pragma unroll
      for (int from = 0; from < hidden; ++from) {
        d_h[from] = dot(weight(unit, 1 + kFeatures + from), gates, d_h[from]);
      }
    }
#pragma unroll
    for (int unit = 0; unit < hidden; ++unit) d.h[unit] = d_h[unit];
#pragma unroll
    for (int from = 0; from < kFeatures; ++from) stage.put(Share::kGates + from, x[from]);

    const float d_product = d_x[1] * (1.0f - x[1] * x[1]);
    d_a += __fmaf_rn(d_x[0], sign_of(a), d_product * b);
    d_b += __fmaf_rn(d_product, a, d_x[2] * (1.0f - x[2] * x[2]) * sign_of(b));
    const float m_hat = now.m * by.of_m;
    const float d_r = __fmaf_rn(d_a, m_hat, d_b * g);
    const float d_m = __fmaf_rn(d_a * by.of_m, r, d.m);
    // Where v is 0 so is r, and the root has no slope.
    const float slope = r > 0.0f ? 0.5f * by.of_v * reciprocal(root) : 0.0f;
    const float d_v = __fmaf_rn(-(d_r * r) * r, slope, d.v);
    d.m = call.beta1 * d_m;
    d.v = call.beta2 * d_v;
    return __fmaf_rn(d_b, r, __fmaf_rn(call.of_grad, d_m, 2.0f * call.of_square * g * d_v));
  }
};

// The tensor that a tile is of.
__device__ inline int tensor_of(const UnrollCall& call, int64_t tile) {
  int tensor = 0;
#pragma unroll 1
  for (int after = call.tensors; after - tensor > 1;) {
    const int middle = (tensor + after) / 2;
    if (call.bounds[middle] <= tile) {
      tensor = middle;
    } else {
      after = middle;
    }
  }
  return tensor;
}

// Where a tile's coordinates are, which a warp knows alike in all lanes.
struct TilePlace {
  int tensor;
  int64_t at;   // this lane's coordinate among all students', or the tile's first
  bool inside;  // whether it is this lane's

  // `before`: the tile's tensor, or one before it.
  __device__ TilePlace(const UnrollCall& call, int64_t student, int64_t tile, int before)
      : tensor(before) {
#pragma unroll 1
    while (call.bounds[tensor + 1] <= tile) ++tensor;
    const int64_t* begins = call.bounds + call.tensors + 1;
    const int64_t begin = begins[tensor] + (tile - call.bounds[tensor]) * kLaneCount;
    const int lane = threadIdx.x % kLaneCount;
    inside = begin + lane < begins[tensor + 1];
    at = (inside ? begin + lane : begin) + student * call.n;
  }
};

// A warp's own: what it stages, and the bias and corrections of a tile's tensor in a step.
template <int hidden>
__device__ Corrections put_step(const UnrollCall& call, int64_t student, int tensor, int step,
                                Stage<hidden>& stage) {
  const int64_t row = (student * call.steps + step) * call.tensors + tensor;
  const int lane = Shares<hidden>::lane();
  __syncwarp();  // the bias of before may be in use
  if (lane < 4 * hidden) {
    const int gate = lane / hidden;
    const float scale = gate == 2 ? kTanhScale : kSigmoidScale;
    reinterpret_cast<float*>(stage.bias)[lane % hidden * 4 + gate] =
        __fmul_rn(scale, call.biases[row * (4 * hidden) + lane]);
  }
  __syncwarp();
  const float* own = call.corrections + 3 * row;
  return {own[0], own[1], __fmul_rn(call.alpha, own[2])};
}

template <int hidden>
constexpr int kPackedWeights = (CoordinateStep<hidden>::kHead + 2 * (hidden + 1) + 3) / 4 * 4;

template <int hidden>
__device__ void bring_weights(const UnrollCall& call, int64_t student, float* weights) {
  constexpr int threads = kUnrollWarps * kLaneCount, words = kPackedWeights<hidden> / 4;
  const float4* own = reinterpret_cast<const float4*>(call.weights) + student * words;
#pragma unroll 1
  for (int at = threadIdx.x; at < words; at += threads) {
    reinterpret_cast<float4*>(weights)[at] = own[at];
  }
  __syncthreads();
}

// The tiles of a warp, one after another.
__device__ inline int64_t first_tile(const UnrollCall& call, int64_t warp, int64_t warps) {
  return warp * call.tiles / warps;
}

// So many blocks a processor has at once: registers bound them.
template <int hidden>
constexpr int kStepBlocks = hidden <= 4 ? 7 : 4;
template <int hidden>
constexpr int kUnrollBlocks = hidden <= 4 ? 3 : 2;

template <int hidden>
__global__ void __launch_bounds__(kUnrollWarps* kLaneCount, kStepBlocks<hidden>)
    nominal_forward(const UnrollCall call, float* update, const UnrollState to) {
  alignas(16) __shared__ float weights[kPackedWeights<hidden>];
  __shared__ Stage<hidden> stages[kUnrollWarps];
  const int64_t student = blockIdx.y;
  bring_weights<hidden>(call, student, weights);
  Stage<hidden>& stage = stages[threadIdx.x / kLaneCount];
  const int64_t warps = int64_t{gridDim.x} * kUnrollWarps;
  const int64_t warp = int64_t{blockIdx.x} * kUnrollWarps + threadIdx.x / kLaneCount;
  const int64_t begin = first_tile(call, warp, warps), end = first_tile(call, warp + 1, warps);
  int tensor = begin < end ? tensor_of(call, begin) : 0;
#pragma unroll 1
  for (int64_t tile = begin; tile < end; ++tile) {
    const TilePlace place(call, student, tile, tensor);
    tensor = place.tensor;
    CoordinateState<hidden> state;
    state.load(call, student, place.at);
    CoordinateStep<hidden> step(call, weights, stage.bias,
                                put_step(call, student, place.tensor, 0, stage));
    step.run(call.grads[place.at], state);
    state.store(to, call.n, student, place.at, place.inside);
    if (place.inside) update[place.at] = step.update();
  }
}

// A lane's part of the sums over coordinates.
template <int hidden>
struct LaneSums {
  using Share = Shares<hidden>;
  LongSum of_gates[Share::kGatesOfLane][Share::kInputsOfLane];
  LongSum of_head;  // of the lanes that there are sums for

  // Adds what the warp has staged. The last row of inputs is of ones: its sums, the bias's, go to
  // `biases` (4 hidden,), onto what is there unless they are the first.
  __device__ void add(const Stage<hidden>& stage, double* biases, bool first) {
    constexpr int gates = Share::kGatesOfLane, inputs = Share::kInputsOfLane;
    float sums[gates][inputs] = {};
    float head = 0.0f;
    const int lane = Share::lane();
    const int output = lane / (hidden + 1) % Share::kOutputs, unit = lane % (hidden + 1);
    const int of_unit = unit < hidden ? Share::kHeadRows + unit : Share::kOutputRows - 1;
#pragma unroll 2
    for (int at = 0; at < kLaneCount; at += 4) {
      float4 d[gates], x[inputs];
#pragma unroll
      for (int gate = 0; gate < gates; ++gate) d[gate] = stage.four(Share::gate(gate), at);
#pragma unroll
      for (int input = 0; input < inputs; ++input) {
        x[input] = stage.four(Share::kGates + Share::input(input), at);
      }
#pragma unroll
      for (int gate = 0; gate < gates; ++gate) {
#pragma unroll
        for (int input = 0; input < inputs; ++input) {
          sums[gate][input] = dot(d[gate], x[input], sums[gate][input]);
        }
      }
      head = dot(stage.four(Share::kOutputRows + output, at), stage.four(of_unit, at), head);
    }
    const bool has_ones = Share::input(inputs - 1) == Share::kInputs - 1;
#pragma unroll
    for (int gate = 0; gate < gates; ++gate) {
#pragma unroll
      for (int input = 0; input < inputs; ++input) {
        if (input < inputs - 1 || !has_ones) of_gates[gate][input].add(sums[gate][input]);
      }
      if (has_ones) {
        double* to = biases + Share::gate(gate);
        *to = (first ? 0.0 : *to) + double(sums[gate][inputs - 1]);
      }
    }
    of_head.add(head);
  }

  __device__ void store(double* to) const {
#pragma unroll
    for (int gate = 0; gate < Share::kGatesOfLane; ++gate) {
#pragma unroll
      for (int input = 0; input < Share::kInputsOfLane; ++input) {
        const int column = Share::input(input);
        if (column < Share::kInputs - 1) {
          to[Share::gate(gate) * (Share::kInputs - 1) + column] =
              of_gates[gate][input].value();
        }
      }
    }
    if (Share::lane() < Share::kHeadSums) {
      to[Share::kGates * (Share::kInputs - 1) + Share::lane()] = of_head.value();
    }
  }
};

// Steps forward, keeping the state before each step, and back. Of one step (`single`), gradients in
// the state come from `in_new` and go to `in_old`, and a grid's rows are students. Of several steps
// there is one student; gradients in the state begin as zeros and are dropped.
template <int hidden, bool single>
__global__ void __launch_bounds__(kUnrollWarps* kLaneCount, kUnrollBlocks<hidden>)
    nominal_backward(const UnrollCall call, const UnrollState in_new, float* in_grad,
                     const UnrollState in_old, const UnrollSums sums) {
  using State = CoordinateState<hidden>;
  using Share = Shares<hidden>;
  alignas(16) __shared__ float weights[kPackedWeights<hidden>];
  __shared__ Stage<hidden> stages[kUnrollWarps];
  const int64_t student = single ? blockIdx.y : 0;
  bring_weights<hidden>(call, student, weights);
  Stage<hidden>& stage = stages[threadIdx.x / kLaneCount];
  stage.put(Share::kOutputRows - 1, 1.0f);
  const int64_t warp = int64_t{blockIdx.x} * kUnrollWarps + threadIdx.x / kLaneCount;
  if (warp >= sums.warps) return;
  const int steps = single ? 1 : call.steps;
  const int64_t before = student * (sums.warps + call.tensors);
  float* const states = single ? nullptr : sums.states + warp * steps * State::kWords;
  const int64_t begin = first_tile(call, warp, sums.warps);
  const int64_t end = first_tile(call, warp + 1, sums.warps);
  LaneSums<hidden> lane_sums;
  int tensor = tensor_of(call, begin);
#pragma unroll 1
  for (int64_t tile = begin; tile < end; ++tile) {
    const TilePlace place(call, student, tile, tensor);
    const bool first = tile == begin || place.tensor != tensor;
    tensor = place.tensor;
    State old, d{};
    old.load(call, student, place.at);
    if constexpr (single) {
      d.load(in_new, call.n, student, place.at, place.inside);
    } else {
#pragma unroll 1
      for (int t = 0; t < steps - 1; ++t) {
        old.keep(states + t * State::kWords);
        CoordinateStep<hidden> step(call, weights, stage.bias,
                                    put_step(call, student, place.tensor, t, stage));
        step.run(call.grads[t * call.grads_stride + place.at], old);
      }
    }
#pragma unroll 1
    for (int t = steps - 1; t >= 0; --t) {
      if (t < steps - 1) old.bring(states + t * State::kWords);
      const float g = call.grads[t * call.grads_stride + place.at];
      const float d_update =
          only(place.inside, call.adjoints[t * call.adjoints_stride + place.at]);
      State now = old;
      CoordinateStep<hidden> step(call, weights, stage.bias,
                                  put_step(call, student, place.tensor, t, stage));
      step.run(g, now);
      const float in_g = step.differentiate(g, d_update, old, now, d, stage);
      if (single && place.inside) in_grad[place.at] = in_g;
      __syncwarp();
      const int64_t row = (before + warp + place.tensor) * steps + t;
      lane_sums.add(stage, sums.biases + row * Share::kGates, first);
      __syncwarp();
    }
    if constexpr (single) d.store(in_old, call.n, student, place.at, place.inside);
  }
  lane_sums.store(sums.weights + (student * sums.warps + warp) * Share::kSums);
}

constexpr int kSumColumns = 32, kSumRows = 8;  // of a block that adds rows

// The sum of rows [first, end) of `from` in column threadIdx.x % 32, in the same order always; of the
// first row of threads.
__device__ inline double sum_of_rows(const double* from, int64_t first, int64_t end,
                                     int64_t stride, bool inside) {
  __shared__ double parts[kSumRows][kSumColumns];
  const int column = threadIdx.x % kSumColumns, row = threadIdx.x / kSumColumns;
  double sum = 0.0;
  for (int64_t at = first + row; inside && at < end; at += kSumRows) sum += from[at * stride];
  parts[row][column] = sum;
  __syncthreads();
  if (row == 0) {
    for (int other = 1; other < kSumRows; ++other) sum += parts[other][column];
  }
  __syncthreads();
  return sum;
}

// Adds the warps' rows: blocks of the grid's first row those of weights, the others in turn those of
// the steps' and tensors' biases. The grid's planes are students.
template <int hidden>
__global__ void __launch_bounds__(kSumColumns* kSumRows)
    nominal_sums(const UnrollCall call, const UnrollSums sums, float* in_weights,
                 float* in_biases) {
  using Share = Shares<hidden>;
  const int column = threadIdx.x % kSumColumns;
  const int64_t student = blockIdx.z;
  const bool writes = threadIdx.x < kSumColumns;
  if (blockIdx.y == 0) {
    for (int64_t first = int64_t{blockIdx.x} * kSumColumns; first < Share::kSums;
         first += int64_t{gridDim.x} * kSumColumns) {
      const bool inside = first + column < Share::kSums;
      const double* own = sums.weights + student * sums.warps * Share::kSums;
      const double sum =
          sum_of_rows(own + first + column, 0, sums.warps, Share::kSums, inside);
      if (writes && inside) {
        in_weights[student * Share::kSums + first + column] = static_cast<float>(sum);
      }
    }
    return;
  }
  // The last warp whose tiles begin at a tile or before it has it.
  const auto warp_of = [&](int64_t tile) { return ((tile + 1) * sums.warps - 1) / call.tiles; };
  const int64_t rows = int64_t{gridDim.y - 1} * gridDim.x;
  const int64_t first_row = int64_t{blockIdx.y - 1} * gridDim.x + blockIdx.x;
  for (int64_t row = first_row; row < int64_t{call.steps} * call.tensors; row += rows) {
    const int64_t step = row / call.tensors, tensor = row % call.tensors;
    const int64_t tiles_begin = call.bounds[tensor], tiles_end = call.bounds[tensor + 1];
    const bool some = tiles_end > tiles_begin, inside = column < Share::kGates;
    const int64_t first = some ? warp_of(tiles_begin) + tensor : 0;
    const int64_t end = some ? warp_of(tiles_end - 1) + tensor + 1 : 0;
    const int64_t stride = int64_t{call.steps} * Share::kGates;
    const double* own = sums.biases + student * (sums.warps + call.tensors) * stride;
    const double sum =
        sum_of_rows(own + step * Share::kGates + column, first, end, stride, inside);
    if (writes && inside) {
      const int64_t to = student * call.steps * call.tensors + row;
      in_biases[to * Share::kGates + column] = static_cast<float>(sum);
    }
  }
}

inline unsigned blocks_for(int64_t warps) {
  return static_cast<unsigned>((warps + kUnrollWarps - 1) / kUnrollWarps);
}

// So many blocks for each student.
inline dim3 grid_of(unsigned blocks, const UnrollCall& call) {
  return dim3(blocks, static_cast<unsigned>(call.students));
}

template <int hidden>
UnrollLaunches unroll_launches() {
  constexpr int threads = kUnrollWarps * kLaneCount;
  const auto forward = [](const UnrollCall& call, float* update, const UnrollState& to,
                          unsigned blocks, void* stream) {
    launch("student_step", nominal_forward<hidden>, grid_of(blocks, call), threads, stream, call,
           update, to);
  };
  const auto backward = [](const UnrollCall& call, const UnrollState& in_new, float* in_grad,
                           const UnrollState& in_old, const UnrollSums& sums, void* stream) {
    launch("student_step_backward", nominal_backward<hidden, true>,
           grid_of(blocks_for(sums.warps), call), threads, stream, call, in_new, in_grad, in_old,
           sums);
  };
  const auto unroll = [](const UnrollCall& call, const UnrollSums& sums, void* stream) {
    launch("student_unroll_backward", nominal_backward<hidden, false>,
           blocks_for(sums.warps), threads, stream, call, UnrollState{},
           static_cast<float*>(nullptr), UnrollState{}, sums);
  };
  const auto add = [](const UnrollCall& call, const UnrollSums& sums, float* in_weights,
                      float* in_biases, void* stream) {
    constexpr int of_weights = (Shares<hidden>::kSums + kSumColumns - 1) / kSumColumns;
    const int64_t of_biases = int64_t{call.steps} * call.tensors;
    const auto rows = std::min<int64_t>((of_biases + of_weights - 1) / of_weights, 1024);
    launch("student_unroll_backward, second stage", nominal_sums<hidden>,
           dim3(of_weights, static_cast<unsigned>(rows + 1), static_cast<unsigned>(call.students)),
           kSumColumns * kSumRows, stream, call, sums, in_weights, in_biases);
  };
  return {hidden,  Shares<hidden>::kSums, kStepBlocks<hidden>, kUnrollBlocks<hidden>,
          forward, backward,              unroll,              add};
}

}  // namespace amalgam::cuda
