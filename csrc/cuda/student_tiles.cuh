// One step of the RNNProp student of 20 hidden units on tensor cores, a warp a tile of coordinates;
// amalgam/operations/student_step.py has the formulas.
//
// Gates are the columns of a product whose rows are coordinates. Their order is free, as is that of
// the rows and of the inner dimension, and chosen so that nothing moves between lanes: of every
// group of four units, lane q of a quad computes all four gates of the q-th, for `kRun` neighbouring
// coordinates, which it loads and stores at once; and their new h is already where the next layer's
// product takes it.
#pragma once

#include <cstdint>

#include "activations.cuh"
#include "student_frame.cuh"
#include "warp.cuh"

namespace amalgam::cuda::tiles {

inline constexpr int kHidden = 20;
inline constexpr int kGroups = kHidden / 4;  // of four units, one for each lane of a quad
inline constexpr int kFeatures = 2;
inline constexpr int kLanes = 32;

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

  // Of a gate's sum, the factor that its activation wants.
  __device__ static double scale(int gate, bool approximate) {
    if (approximate) return gate == 2 ? 1.0 : 0.5;
    return gate == 2 ? 2 * kLog2E : -kLog2E;
  }

  // The weight of what lane q has in a slot, for a unit's gate; zero where there is nothing.
  __device__ static float weight(const StudentWeights& from, int layer, int slot, int q, int gate,
                                 int unit, bool approximate) {
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
    return static_cast<float>(value * scale(gate, approximate));
  }

