// LSTM layers on one tile by AVX-512's dot products of pairs of bfloat16; lstm_pairs.h says of what.
//
// The instruction takes numbers below 2^-126 for zeros. Sums of NaN and infinity are what float32's
// are, but that the largest floats, beyond 2^128 (1 - 2^-9), round to infinity.
#include "lstm_bf16.h"

#include "lstm.h"

namespace amalgam::cpu::AMALGAM_ISA {
namespace {

static_assert(sizeof(Vector<float>) == sizeof(__m512i));

inline Vector<float> clamped(Vector<float> x, float limit) {
  // Of the two the second, x, where one is NaN.
  const __m512 above = _mm512_max_ps((__m512)splat(-limit), (__m512)x);
  return (Vector<float>)_mm512_min_ps((__m512)splat(limit), above);
}

// tanh(x) as x P(x^2) / Q(x^2) for |x| up to kLimit, and sigmoid(x) as (1 + tanh(x / 2)) / 2: fewer
// instructions than by exp. Minimax in the relative error, among quotients that stay below 1, so that
// gates stay within (0, 1). kScale keeps Q below 1: where c is large, its product with several Q
// must not overflow. Of sigmoid, `half` is 0.5 and goes into the constants.
struct Precise {  // 19 bits
  static constexpr float kLimit = 7.0f;
  static constexpr float kScale = 0x1p-7f;

  static Vector<float> above(Vector<float> x, Vector<float> s, float half) {
    const float h = half, h3 = h * h * h, h5 = h3 * h * h, h7 = h5 * h * h;
    Vector<float> p = s * (h7 * kScale * 4.00696060e-06f) + h5 * kScale * 2.29569850e-03f;
    p = p * s + h3 * kScale * 1.23251562e-01f;
    p = p * s + h * kScale * 9.99999082e-01f;
    return p * x;
  }

  static Vector<float> below(Vector<float> s, float half) {
    const float h2 = half * half, h4 = h2 * h2, h6 = h4 * h2;
    Vector<float> q = s * (h6 * kScale * 1.44254493e-04f) + h4 * kScale * 2.11642394e-02f;
    q = q * s + h2 * kScale * 4.56577708e-01f;
    return q * s + kScale;
  }

  // One step of Newton's from 14 bits.
  static Vector<float> divided(Vector<float> a, Vector<float> b) {
    const Vector<float> r = (Vector<float>)_mm512_rcp14_ps((__m512)b);
    return a * (r * (2.0f - b * r));
  }
};

struct Approximate {  // 13 bits
  static constexpr float kLimit = 5.2f;
  static constexpr float kScale = 0x1p-5f;

  static Vector<float> above(Vector<float> x, Vector<float> s, float half) {
    const float h = half, h3 = h * h * h, h5 = h3 * h * h;
    Vector<float> p = s * (h5 * kScale * 6.50354147e-04f) + h3 * kScale * 1.01751031e-01f;
    p = p * s + h * kScale * 9.99933741e-01f;
    return p * x;
  }

  static Vector<float> below(Vector<float> s, float half) {
    const float h2 = half * half, h4 = h2 * h2;
    Vector<float> q = s * (h4 * kScale * 1.26172395e-02f) + h2 * kScale * 4.34693714e-01f;
    return q * s + kScale;
  }

