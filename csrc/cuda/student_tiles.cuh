// One step of the RNNProp student of 20 hidden units on tensor cores, a warp a tile of coordinates;
// amalgam/ops/student_step.py has the formulas.
//
// Gates are the columns of a product whose rows are coordinates. Their order is free, as is that of
// the rows and of the inner dimension, and chosen so that nothing moves between lanes: of every
// group of four units, lane q of a quad computes all four gates of the q-th, for `kRun` neighbouring
// coordinates, which it loads and stores at once; and their new h is already where the next layer's
// product takes it.
#pragma once

#include <cstdint>

#include "warp.cuh"

namespace amalgam::cuda::tiles {

inline constexpr int kHidden = 20;
inline constexpr int kGroups = kHidden / 4;  // of four units, one for each lane of a quad
inline constexpr int kFeatures = 2;
inline constexpr int kLanes = 32;

// kSplit computes with what TF32 holds of both factors and what it leaves of each, and errs as
// float32 does.
enum class Products { kBf16, kTf32, kSplit };

// As PyTorch lays them out; gates in the order input, forget, candidate, output.
struct Weights {
  const float* w_ih[2];  // (4 hidden, inputs)
  const float* w_hh[2];  // (4 hidden, hidden)
  const float* b[2];     // (4 hidden,)
  const float* head;     // (hidden,)
  const float* head_bias;
};

struct Settings {
  float alpha, beta1, beta2, one_minus_beta1, one_minus_beta2, eps;
};

// The state of one tensor.
template <typename Cell>
struct State {
  float* m;  // (N,)
  float* v;  // (N,)
  Cell* h;   // (layers, hidden, N)
  Cell* c;   // (layers, hidden, N)
  int64_t n;
};

// A bfloat16 in memory.
struct Bf16 {
  uint16_t bits;
};

// The inner dimension of a layer's product as lanes hold it: lane q of a quad has `slots`, of which
// the first are its units of the layer below, then those of the layer's own old h; the first layer's
// last are the features. Two slots are a step of TF32's tensor cores, four of bfloat16's.
__host__ __device__ constexpr int slots_of(int layer) {
  return layer ? 2 * kGroups : kGroups + 1;
}

// How a block's weights lie in shared memory, in 32-bit words: as operands of tensor cores, so that
// a warp's load is as wide and free of conflicts as can be. A layer after another, and in each
// `kParts` times for every group of units its steps (TF32, and bfloat16's of four slots: the even
// tile's two registers and the odd tile's, a lane after another; bfloat16's of two: one and one);
// then for every group the biases (tile, q, register) as the accumulators that a sum begins with.
// The head, a row for every q, and its bias follow. The even tile of a group has its input and forget
// gates, the odd one candidate and output.
template <int kLayers, Products kProducts>
struct Packed {
  static constexpr int kParts = kProducts == Products::kSplit ? 2 : 1;
  // Words of a lane, for one group.
  __host__ __device__ static constexpr int group_size(int layer) {
    return kProducts == Products::kBf16 ? slots_of(layer) : 2 * slots_of(layer);
  }
  __host__ __device__ static constexpr int part_size(int layer) {
    return kGroups * kLanes * group_size(layer);
  }
  static constexpr int kBiases = kGroups * 2 * 4 * 4;
  __host__ __device__ static constexpr int layer_start(int layer) {
    return layer ? kParts * part_size(0) + kBiases : 0;
  }
  __host__ __device__ static constexpr int bias_start(int layer) {
    return layer_start(layer) + kParts * part_size(layer);
  }
  static constexpr int kHeadRow = 8;
  static constexpr int kHead = layer_start(kLayers - 1) + kParts * part_size(kLayers - 1) + kBiases;
  static constexpr int kSize = kHead + 4 * kHeadRow;

  // Of a gate's sum, the factor that its activation wants: an approximate sigmoid is a tanh of half
  // the sum.
  __device__ static float scale(int gate, bool approximate) {
    return approximate && gate != 2 ? 0.5f : 1.0f;
  }