  // Word number `at`.
  __device__ static uint32_t word(int at, const StudentWeights& from, bool approximate) {
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
      const float bias = from.b[layer][gate * kHidden + 4 * p + q];
      return __float_as_uint(static_cast<float>(bias * scale(gate, approximate)));
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
};

// The neighbouring coordinates of one row that a lane has.
template <typename Cell, int kRun>
struct Cells {
  static constexpr int kPerWord = 4 / sizeof(Cell);
  static constexpr int kWords = kRun / kPerWord;
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
  // kWide: the row begins where kOnce words can be loaded at once, and all of these exist or none.
  template <bool kWide>
  __device__ __forceinline__ void load(const Cell* row, int left) {
    if constexpr (kWide) {
#pragma unroll
      for (int i = 0; i < kWords; i += kOnce) {
        load_once<kOnce>(words + i, reinterpret_cast<const uint32_t*>(row) + i, i * kPerWord < left);
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
  __device__ __forceinline__ void store(Cell* row, int left) const {
    if constexpr (kWide) {
#pragma unroll
      for (int i = 0; i < kWords; i += kOnce) {
        store_once<kOnce>(reinterpret_cast<uint32_t*>(row) + i, words + i, i * kPerWord < left);
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

// How a layer's new cells are rounded to what is stored; kEither asks the call.
enum class Rounds { kNearest, kAtRandom, kEither };

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

// The tensor that a warp is at, in shared memory: all its lanes read it, again and again.
struct Place {
  StudentTensor tensor;
  Rates rates;
  int64_t begin, end;  // its blocks

  // For a whole warp, of which no lane still reads the place before.
  __device__ void find(const StudentCall& call, int64_t block) {
    __syncwarp();
    const int index = index_of(call, block);
    const int lane = threadIdx.x % kLanes;
    auto* const columns = reinterpret_cast<int64_t*>(&tensor);
    if (lane < kColumns) columns[lane] = call.table[int64_t{index} * kColumns + lane];
    __syncwarp();
    if (lane == 0) {
      rates = rates_of(call, tensor);
      begin = call.first_block[index];
      end = begin + (tensor.numel + kTileBlock - 1) / kTileBlock;
    }
    __syncwarp();
  }
};

// A parameter or gradient, whose storage is known at run time, where `inside`; and what it says.
__device__ __forceinline__ uint32_t load_stored(const void* from, Stored stored, int64_t at,
                                                bool inside) {
  const bool narrow = stored != Stored::float32;
  uint32_t word;
  load_once<1>(&word, static_cast<const uint32_t*>(from) + at, inside && !narrow);
  return word | load_once(static_cast<const uint16_t*>(from) + at, inside && narrow);
}

__device__ __forceinline__ float number_of(uint32_t word, Stored stored) {
  if (stored == Stored::float32) return __uint_as_float(word);
  if (stored == Stored::bfloat16) return __uint_as_float(word << 16);
  return __half2float(__ushort_as_half(static_cast<uint16_t>(word)));
}

__device__ __forceinline__ void store_stored(void* to, Stored stored, int64_t at, float value,
                                             bool inside) {
  const bool narrow = stored != Stored::float32;
  const uint16_t half = stored == Stored::float16
                            ? __half_as_ushort(__float2half_rn(value))
                            : __bfloat16_as_ushort(__float2bfloat16_rn(value));
  store_once(static_cast<float*>(to) + at, value, inside && !narrow);
  store_once(static_cast<uint16_t*>(to) + at, half, inside && narrow);
}

template <int kLayers, Products kProducts, bool kApproximate, typename Cell, int kTiles, bool kWide,
          Rounds kRounds>
struct Step {
  static_assert(kTiles % 2 == 0, "a quad's four lanes share its coordinates out");
  static constexpr int kRun = 2 * kTiles;           // neighbouring coordinates of a lane
  static constexpr int kCoordinates = 16 * kTiles;  // of a warp
  static constexpr int kOwn = kRun / 4;             // of a lane that has them to itself
  static constexpr bool kExact = sizeof(Cell) == 2;  // whether stored h fits the operands' type
  using Weigh = Packed<kLayers, kProducts>;
  using Row = Cells<Cell, kRun>;
  using Shared = uint32_t[Weigh::kSize];

  const StudentCall& call;
  const Place& place;
  const Shared& packed;
  int64_t first;  // of the tensor's coordinates, in this tile
  int size;       // how many of the tile's coordinates there are, unless negative
  Row h[kLayers][kGroups], c[kLayers][kGroups];
  uint32_t raw_grad[kOwn], raw_param[kOwn];
  float m[kOwn], v[kOwn], slot[kRun];
  uint32_t still = 0;  // a bit for each of its own whose gradients were all zero

  __device__ Step(const StudentCall& call, const Place& place, const Shared& packed, int64_t first)
      : call(call), place(place), packed(packed), first(first) {
    const int64_t left = place.tensor.numel - first;
    size = left < kCoordinates ? static_cast<int>(left) : kCoordinates;
  }

  __device__ static int lane() { return threadIdx.x % kLanes; }
  __device__ static int q() { return lane() % 4; }
  // The first of this lane's coordinates in a tile, and the first that it has to itself.
  __device__ static int first_of_run() { return lane() / 4 * kRun; }
  __device__ static int first_own() { return first_of_run() + q() * kOwn; }

  __device__ __forceinline__ void load_own() {
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      const int64_t at = first + first_own() + o;
      const bool inside = first_own() + o < size;
      raw_grad[o] = load_stored(place.tensor.grad, call.grad, at, inside);
      raw_param[o] = load_stored(place.tensor.param, call.param, at, inside);
      m[o] = load_once(static_cast<const float*>(place.tensor.m) + at, inside);
      v[o] = load_once(static_cast<const float*>(place.tensor.v) + at, inside);
    }
  }

  // One layer's old state.
  template <int kLayer>
  __device__ __forceinline__ void load_layer() {
    const int left = size - first_of_run();
    const int64_t n = place.tensor.numel;
    const int64_t start = (kLayer * kHidden + q()) * n + first + first_of_run();
    const Cell* of_h = anew(static_cast<const Cell*>(place.tensor.h) + start);
    const Cell* of_c = anew(static_cast<const Cell*>(place.tensor.c) + start);
#pragma unroll
    for (int p = 0; p < kGroups; ++p) {
      h[kLayer][p].template load<kWide>(of_h + 4 * p * n, left);
      c[kLayer][p].template load<kWide>(of_c + 4 * p * n, left);
    }
  }

  // Brings the moments to date, and what the first layer's last slot holds.
  __device__ __forceinline__ void follow_own(float (&grad)[kOwn]) {
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      grad[o] = number_of(raw_grad[o], call.grad);
      follow(call, grad[o], m[o], v[o]);
      const int64_t at = first + first_own() + o;
      const bool inside = first_own() + o < size;
      store_once(static_cast<float*>(place.tensor.m) + at, m[o], inside);
      store_once(static_cast<float*>(place.tensor.v) + at, v[o], inside);
    }
  }

  __device__ __forceinline__ void share_features(const float (&grad)[kOwn]) {
    float of_m[kOwn], of_g[kOwn];
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      features(call, grad[o], m[o], v[o], of_m[o], of_g[o]);
      still |= uint32_t{v[o] == 0.0f} << o;
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
  __device__ __forceinline__ void products(const Operand<kProducts, kTiles> (&in)[kSteps], int p,
                                           Sums<kTiles>& sums) const {
    constexpr int kSize = Weigh::group_size(kLayer);
    float bias[2][4];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const float4 got = *reinterpret_cast<const float4*>(
          packed + Weigh::bias_start(kLayer) + p * 32 + tile * 16 + q() * 4);
      bias[tile][0] = got.x, bias[tile][1] = got.y, bias[tile][2] = got.z, bias[tile][3] = got.w;
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

  __device__ __forceinline__ void round_cells(int row, int64_t at, float (&outputs)[kRun],
                                              float (&cells)[kRun]) const {
    if constexpr (kRounds == Rounds::kNearest) return;
    if (kRounds == Rounds::kEither && !call.stochastic) return;
    const uint32_t key = key_of_row(place.rates.key, row);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const uint32_t bits = random_bits(key, counted(at + j));
      outputs[j] = rounded(outputs[j], bits >> 16);
      cells[j] = rounded(cells[j], bits & 0xffffu);
    }
  }

  // Stores a layer's new cells and its new h. The latter are in `x` then; of the top layer, what the
  // head makes of this lane's units is added to x[0] instead.
  template <int kLayer, int kSteps, int kRows>
  __device__ __forceinline__ void layer(const Operand<kProducts, kTiles> (&in)[kSteps],
                                        float (&x)[kRows][kRun]) const {
    constexpr bool kTop = kLayer == kLayers - 1;
    static_assert(kRows == (kTop ? 1 : kGroups), "one row for all units, or one for each group");
    const int left = size - first_of_run();
    const int64_t n = place.tensor.numel, at = first + first_of_run();
    const int64_t start = (kLayer * kHidden + q()) * n + at;
    Cell* of_h = anew(static_cast<Cell*>(place.tensor.h) + start);
    Cell* of_c = anew(static_cast<Cell*>(place.tensor.c) + start);
#pragma unroll
    for (int p = 0; p < kGroups; ++p) {
      Sums<kTiles> sums;
      products<kLayer>(in, p, sums);
      float cells[kRun], outputs[kRun];
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        const float(&even)[4] = sums.of[j / 2][0], (&odd)[4] = sums.of[j / 2][1];
        const float i = sigmoid_of<kApproximate>(even[j % 2 * 2]);
        const float f = sigmoid_of<kApproximate>(even[j % 2 * 2 + 1]);
        const float a = tanh_of<kApproximate>(odd[j % 2 * 2]);
        const float o = sigmoid_of<kApproximate>(odd[j % 2 * 2 + 1]);
        cells[j] = __fmaf_rn(i, a, __fmul_rn(f, c[kLayer][p][j]));
        outputs[j] = __fmul_rn(o, tanh<kApproximate>(cells[j]));
        if constexpr (kTop) {
          x[0][j] = __fmaf_rn(head()[p], outputs[j], x[0][j]);
        } else {
          x[p][j] = outputs[j];
        }
      }
      round_cells(kLayer * kHidden + 4 * p + q(), at, outputs, cells);
      Row stored;
      stored.set(outputs);
      stored.template store<kWide>(of_h + 4 * p * n, left);
      stored.set(cells);
      stored.template store<kWide>(of_c + 4 * p * n, left);
    }
  }

  // The head's weights of this lane's units, then its bias.
  __device__ __forceinline__ const float* head() const {
    return reinterpret_cast<const float*>(packed + Weigh::kHead) + q() * Weigh::kHeadRow;
  }

  // What the head makes of this lane's units.
  __device__ __forceinline__ void layers(float (&sums)[1][kRun]) const {
    Operand<kProducts, kTiles> in[slots_of(0) / 2];
    in[0].set(h[0][0], kExact, h[0][1], kExact);
    in[1].set(h[0][2], kExact, h[0][3], kExact);
    in[2].set(h[0][4], kExact, slot, false);
    if constexpr (kLayers == 1) {
      layer<0>(in, sums);
    } else {
      float x[kGroups][kRun];
      layer<0>(in, x);
      Operand<kProducts, kTiles> above[slots_of(1) / 2];
      above[0].set(x[0], false, x[1], false);
      above[1].set(x[2], false, x[3], false);
      above[2].set(x[4], false, h[1][0], kExact);
      above[3].set(h[1][1], kExact, h[1][2], kExact);
      above[4].set(h[1][3], kExact, h[1][4], kExact);
      layer<1>(above, sums);
    }
  }

  // The updates of the coordinates that this lane has to itself, of all lanes' sums.
  __device__ __forceinline__ void updates(const float (&sums)[kRun], float (&update)[kOwn]) const {
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
      const float top = kept + from_other(given, 1) + head()[kGroups];
      update[j] = still >> j & 1 ? 0.0f : __fmul_rn(call.alpha, tanh<kApproximate>(top));
    }
  }

  __device__ __forceinline__ void move_own(float rate, const float (&update)[kOwn]) const {
    float old[kOwn], to[kOwn];
#pragma unroll
    for (int o = 0; o < kOwn; ++o) old[o] = number_of(raw_param[o], call.param);
    moved(call, place.rates, rate, kLayers * kHidden, first + first_own(), old, update, to);
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      store_stored(place.tensor.param, call.param, first + first_own() + o, to[o],
                   first_own() + o < size);
    }
  }

  __device__ __forceinline__ void run() {
    float grad[kOwn];
    load_own();
    if (place.rates.is_warm) {
      follow_own(grad);
      move_own(place.rates.warm, grad);
      return;
    }
    load_layer<0>();
    if constexpr (kLayers > 1) load_layer<1>();
    follow_own(grad);
    share_features(grad);
    float sums[1][kRun] = {}, update[kOwn];
    layers(sums);
    updates(sums[0], update);
    move_own(place.rates.lr, update);
  }
};

// A grid that stays: weights are brought in once, and a warp goes from tile to tile.
template <int kLayers, Products kProducts, bool kApproximate, typename Cell, int kTiles, bool kWide,
          Rounds kRounds, int kWarps, int kBlocks>
__global__ void __launch_bounds__(kWarps* kLanes, kBlocks) student_tiles(const StudentCall call) {
  using Tile = Step<kLayers, kProducts, kApproximate, Cell, kTiles, kWide, kRounds>;
  constexpr int kParts = kTileBlock / Tile::kCoordinates;
  alignas(16) __shared__ typename Tile::Shared packed;
  __shared__ Place places[kWarps];
  if (call.control && call.control[3] != 0.0) return;
  static_assert(Tile::Weigh::kSize % 4 == 0, "copied by 16 bytes");
  for (int at = threadIdx.x; at < Tile::Weigh::kSize / 4; at += kWarps * kLanes) {
    reinterpret_cast<uint4*>(packed)[at] = reinterpret_cast<const uint4*>(call.weights)[at];
  }
  const int warp = threadIdx.x / kLanes;
  Place& place = places[warp];
  if (Tile::lane() == 0) place.end = 0;
  __syncthreads();
  const int64_t tiles = call.blocks * kParts, stride = int64_t{gridDim.x} * kWarps;
#pragma unroll 1
  for (int64_t tile = int64_t{blockIdx.x} * kWarps + warp; tile < tiles; tile += stride) {
    const int64_t block = tile / kParts;
    if (block >= place.end) place.find(call, block);
    const int64_t first = (block - place.begin) * kTileBlock + tile % kParts * Tile::kCoordinates;
    Tile(call, place, packed, first).run();
  }
}

template <int kLayers, Products kProducts>
__global__ void pack_for_tiles(const StudentWeights weights, bool approximate, uint32_t* to) {
  using Weigh = Packed<kLayers, kProducts>;
  const int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at < Weigh::kSize) to[at] = Weigh::word(at, weights, approximate);
}

}  // namespace amalgam::cuda::tiles
