// The student's step of few units: a thread computes whole coordinates, several neighbours at once,
// with all they need in registers.
//
// Several, so that rows are read by 16 bytes, and because a weight once read from shared memory
// then serves all of them: four FFMA a number read for four coordinates. A thread alone reads and
// writes its coordinates, so in place nothing can be overwritten that another has still to read.
#pragma once

#include "activations.cuh"
#include "student_forms.cuh"
#include "student_frame.cuh"

namespace amalgam::cuda {

// Where weights lie in StudentCall::weights, in float4s until the head.
template <typename Form, int layers, int hidden>
struct ThreadWeights {
  static constexpr int kFirstUnit = 1 + Form::kFeatures + hidden;
  static constexpr int kUnit = 1 + 2 * hidden;  // of other layers
  static constexpr int kHead = 4 * hidden * (kFirstUnit + (layers - 1) * kUnit);
  static constexpr int kHeadBias = kHead + Form::kOutputs * hidden;
  static constexpr int kFloats = (kHeadBias + Form::kOutputs + 3) / 4 * 4;

  __device__ static const float4* of_layer(const float* weights, int layer) {
    const int units = layer == 0 ? 0 : hidden * (kFirstUnit + (layer - 1) * kUnit);
    return reinterpret_cast<const float4*>(weights) + units;
  }
};

template <int count>
struct Gates {
  float i[count], f[count], a[count], o[count];

  __device__ void begin(float4 bias) {
#pragma unroll
    for (int n = 0; n < count; ++n) {
      i[n] = bias.x;
      f[n] = bias.y;
      a[n] = bias.z;
      o[n] = bias.w;
    }
  }