  // The weight of what lane q has in a slot, for a unit's gate; zero where there is nothing.
  __device__ static float weight(const Weights& from, int layer, int slot, int q, int gate, int unit,
                                 bool approximate) {
    const int row = gate * kHidden + unit;
    const int own = layer ? slot - kGroups : slot;
    float value = 0;
    if (own >= 0 && own < kGroups) {
      value = from.w_hh[layer][row * kHidden + 4 * own + q];
    } else if (layer) {
      value = from.w_ih[layer][row * kHidden + 4 * slot + q];
    } else if (q < kFeatures) {
      value = from.w_ih[0][row * kFeatures + q];
    }
    return value * scale(gate, approximate);
  }

  // Word number `at`.
  __device__ static uint32_t word(int at, const Weights& from, bool approximate) {
    if (at >= kHead) {
      const int q = (at - kHead) / kHeadRow, p = (at - kHead) % kHeadRow;
      float value = p < kGroups ? from.head[4 * p + q] : 0.0f;
      if (p == kGroups) value = *from.head_bias;
      return __float_as_uint(value);
    }
    const int layer = kLayers > 1 && at >= layer_start(1);
    at -= layer ? layer_start(1) : 0;
    const int size = layer ? group_size(1) : group_size(0);
    const int part_words = kGroups * kLanes * size;
    if (at >= kParts * part_words) {
      at -= kParts * part_words;
      const int p = at / 32, tile = at / 16 % 2, q = at / 4 % 4;
      const int gate = 2 * tile + at % 2;
      return __float_as_uint(from.b[layer][gate * kHidden + 4 * p + q] * scale(gate, approximate));
    }
    const bool rest = at >= part_words;
    at -= rest ? part_words : 0;
    const int p = at / (kLanes * size);
    at %= kLanes * size;
    const int step = at / (4 * kLanes);
    // The last step of bfloat16 has two words a lane.
    const bool whole = kProducts != Products::kBf16 || 4 * (step + 1) <= size;
    at -= step * 4 * kLanes;
    const int lane = whole ? at / 4 : at / 2;
    const int word = whole ? at % 4 : at % 2;
    const int tile = whole ? word / 2 : word;
    const int half = whole ? word % 2 : 0;
    const int q = lane % 4, column = lane / 4;
    const int unit = 4 * p + column / 2, gate = 2 * tile + column % 2;
    if (kProducts == Products::kBf16) {
      const int slot = 4 * step + 2 * half;
      return to_bf16x2(weight(from, layer, slot, q, gate, unit, approximate),
                       weight(from, layer, slot + 1, q, gate, unit, approximate));
    }
    const float value = weight(from, layer, 2 * step + half, q, gate, unit, approximate);
    const uint32_t high = to_tf32(value);
    // What is left has 12 bits at most: rounding it would err as the truncation does.
    return rest ? __float_as_uint(value - __uint_as_float(high)) : high;
  }

  // Called by all threads of a block, which then have to wait for each other.
  __device__ static void fill(uint32_t (&to)[kSize], const Weights& from, bool approximate) {
    for (int at = threadIdx.x; at < kSize; at += blockDim.x) to[at] = word(at, from, approximate);
  }
};

// The neighbouring coordinates of one row that a lane has.
template <typename Cell, int kRun>
struct Cells {
  static constexpr int kWords = kRun * sizeof(Cell) / 4;
  static constexpr int kOnce = kWords < 4 ? kWords : 4;  // loaded and stored by one instruction
  uint32_t words[kWords];

  __device__ __forceinline__ float operator[](int j) const {
    if constexpr (sizeof(Cell) == 4) return __uint_as_float(words[j]);
    const uint32_t word = words[j / 2];
    return __uint_as_float(j % 2 ? word & 0xffff0000u : word << 16);
  }