  static Vector<float> divided(Vector<float> a, Vector<float> b) {
    return a * (Vector<float>)_mm512_rcp14_ps((__m512)b);
  }
};

template <typename Activations>
inline Ratio<float> tanh_by(Vector<float> x) {
  x = clamped(x, Activations::kLimit);
  const Vector<float> s = x * x;
  return {Activations::above(x, s, 1.0f), Activations::below(s, 1.0f)};
}

template <typename Activations>
inline Ratio<float> sigmoid_by(Vector<float> x) {
  x = clamped(x, 2 * Activations::kLimit);
  const Vector<float> s = x * x;
  const Vector<float> q = Activations::below(s, 0.5f);
  return {Activations::above(x, s, 0.5f) + q, q + q};
}

// Rounds pairs of rows to bfloat16 and interleaves them; the last of an odd number gets zeros. The
// first `inputs` of the rows are those of `in`.
void interleave(const float* in, int inputs, const Rows<const float>& h, int count,
                float* __restrict pairs) {
  alignas(64) static constexpr uint16_t kOrder[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(kOrder);
  const auto row_of = [&](int row) { return row < inputs ? in + row * kTile : h[row - inputs]; };
  for (int row = 0; row < count; row += 2) {
    const float* first = row_of(row);
    const float* second = row + 1 < count ? row_of(row + 1) : nullptr;
    for (int at = 0; at < kTile; at += kLanes<float>) {
      const __m512 low = (__m512)load(first + at);
      const __m512 high = second ? (__m512)load(second + at) : _mm512_setzero_ps();
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
      _mm512_storeu_si512(pairs + row / 2 * kTile + at, _mm512_permutexvar_epi16(order, both));
    }
  }
}

// As gate_sums of lstm.h: bias + weights of one unit times `exact` rows and then rows of pairs.
__attribute__((noinline)) void gate_sums_of_pairs(const float* __restrict weights, int exact,
                                                  const float* __restrict in,
                                                  const uint32_t* __restrict by_pair, int pairs,
                                                  const float* __restrict in_pairs,
                                                  float* __restrict sums) {
  constexpr int kStep = kInFlight * kLanes<float>;
  static_assert(kTile % kStep == 0, "a tile is whole vectors");
  for (int at = 0; at < kTile; at += kStep) {
    __m512 sum[4][kInFlight];
    for (int gate = 0; gate < 4; ++gate) {
      for (int v = 0; v < kInFlight; ++v) sum[gate][v] = _mm512_set1_ps(weights[gate]);
    }
    const float* w = weights + 4;
    for (int row = 0; row < exact; ++row, w += 4) {
      for (int gate = 0; gate < 4; ++gate) {
        const __m512 weight = _mm512_set1_ps(w[gate]);
        for (int v = 0; v < kInFlight; ++v) {
          const __m512 x = (__m512)load(in + row * kTile + at + v * kLanes<float>);
          sum[gate][v] = _mm512_fmadd_ps(weight, x, sum[gate][v]);
        }
      }
    }
    const uint32_t* words = by_pair;
    for (int pair = 0; pair < pairs; ++pair, words += 4) {
      __m512bh x[kInFlight];
      for (int v = 0; v < kInFlight; ++v) {
        x[v] = (__m512bh)load(in_pairs + pair * kTile + at + v * kLanes<float>);
      }
      for (int gate = 0; gate < 4; ++gate) {
        const __m512bh weight = (__m512bh)_mm512_set1_epi32(static_cast<int>(words[gate]));
        for (int v = 0; v < kInFlight; ++v) {
          sum[gate][v] = _mm512_dpbf16_ps(sum[gate][v], weight, x[v]);
        }
      }
    }
    for (int gate = 0; gate < 4; ++gate) {
      for (int v = 0; v < kInFlight; ++v) {
        store(sums + gate * kTile + at + v * kLanes<float>, (Vector<float>)sum[gate][v]);
      }
    }
  }
}

template <typename Activations>
void layer_forward_in_pairs(const LstmNetwork<float>& net, int layer, const LstmTile<float>& tile,
                            float* __restrict out) {
  const LayerShape& shape = net.shapes[layer];
  const int exact = exact_rows(shape, layer), rows = shape.rows();
  const int pairs = (rows - exact + 1) / 2, first = layer * shape.hidden;
  const float* in = tile.in[layer];
  const Rows<const float> h =
      tile.h.first ? tile.h.from(first) : Rows<const float>{in + shape.inputs * kTile, kTile};
  interleave(in + exact * kTile, shape.inputs - exact, h, rows - exact, tile.pairs);
  for (int unit = 0; unit < shape.hidden; ++unit) {
    for (const Ahead& ahead : tile.ahead) prefetch(ahead, first + unit);
    const float* cells = tile.cells[first + unit];
    float* new_cells = tile.new_cells[first + unit];
    float* new_h = tile.new_h.first ? tile.new_h[first + unit] : nullptr;
    float sums[4 * kTile];
    gate_sums_of_pairs(net.by_unit[layer] + int64_t(unit) * 4 * (rows + 1), exact, in,
                       net.by_pair[layer] + int64_t(unit) * 4 * pairs, pairs, tile.pairs, sums);
    for (int at = 0; at < kTile; at += kLanes<float>) {
      const Ratio<float> i = sigmoid_by<Activations>(load(sums + at)),
                         f = sigmoid_by<Activations>(load(sums + kTile + at)),
                         a = tanh_by<Activations>(load(sums + 2 * kTile + at)),
                         o = sigmoid_by<Activations>(load(sums + 3 * kTile + at));
      const Vector<float> below = i.below * a.below;
      const Vector<float> cell = Activations::divided(
          f.above * load(cells + at) * below + i.above * a.above * f.below, f.below * below);
      const Ratio<float> squashed = tanh_by<Activations>(cell);
      const Vector<float> h =
          Activations::divided(o.above * squashed.above, o.below * squashed.below);
      store(new_cells + at, cell);
      store(out + unit * kTile + at, h);
      if (new_h) store(new_h + at, h);
    }
  }
}

template <typename Activations>
void forward(const LstmNetwork<float>& net, const LstmTile<float>& tile) {
  for (int layer = 0; layer < net.layers; ++layer) {
    float* out = layer + 1 < net.layers ? tile.in[layer + 1] : tile.top;
    layer_forward_in_pairs<Activations>(net, layer, tile, out);
  }
}

}  // namespace

LstmForward lstm_forward_in_pairs(bool approximate) {
  return approximate ? forward<Approximate> : forward<Precise>;
}

}  // namespace amalgam::cpu::AMALGAM_ISA