  __device__ void add(float4 weight, const float (&x)[count]) {
#pragma unroll
    for (int n = 0; n < count; ++n) {
      i[n] = __fmaf_rn(weight.x, x[n], i[n]);
      f[n] = __fmaf_rn(weight.y, x[n], f[n]);
      a[n] = __fmaf_rn(weight.z, x[n], a[n]);
      o[n] = __fmaf_rn(weight.w, x[n], o[n]);
    }
  }
};

// The number itself, in a register: else the compiler keeps bfloat16 as they came, two in one, and
// widens them again for every unit.
template <typename Cells>
__device__ float widened(float x) {
  if constexpr (sizeof(Cells) < sizeof(float)) {
    return anew(x);
  }
  return x;
}

template <bool stochastic, typename Storage, int count>
__device__ void store_rounded(Storage* to, int shift, const uint32_t (&bits)[count],
                              const float (&values)[count]) {
  if constexpr (stochastic) {
    float chosen[count];
#pragma unroll
    for (int n = 0; n < count; ++n) chosen[n] = rounded(values[n], (bits[n] >> shift) & 0xffffu);
    store(to, chosen);
  } else {
    store(to, values);
  }
}

// `count` coordinates from `at` on.
template <template <bool, int> typename FormOf, int layers, int hidden, typename Moments,
          typename Cells, bool stochastic, bool approximate, int count, int unroll>
__device__ void step_coordinates(const StudentCall& call, const StudentTensor& tensor,
                                 const Rates& rates, const Corrections& corrections,
                                 const float* weights, int64_t at) {
  using Form = FormOf<approximate, count>;
  using Layout = ThreadWeights<Form, layers, hidden>;
  constexpr bool random_moments = stochastic && sizeof(Moments) < sizeof(float);
  const int64_t n = tensor.numel;
  Cells* h = static_cast<Cells*>(tensor.h) + at;
  Cells* c = static_cast<Cells*>(tensor.c) + at;
  Moments* to_m = static_cast<Moments*>(tensor.m) + at;
  Moments* to_v = static_cast<Moments*>(tensor.v) + at;

  RawOf<count> raw_grad, raw_param;
  Raw<Moments, count> raw_m, raw_v;
  Raw<Cells, count> raw_h[hidden], next_c;
  raw_grad.load(tensor.grad, call.grad, at);
  raw_param.load(tensor.param, call.param, at);
  raw_m.load(to_m);
  raw_v.load(to_v);
#pragma unroll
  for (int unit = 0; unit < hidden; ++unit) raw_h[unit].load(h + unit * n);
  next_c.load(c);

  float grad[count], param[count], m[count], v[count];
  raw_grad.read(call.grad, grad);
  raw_param.read(call.param, param);
#pragma unroll
  for (int k = 0; k < count; ++k) {
    m[k] = raw_m[k];
    v[k] = raw_v[k];
    follow(call, grad[k], m[k], v[k]);
  }
  uint32_t of_moments[count];
  if constexpr (random_moments) {  // of the row behind the parameter's
    const uint32_t key = key_of_row(rates.key, layers * hidden + 1);
#pragma unroll
    for (int k = 0; k < count; ++k) of_moments[k] = random_bits(key, counted(at + k));
  }
  store_rounded<random_moments>(to_m, 16, of_moments, m);
  store_rounded<random_moments>(to_v, 0, of_moments, v);
  if (rates.is_warm) {
    move(call, tensor, rates, rates.warm, layers * hidden, at, param, grad);
    return;
  }
  Form form;
  float x[Form::kFeatures][count];
#pragma unroll
  for (int k = 0; k < count; ++k) form.see(call, corrections, k, grad[k], m[k], v[k], x);

  float below[hidden][count];  // the new h of the layer below
  float top[Form::kOutputs][count];
#pragma unroll
  for (int o = 0; o < Form::kOutputs; ++o) {
#pragma unroll
    for (int k = 0; k < count; ++k) top[o][k] = weights[Layout::kHeadBias + o];
  }
#pragma unroll
  for (int layer = 0; layer < layers; ++layer) {
    float old_h[hidden][count], new_h[hidden][count];
#pragma unroll
    for (int unit = 0; unit < hidden; ++unit) {
#pragma unroll
      for (int k = 0; k < count; ++k) old_h[unit][k] = widened<Cells>(raw_h[unit][k]);
    }
    const bool last = layer == layers - 1;
    if (!last) {  // the next layer's, while this one is computed
#pragma unroll
      for (int unit = 0; unit < hidden; ++unit) raw_h[unit].load(h + (hidden + unit) * n);
    }
    const float4* weight = Layout::of_layer(weights, layer);
    // Not unrolled where it needn't be, so that the loop fits the nearest instruction cache.
#pragma unroll (layers > 1 ? hidden : unroll)
    for (int unit = 0; unit < hidden; ++unit) {
      float cell[count], output[count];
#pragma unroll
      for (int k = 0; k < count; ++k) cell[k] = next_c[k];
      // The next unit's, while this one is computed.
      if (!last || unit < hidden - 1) next_c.load(c + n);

      Gates<count> gates;
      gates.begin(*weight++);
      if (layer == 0) {
#pragma unroll
        for (int from = 0; from < Form::kFeatures; ++from) gates.add(*weight++, x[from]);
      } else {
#pragma unroll
        for (int from = 0; from < hidden; ++from) gates.add(*weight++, below[from]);
      }
#pragma unroll
      for (int from = 0; from < hidden; ++from) gates.add(*weight++, old_h[from]);
#pragma unroll
      for (int k = 0; k < count; ++k) {
        const float i = sigmoid_of<approximate>(gates.i[k]);
        const float f = sigmoid_of<approximate>(gates.f[k]);
        const float a = tanh_of<approximate>(gates.a[k]);
        const float o = sigmoid_of<approximate>(gates.o[k]);
        cell[k] = __fmaf_rn(i, a, __fmul_rn(f, cell[k]));
        output[k] = __fmul_rn(o, tanh<approximate>(cell[k]));
      }

      uint32_t bits[count];
      if constexpr (stochastic) {
        const uint32_t key = key_of_row(rates.key, layer * hidden + unit);
#pragma unroll
        for (int k = 0; k < count; ++k) bits[k] = random_bits(key, counted(at + k));
      }
      store_rounded<stochastic>(h, 16, bits, output);
      store_rounded<stochastic>(c, 0, bits, cell);
      h += n;
      c += n;
      if (last) {
#pragma unroll
        for (int o = 0; o < Form::kOutputs; ++o) {
          const float of_head = weights[Layout::kHead + o * hidden + unit];
#pragma unroll
          for (int k = 0; k < count; ++k) top[o][k] = __fmaf_rn(of_head, output[k], top[o][k]);
        }
      } else {
#pragma unroll
        for (int k = 0; k < count; ++k) new_h[unit][k] = output[k];
      }
    }
    if (!last) {
#pragma unroll
      for (int unit = 0; unit < hidden; ++unit) {
#pragma unroll
        for (int k = 0; k < count; ++k) below[unit][k] = new_h[unit][k];
      }
    }
  }
  float update[count];
#pragma unroll
  for (int k = 0; k < count; ++k) update[k] = form.update(call, corrections, k, top);
  move(call, tensor, rates, rates.lr, layers * hidden, at, param, update);
}

// The bias that is a tensor's own, in the place of it among the weights.
template <int hidden, bool approximate, int unit_stride>
__device__ void put_bias(const StudentCall& call, const StudentTensor& tensor, float* weights) {
  const int unit = threadIdx.x;
  if (unit >= hidden) return;
  constexpr float of_sigmoid = approximate ? 0.5f : kSigmoidScale;
  constexpr float of_tanh = approximate ? 1.0f : kTanhScale;
  const float* bias = call.biases + tensor.place * (4 * hidden) + unit;
  reinterpret_cast<float4*>(weights)[unit * unit_stride] =
      make_float4(__fmul_rn(of_sigmoid, bias[0]), __fmul_rn(of_sigmoid, bias[hidden]),
                  __fmul_rn(of_tanh, bias[2 * hidden]), __fmul_rn(of_sigmoid, bias[3 * hidden]));
}

// A thread takes `groups` of `count` coordinates, for which it finds its tensor once.
template <template <bool, int> typename FormOf, int layers, int hidden, typename Moments,
          typename Cells, bool stochastic, bool approximate, int count, int groups, int threads,
          int blocks, int unroll>
__global__ void __launch_bounds__(threads, blocks) student_threads(const StudentCall call) {
  using Form = FormOf<approximate, count>;
  using Layout = ThreadWeights<Form, layers, hidden>;
  alignas(16) __shared__ float weights[Layout::kFloats];
  __shared__ StudentTensor shared_tensor;
  if (call.control && call.control[3] != 0.0) return;
#pragma unroll 1
  for (int at = threadIdx.x; at < Layout::kFloats / 4; at += threads) {
    reinterpret_cast<float4*>(weights)[at] = reinterpret_cast<const float4*>(call.weights)[at];
  }
  if (threadIdx.x < 32) find_tensor(call, threads * count * groups, &shared_tensor);
  __syncthreads();
  Corrections corrections{};
  if constexpr (Form::kOwnBias) {
    put_bias<hidden, approximate, Layout::kFirstUnit>(call, shared_tensor, weights);
    const float* own = call.corrections + 3 * shared_tensor.place;
    corrections = {own[0], own[1], __fmul_rn(call.alpha, own[2])};
    __syncthreads();
  }
  const StudentTensor tensor = with_global(shared_tensor);
  const Rates rates = rates_of(call, tensor);
  if (is_wide(tensor, count)) {
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
      const int64_t at = tensor.first + (group * threads + int64_t{threadIdx.x}) * count;
      if (at >= tensor.numel) return;
      if constexpr (groups > 1) forget_memory();
      step_coordinates<FormOf, layers, hidden, Moments, Cells, stochastic, approximate, count,
                       unroll>(call, tensor, rates, corrections, weights, at);
    }
    return;
  }
#pragma unroll 1
  for (int k = 0; k < count * groups; ++k) {
    const int64_t at = tensor.first + k * threads + threadIdx.x;
    if (at >= tensor.numel) return;
    // Or all weights would be read before the loop, and wait for it in memory of the thread.
    forget_memory();
    step_coordinates<FormOf, layers, hidden, Moments, Cells, stochastic, approximate, 1, 1>(
        call, tensor, rates, corrections, weights, at);
  }
}

}  // namespace amalgam::cuda