  __device__ __forceinline__ void set(const float (&values)[kRun]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(Cell) == 4) {
        words[i] = __float_as_uint(values[i]);
      } else {
        words[i] = to_bf16x2(values[2 * i], values[2 * i + 1]);
      }
    }
  }

  // From and to `row`, of whose coordinates from its begin on `left` exist; zeros for the others.
  // kWide: the row begins where a run can be loaded at once, and all of it exists or nothing.
  template <bool kWide>
  __device__ __forceinline__ void load(const Cell* row, int64_t left) {
    if constexpr (kWide) {
#pragma unroll
      for (int i = 0; i < kWords; i += kOnce) {
        load_once<kOnce>(words + i, reinterpret_cast<const uint32_t*>(row) + i, left > 0);
      }
    } else if constexpr (sizeof(Cell) == 4) {
#pragma unroll
      for (int j = 0; j < kRun; ++j) load_once<1>(words + j, row + j, j < left);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint32_t low = load_once(&row[2 * i].bits, 2 * i < left);
        words[i] = low | uint32_t{load_once(&row[2 * i + 1].bits, 2 * i + 1 < left)} << 16;
      }
    }
  }

  template <bool kWide>
  __device__ __forceinline__ void store(Cell* row, int64_t left) const {
    if constexpr (kWide) {
#pragma unroll
      for (int i = 0; i < kWords; i += kOnce) {
        store_once<kOnce>(reinterpret_cast<uint32_t*>(row) + i, words + i, left > 0);
      }
    } else if constexpr (sizeof(Cell) == 4) {
#pragma unroll
      for (int j = 0; j < kRun; ++j) store_once<1>(row + j, words + j, j < left);
    } else {
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        store_once(&row[j].bits, static_cast<uint16_t>(words[j / 2] >> (j % 2 * 16)), j < left);
      }
    }
  }
};

// Stores to nearest. Another way to round needs the same two members.
struct Nearest {
  template <int kRun>
  __device__ __forceinline__ void h(float (&)[kRun], uint32_t row, int64_t at) const {}
  template <int kRun>
  __device__ __forceinline__ void c(float (&)[kRun], uint32_t row, int64_t at) const {}
};

template <bool kApproximate>
__device__ __forceinline__ float tanh_of(float x) {
  if constexpr (kApproximate) {
    return tanh_approximate(x);
  } else {
    const float far =
        1.0f - 2.0f * reciprocal_approximate(1.0f + exp2_approximate(x * 2.8853900817779268f));
    // Near zero that difference cancels; this is the minimax polynomial up to 0.6.
    const float s = x * x;
    float p = s * -0.005895107518881559f + 0.020795932039618492f;
    p = p * s - 0.05378381907939911f;
    p = p * s + 0.13331924378871918f;
    p = p * s - 0.33333298563957214f;
    return fabsf(x) < 0.6f ? x + x * (s * p) : far;
  }
}

// kApproximate: of twice x, see Packed::scale.
template <bool kApproximate>
__device__ __forceinline__ float sigmoid_of(float x) {
  if constexpr (kApproximate) {
    return 0.5f * tanh_approximate(x) + 0.5f;
  } else {
    return reciprocal_approximate(1.0f + exp2_approximate(x * -1.4426950408889634f));
  }
}

// What limits a kernel shows when a part of it is left out; all but kNothing are for measuring.
enum class LeftOut { kNothing, kActivations, kProducts, kAll };

// Rows of a product's left factor: what a lane holds of one step, for `kTiles` tiles of 16.
template <Products kProducts, int kTiles>
struct Operand {
  static constexpr int kRun = 2 * kTiles;
  static constexpr int kRegisters = kProducts == Products::kBf16 ? 2 : 4;
  uint32_t high[kTiles][kRegisters];
  uint32_t low[kProducts == Products::kSplit ? kTiles : 1][4];
  bool has_low;  // known when compiling

  // Of two slots; `exact` ones are known to fit the operand's type.
  template <typename A, typename B>
  __device__ __forceinline__ void set(const A& a, bool exact_a, const B& b, bool exact_b) {
    has_low = !(exact_a && exact_b);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float first = a[2 * t + r], second = b[2 * t + r];
        if constexpr (kProducts == Products::kBf16) {
          high[t][r] = to_bf16x2(first, second);
        } else {
          high[t][r] = exact_a ? __float_as_uint(first) : to_tf32(first);
          high[t][2 + r] = exact_b ? __float_as_uint(second) : to_tf32(second);
          if constexpr (kProducts == Products::kSplit) {
            low[t][r] =
                exact_a ? 0 : __float_as_uint(first - __uint_as_float(high[t][r]));
            low[t][2 + r] =
                exact_b ? 0 : __float_as_uint(second - __uint_as_float(high[t][2 + r]));
          }
        }
      }
    }
  }
};

// A group's sums of gates: the even tile's input and forget gates, the odd tile's candidate and
// output; in each those of the coordinate 2t, then of 2t + 1.
template <int kTiles>
struct Sums {
  float of[kTiles][2][4];
};

template <int kLayers, Products kProducts, bool kApproximate, typename Cell, int kTiles, bool kWide,
          LeftOut kLeftOut = LeftOut::kNothing>
struct Step {
  static constexpr int kRun = 2 * kTiles;             // neighbouring coordinates of a lane
  static constexpr int kCoordinates = 16 * kTiles;    // of a warp
  static constexpr int kOwn = kRun > 4 ? kRun / 4 : 1;  // of a lane that has them to itself
  static constexpr bool kExact = sizeof(Cell) == 2;   // whether stored h fits the operands' type
  using Weigh = Packed<kLayers, kProducts>;
  using Row = Cells<Cell, kRun>;

  Row h[kLayers][kGroups], c[kLayers][kGroups];
  float m[kOwn], v[kOwn];

  __device__ static int lane() { return threadIdx.x % kLanes; }
  __device__ static int q() { return lane() % 4; }
  // The first of this lane's coordinates in a tile, and the first that it has to itself.
  __device__ static int first_of_run() { return lane() / 4 * kRun; }
  __device__ static int first_own() { return first_of_run() + q() * kOwn; }
  __device__ static bool owns() { return q() * kOwn < kRun; }

  // Loads one layer's old state of the tile that begins at `first`, which may lie beyond the end.
  template <int kLayer>
  __device__ __forceinline__ void load_layer(const State<Cell>& state, int64_t first) {
    const int64_t at = first + first_of_run(), left = state.n - at;
    const int64_t start = (kLayer * kHidden + q()) * state.n + at;
    const Cell *of_h = anew(state.h + start), *of_c = anew(state.c + start);
#pragma unroll
    for (int p = 0; p < kGroups; ++p) {
      h[kLayer][p].template load<kWide>(of_h + 4 * p * state.n, left);
      c[kLayer][p].template load<kWide>(of_c + 4 * p * state.n, left);
    }
  }

  __device__ __forceinline__ void load_moments(const State<Cell>& state, int64_t first) {
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      const int64_t at = first + first_own() + o;
      const bool inside = owns() && at < state.n;
      m[o] = load_once(state.m + at, inside);
      v[o] = load_once(state.v + at, inside);
    }
  }

  // Stores the new moments; gives what the first layer's last slot holds.
  __device__ __forceinline__ void features(const State<Cell>& state, int64_t first,
                                           const float (&grad)[kOwn], const Settings& settings,
                                           float (&slot)[kRun]) {
    float of_m[kOwn], of_g[kOwn];
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      const float g = grad[o];
      const float new_m = settings.beta1 * m[o] + settings.one_minus_beta1 * g;
      const float new_v = settings.beta2 * v[o] + settings.one_minus_beta2 * (g * g);
      const float scale = rsqrtf(new_v * (1.0f / settings.one_minus_beta2) + settings.eps);
      of_m[o] = new_m * (1.0f / settings.one_minus_beta1) * scale;
      of_g[o] = g * scale;
      const int64_t at = first + first_own() + o;
      const bool inside = owns() && at < state.n;
      store_once(state.m + at, new_m, inside);
      store_once(state.v + at, new_v, inside);
    }
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const int from = (lane() & ~3) + j / kOwn;
      const float a = from_lane(of_m[j % kOwn], from), b = from_lane(of_g[j % kOwn], from);
      // Not the features times zero, which might be NaN.
      slot[j] = q() == 0 ? a : q() == 1 ? b : 0.0f;
    }
  }

  // One group's sums.
  template <int kLayer, int kSteps>
  __device__ __forceinline__ static void products(const uint32_t (&packed)[Weigh::kSize],
                                                  const Operand<kProducts, kTiles> (&in)[kSteps],
                                                  int p, Sums<kTiles>& sums) {
    constexpr int kSize = Weigh::group_size(kLayer);
    float bias[2][4];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const float4 got = *reinterpret_cast<const float4*>(
          packed + Weigh::bias_start(kLayer) + p * 32 + tile * 16 + q() * 4);
      bias[tile][0] = got.x, bias[tile][1] = got.y, bias[tile][2] = got.z, bias[tile][3] = got.w;
    }
    if constexpr (kLeftOut == LeftOut::kProducts || kLeftOut == LeftOut::kAll) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const uint32_t some = in[p % kSteps].high[t][r % Operand<kProducts, kTiles>::kRegisters];
          sums.of[t][0][r] = bias[0][r] + __uint_as_float(some);
          sums.of[t][1][r] = bias[1][r] - __uint_as_float(some);
        }
      }
      return;
    }
    const uint32_t* high = packed + Weigh::layer_start(kLayer) + p * kLanes * kSize;
    const auto step_of = [&](const uint32_t* part, int step) {
      return reinterpret_cast<const uint4*>(part)[step * kLanes + lane()];
    };
    if constexpr (kProducts == Products::kBf16) {
      static_assert(kSteps % 2 == 1, "the last step is half a step of the tensor cores");
#pragma unroll
      for (int step = 0; step < kSteps / 2; ++step) {
        const uint4 b = step_of(high, step);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const uint32_t a[4] = {in[2 * step].high[t][0], in[2 * step].high[t][1],
                                 in[2 * step + 1].high[t][0], in[2 * step + 1].high[t][1]};
          mma_bf16(sums.of[t][0], a, b.x, b.y, step ? sums.of[t][0] : bias[0]);
          mma_bf16(sums.of[t][1], a, b.z, b.w, step ? sums.of[t][1] : bias[1]);
        }
      }
      const uint2 b = reinterpret_cast<const uint2*>(high + kSteps / 2 * 4 * kLanes)[lane()];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const uint32_t a[2] = {in[kSteps - 1].high[t][0], in[kSteps - 1].high[t][1]};
        mma_bf16_half(sums.of[t][0], a, b.x, sums.of[t][0]);
        mma_bf16_half(sums.of[t][1], a, b.y, sums.of[t][1]);
      }
    } else if constexpr (kProducts == Products::kTf32) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint4 b = step_of(high, step);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          mma_tf32(sums.of[t][0], in[step].high[t], b.x, b.y, step ? sums.of[t][0] : bias[0]);
          mma_tf32(sums.of[t][1], in[step].high[t], b.z, b.w, step ? sums.of[t][1] : bias[1]);
        }
      }
    } else {
      // Tensor cores truncate where they add: beside large sums small products are lost, so these
      // come first, and long chains err to one side, so there are two.
      const uint32_t* low = high + Weigh::part_size(kLayer);
      constexpr int kChains = kSteps > 3 ? 2 : 1;
      float chain[kChains][kTiles][2][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int k = step * kChains / kSteps;
        const uint4 b = step_of(low, step);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          mma_tf32(chain[k][t][0], in[step].high[t], b.x, b.y, chain[k][t][0]);
          mma_tf32(chain[k][t][1], in[step].high[t], b.z, b.w, chain[k][t][1]);
        }
      }
#pragma unroll
      for (int rest = 1; rest >= 0; --rest) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          if (rest && !in[step].has_low) continue;
          const int k = step * kChains / kSteps;
          const uint4 b = step_of(high, step);
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            const uint32_t(&a)[4] = rest ? in[step].low[t] : in[step].high[t];
            mma_tf32(chain[k][t][0], a, b.x, b.y, chain[k][t][0]);
            mma_tf32(chain[k][t][1], a, b.z, b.w, chain[k][t][1]);
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            float sum = chain[0][t][tile][r];
            if constexpr (kChains > 1) sum += chain[kChains - 1][t][tile][r];
            sums.of[t][tile][r] = sum + bias[tile][r];
          }
        }
      }
    }
  }

  // A layer's new cells and, in `x`, its new h, (groups, kRun); stores both.
  template <int kLayer, int kSteps, typename Rounding>
  __device__ __forceinline__ void layer(const uint32_t (&packed)[Weigh::kSize],
                                        const Operand<kProducts, kTiles> (&in)[kSteps],
                                        const State<Cell>& state, int64_t first,
                                        const Rounding& rounding, float (&x)[kGroups][kRun]) {
    const int64_t at = first + first_of_run(), left = state.n - at;
    const int64_t start = (kLayer * kHidden + q()) * state.n + at;
    Cell *of_h = anew(state.h + start), *of_c = anew(state.c + start);
#pragma unroll
    for (int p = 0; p < kGroups; ++p) {
      Sums<kTiles> sums;
      products<kLayer>(packed, in, p, sums);
      float cells[kRun], outputs[kRun];
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        const float i = sums.of[j / 2][0][j % 2 * 2], f = sums.of[j / 2][0][j % 2 * 2 + 1];
        const float a = sums.of[j / 2][1][j % 2 * 2], o = sums.of[j / 2][1][j % 2 * 2 + 1];
        const float old = c[kLayer][p][j];
        if constexpr (kLeftOut == LeftOut::kActivations || kLeftOut == LeftOut::kAll) {
          cells[j] = f * old + i * a;
          outputs[j] = o * cells[j];
        } else {
          cells[j] = sigmoid_of<kApproximate>(f) * old;
          cells[j] += sigmoid_of<kApproximate>(i) * tanh_of<kApproximate>(a);
          outputs[j] = sigmoid_of<kApproximate>(o) * tanh_of<kApproximate>(cells[j]);
        }
        x[p][j] = outputs[j];
      }
      const int row = kLayer * kHidden + 4 * p + q();
      rounding.h(outputs, row, at);
      rounding.c(cells, row, at);
      Row stored;
      stored.set(outputs);
      stored.template store<kWide>(of_h + 4 * p * state.n, left);
      stored.set(cells);
      stored.template store<kWide>(of_c + 4 * p * state.n, left);
    }
  }

  // The first layer, of state that is loaded. Stores its new state and the moments.
  template <typename Rounding>
  __device__ __forceinline__ void first_layer(const uint32_t (&packed)[Weigh::kSize],
                                              const State<Cell>& state, int64_t first,
                                              const float (&grad)[kOwn], const Settings& settings,
                                              const Rounding& rounding,
                                              float (&x)[kGroups][kRun]) {
    float slot[kRun];
    features(state, first, grad, settings, slot);
    Operand<kProducts, kTiles> in[slots_of(0) / 2];
    in[0].set(h[0][0], kExact, h[0][1], kExact);
    in[1].set(h[0][2], kExact, h[0][3], kExact);
    in[2].set(h[0][4], kExact, slot, false);
    layer<0>(packed, in, state, first, rounding, x);
  }

  // The second, of what the first gave.
  template <typename Rounding>
  __device__ __forceinline__ void second_layer(const uint32_t (&packed)[Weigh::kSize],
                                               const State<Cell>& state, int64_t first,
                                               const Rounding& rounding,
                                               float (&x)[kGroups][kRun]) {
    Operand<kProducts, kTiles> in[slots_of(1) / 2];
    in[0].set(x[0], false, x[1], false);
    in[1].set(x[2], false, x[3], false);
    in[2].set(x[4], false, h[1][0], kExact);
    in[3].set(h[1][1], kExact, h[1][2], kExact);
    in[4].set(h[1][3], kExact, h[1][4], kExact);
    layer<1>(packed, in, state, first, rounding, x);
  }

  // The updates of the coordinates that this lane has to itself, of the top layer's new h.
  __device__ __forceinline__ static void updates(const uint32_t (&packed)[Weigh::kSize],
                                                 const float (&x)[kGroups][kRun],
                                                 const Settings& settings, float (&update)[kOwn]) {
    const float* head = reinterpret_cast<const float*>(packed + Weigh::kHead) + q() * Weigh::kHeadRow;
    float sums[kRun] = {};
#pragma unroll
    for (int p = 0; p < kGroups; ++p) {
      const float weight = head[p];
#pragma unroll
      for (int j = 0; j < kRun; ++j) sums[j] += weight * x[p][j];
    }
    float own[kOwn];
    if constexpr (kRun == 2) {
      // Lanes q and q + 2 end up with the same.
      const float kept = q() % 2 ? sums[1] : sums[0], given = q() % 2 ? sums[0] : sums[1];
      const float two = kept + from_other(given, 1);
      own[0] = two + from_other(two, 2);
    } else {
      float half[kRun / 2];
#pragma unroll
      for (int j = 0; j < kRun / 2; ++j) {
        const bool upper = q() / 2;
        const float kept = upper ? sums[j + kRun / 2] : sums[j];
        const float given = upper ? sums[j] : sums[j + kRun / 2];
        half[j] = kept + from_other(given, 2);
      }
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const bool upper = q() % 2;
        const float kept = upper ? half[j + kOwn] : half[j];
        const float given = upper ? half[j] : half[j + kOwn];
        own[j] = kept + from_other(given, 1);
      }
    }
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      const float top = own[o] + head[kGroups];
      update[o] = settings.alpha * (kLeftOut == LeftOut::kActivations || kLeftOut == LeftOut::kAll
                                        ? top
                                        : tanh_of<kApproximate>(top));
    }
  }
};

}  // namespace amalgam::cuda::tiles
