#include "student_small.h"

#include "activations.h"
#include "mix.h"
#include "simd.h"
#include "student_forms.h"

namespace amalgam::cpu::AMALGAM_ISA {
namespace {

using Floats = Vector<float>;
constexpr int kWidth = kLanes<float>;
typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

// --- 2^y ---

// Above it exp(-x) is such that 1 / (1 + exp(-x)) is 1e-12; products of three stay finite.
constexpr float kMostLog2 = 40.0f;

// The smaller one; y where it is NaN.
inline Floats at_most(float ceiling, Floats y) {
#ifdef __AVX512F__
  return (Floats)_mm512_min_ps(_mm512_set1_ps(ceiling), (__m512)y);
#elif defined(__AVX2__)
  return (Floats)_mm256_min_ps(_mm256_set1_ps(ceiling), (__m256)y);
#else
  return y > ceiling ? splat(ceiling) : y;
#endif
}

#ifdef __AVX512F__
constexpr float kRound = 0x1.8p18f;  // its sums have a last bit of 1/32

// 2^(k / 32), and that times the c of below.
alignas(64) constexpr float kPowers[32] = {
    0x1.000000p+0f, 0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f,
    0x1.1d4874p+0f, 0x1.2387a6p+0f, 0x1.29e9e0p+0f, 0x1.306fe0p+0f, 0x1.371a74p+0f,
    0x1.3dea64p+0f, 0x1.44e086p+0f, 0x1.4bfdaep+0f, 0x1.5342b6p+0f, 0x1.5ab07ep+0f,
    0x1.6247ecp+0f, 0x1.6a09e6p+0f, 0x1.71f75ep+0f, 0x1.7a1148p+0f, 0x1.82589ap+0f,
    0x1.8ace54p+0f, 0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f, 0x1.ae89fap+0f,
    0x1.b7f770p+0f, 0x1.c199bep+0f, 0x1.cb720ep+0f, 0x1.d5818ep+0f, 0x1.dfc974p+0f,
    0x1.ea4afap+0f, 0x1.f50766p+0f};
alignas(64) constexpr float kScaled[32] = {
    0x1.ebfdbap-3f, 0x1.f6c3aap-3f, 0x1.00e300p-2f, 0x1.068306p-2f, 0x1.0c4294p-2f,
    0x1.12225ap-2f, 0x1.18230ep-2f, 0x1.1e456ap-2f, 0x1.248a28p-2f, 0x1.2af20ap-2f,
    0x1.317dd4p-2f, 0x1.382e50p-2f, 0x1.3f044cp-2f, 0x1.460098p-2f, 0x1.4d240ep-2f,
    0x1.546f8ap-2f, 0x1.5be3e8p-2f, 0x1.638210p-2f, 0x1.6b4aecp-2f, 0x1.733f6cp-2f,
    0x1.7b6084p-2f, 0x1.83af2ep-2f, 0x1.8c2c68p-2f, 0x1.94d93ap-2f, 0x1.9db6acp-2f,
    0x1.a6c5d0p-2f, 0x1.b007bep-2f, 0x1.b97d8ep-2f, 0x1.c32868p-2f, 0x1.cd0974p-2f,
    0x1.d721e0p-2f, 0x1.e172e2p-2f};

// A table's 2^n, where `rounded` is n + kRound: which of its numbers is in the last bits.
inline Floats looked_up(const float* table, Floats rounded, Floats n) {
  const __m512 found = _mm512_permutex2var_ps(_mm512_load_ps(table), (__m512i)rounded,
                                              _mm512_load_ps(table + 16));
  return (Floats)_mm512_scalef_ps(found, (__m512)n);
}

// 2^y within 2 ulp, for y up to kMostLog2: 2^n c ((r + h)^2 + d), the minimax polynomial for |r| <=
// 1/64. With its square completed it takes two products; they, and not sums, are what is scarce.
inline Floats power(Floats y) {
  constexpr float kH = 0x1.715476p+0f, kD = 0x1.0a684ap+1f;
  y = at_most(kMostLog2, y);
  const Floats rounded = y + kRound, n = rounded - kRound, u = (y + kH) - n;
  return looked_up(kScaled, rounded, n) * (u * u + kD);
}

// 1 - 2^y for y up to kMostLog2, within 2^-24 beside 1, and of its own size where |y| <= 1/64.
inline Floats one_less_power(Floats y) {
  y = at_most(kMostLog2, y);
  const Floats rounded = y + kRound, n = rounded - kRound, r = y - n;
  const Floats t = looked_up(kPowers, rounded, n);
  return (1.0f - t) - t * (r * (r * 0x1.ebfbe4p-3f + 0x1.62e584p-1f));
}
#else
// 2^n and 2^y / 2^n - 1, by the minimax polynomial for |r| <= 1/2.
struct Power {
  Floats t, rest;
};

inline Power power_of(Floats y) {
  constexpr float kRound = 0x1.8p23f;
  y = at_least(splat(-126.0f), at_most(kMostLog2, y));
  const Floats rounded = y + kRound, r = y - (rounded - kRound);
  Floats p = splat(0x1.41fbbcp-13f);
  p = p * r + 0x1.5f3e52p-10f;
  p = p * r + 0x1.3b2d4cp-7f;
  p = p * r + 0x1.c6aee8p-5f;
  p = p * r + 0x1.ebfbdcp-3f;
  p = p * r + 0x1.62e430p-1f;
  return {(Floats)(((Ints)rounded << 23) + (127 << 23)), p * r};
}

inline Floats power(Floats y) {
  const Power p = power_of(y);
  return p.t * p.rest + p.t;
}

inline Floats one_less_power(Floats y) {
  const Power p = power_of(y);
  return (1.0f - p.t) - p.t * p.rest;
}
#endif

inline Floats absolute(Floats x) { return (Floats)((Ints)x & ~kSign); }

// --- bfloat16 ---

// Each is one instruction, of which GCC makes several.
inline Bits widened(Halves halves) {
#ifdef __AVX512F__
  return (Bits)_mm512_cvtepu16_epi32((__m256i)halves);
#else
  return __builtin_convertvector(halves, Bits);
#endif
}

inline Halves narrowed(Bits bits) {
#ifdef __AVX512F__
  return (Halves)_mm512_cvtepi32_epi16((__m512i)bits);
#else
  return __builtin_convertvector(bits, Halves);
#endif
}

inline Floats load_numbers(bool narrow, const char* from) {
  if (!narrow) return load(reinterpret_cast<const float*>(from));
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof halves);
  return (Floats)(widened(halves) << 16);
}

// What the places of a vector add to a row's key.
inline Bits counted(int64_t place) {
  const uint64_t wide = static_cast<uint64_t>(place);
  const uint32_t low = static_cast<uint32_t>(wide), high = static_cast<uint32_t>(wide >> 32);
  Bits lanes;
  for (int lane = 0; lane < kWidth; ++lane) lanes[lane] = lane * 0x85ebca77u;
  return lanes + (low * 0x85ebca77u + high * 0xc2b2ae3du);
}

inline Bits to_nearest(Floats x) {
  const Bits bits = (Bits)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? rounded : (bits >> 16) | 0x40;
}

// How a row's numbers are stored; of the random bits this use takes the upper or lower 16.
struct Storing {
  bool narrow, stochastic;
};

inline void store_numbers(Storing how, Floats x, Bits random, char* to) {
  if (!how.narrow) return store(reinterpret_cast<float*>(to), x);
  Bits rounded = to_nearest(x);
  if (how.stochastic) {
    const Bits bits = (Bits)x;
    rounded = (bits & 0x7f800000) == 0x7f800000 ? rounded : (bits + random) >> 16;
  }
  const Halves halves = narrowed(rounded);
  __builtin_memcpy(to, &halves, sizeof halves);
}

inline Bits upper(Bits random) { return random >> 16; }
inline Bits lower(Bits random) { return random & 0xffff; }

// --- Some vectors of coordinates ---

// Where their numbers lie; rows of h and c are `stride` bytes apart.
struct Place {
  const char *grad, *m, *v, *h, *c;
  char *new_m, *new_v, *new_h, *new_c, *out;
  int64_t stride;
};

// What is the same for all coordinates of a piece.
template <int hidden>
struct OfPiece {
  float bias[hidden][4];
  float c1, c2, alpha;  // alpha times the tensor's pace
  uint32_t keys[hidden + 2];  // of rows of random bits: h and c, the parameter, moments
};

template <int hidden>
struct Small {
  const SmallStudent& student;
  const SmallStep& how;
  const OfPiece<hidden>& of;
};

// Of a vector's step, what its parts hand on: the LSTM's inputs, a and b, and the head's outputs.
struct Step {
  Floats x[3], a, b, o1, o2;
};

template <int hidden>
inline Bits random_bits(const Small<hidden>& small, Bits places, int row) {
  return small.how.stochastic ? mix(places ^ small.of.keys[row]) : Bits{};
}

template <int hidden>
inline void moments_and_inputs(const Small<hidden>& small, Bits places, const Place& at,
                               Step& step) {
  const auto& [student, how, of] = small;
  const Floats g = load_numbers(how.narrow_grad, at.grad);
  const Floats m =
      student.beta1 * load_numbers(how.narrow_moments, at.m) + student.one_minus_beta1 * g;
  const Floats v =
      student.beta2 * load_numbers(how.narrow_moments, at.v) + student.one_minus_beta2 * (g * g);
  const Bits random = random_bits(small, places, hidden + 1);
  store_numbers({how.narrow_moments, how.stochastic}, m, upper(random), at.new_m);
  store_numbers({how.narrow_moments, how.stochastic}, v, lower(random), at.new_v);
  const Floats inverse = 1.0f / (root_of<float>(v * of.c2) + student.eps);
  const Floats r = v > 0.0f ? inverse : splat(0.0f);
  step.a = m * of.c1 * r;
  step.b = g * r;
  const Floats s = one_less_power(step.a * step.b * float(kOfTanh));
  const Floats t = one_less_power(absolute(step.b) * float(kOfTanh));
  step.x[0] = at_most(1e30f, absolute(step.a));  // infinite sums have no power
  step.x[1] = s / (2.0f - s);
  step.x[2] = t / (2.0f - t);
}

// A unit's sums, row by row of its inputs, in parts between which other work is put.
template <int rows>
struct Sums {
  static constexpr int kParts = 7;
  const float* weights;
  const Floats* x;
  Floats gates[4];

  template <int part>
  inline __attribute__((always_inline)) void add() {
#pragma GCC unroll 19
    for (int row = rows * part / kParts; row < rows * (part + 1) / kParts; ++row) {
#pragma GCC unroll 4
      for (int gate = 0; gate < 4; ++gate) gates[gate] += weights[4 * row + gate] * x[row];
    }
  }

  template <int... parts>
  inline __attribute__((always_inline)) void add_all() {
    (add<parts>(), ...);
  }
};

// Bytes of each row that are fetched into cache before they are used.
constexpr int64_t kAhead = 4 * 64;

// The LSTM and the head of a vector. A unit's activations wait for each other most of the time, and a
// core sees only so far: the next unit's sums, and what was left of the last unit, come between them.
template <int hidden, bool narrow>
inline __attribute__((always_inline)) void units(const Small<hidden>& small, Bits places,
                                                 const Place& at, Step& step) {
  constexpr int kRows = 3 + hidden;
  Floats x[kRows] = {step.x[0], step.x[1], step.x[2]};
#pragma GCC unroll 16
  for (int unit = 0; unit < hidden; ++unit) {
    x[3 + unit] = load_numbers(narrow, at.h + unit * at.stride);
  }
  Floats o1 = splat(small.student.head_bias[0]), o2 = splat(small.student.head_bias[1]);
  const auto begin = [&](int unit) __attribute__((always_inline)) {
    Sums<kRows> sums{small.student.weights + unit * 4 * kRows, x, {}};
#pragma GCC unroll 4
    for (int gate = 0; gate < 4; ++gate) sums.gates[gate] = splat(small.of.bias[unit][gate]);
    return sums;
  };
  // What is left of a unit when its cell is known.
  Floats cell, o;
  const auto finish = [&](int unit) __attribute__((always_inline)) {
    // Infinite cells have no power.
    const Floats w = one_less_power(at_least(splat(-126.0f), cell * float(kOfTanh)));
    const Floats h = w / ((2.0f - w) * o);
    const Bits random = random_bits(small, places, unit);
    const Storing storing{narrow, small.how.stochastic};
    store_numbers(storing, h, upper(random), at.new_h + unit * at.stride);
    store_numbers(storing, cell, lower(random), at.new_c + unit * at.stride);
    o1 += small.student.head[2 * unit] * h;
    o2 += small.student.head[2 * unit + 1] * h;
  };
  // A unit's cell. The last unit's rest and the next one's sums come between.
  const auto advance = [&](int unit, const Floats* gates, bool others, auto& next)
      __attribute__((always_inline)) {
    __builtin_prefetch(at.h + unit * at.stride + kAhead);
    __builtin_prefetch(at.c + unit * at.stride + kAhead);
    const Floats e = one_less_power(gates[2]);
    next.template add<0>();
    const Floats i = 1.0f + power(gates[0]);
    next.template add<1>();
    if (others) finish(unit - 1);
    next.template add<2>();
    const Floats f = 1.0f + power(gates[1]);
    next.template add<3>();
    o = 1.0f + power(gates[3]);
    next.template add<4>();
    // f c + i a over one denominator.
    const Floats ia = i * (2.0f - e), c = load_numbers(narrow, at.c + unit * at.stride);
    next.template add<5>();
    cell = (c * ia + e * f) / (ia * f);
    next.template add<6>();
  };
  Sums<kRows> sums = begin(0);
  sums.template add_all<0, 1, 2, 3, 4, 5, 6>();
  {
    Sums<kRows> next = begin(1);
    advance(0, sums.gates, false, next);
    for (int gate = 0; gate < 4; ++gate) sums.gates[gate] = next.gates[gate];
  }
  for (int unit = 1; unit + 1 < hidden; ++unit) {
    Sums<kRows> next = begin(unit + 1);
    advance(unit, sums.gates, true, next);
    for (int gate = 0; gate < 4; ++gate) sums.gates[gate] = next.gates[gate];
  }
  Sums<0> none{};
  advance(hidden - 1, sums.gates, true, none);
  finish(hidden - 1);
  step.o1 = o1;
  step.o2 = o2;
}

template <int hidden>
inline void move(const Small<hidden>& small, Bits places, const Place& at, const Step& step) {
  const auto& [student, how, of] = small;
  constexpr float kLeast = float(Nominal::kLeastLog * kOfExp);
  constexpr float kMost = float(Nominal::kMostLog * kOfExp);
  const Floats log2 = at_least(splat(kLeast), at_most(kMost, step.o1));
  const Floats factor = of.alpha * power(log2);
  const Floats below = 1.0f + absolute(step.b) * float(1 / Nominal::kSoft);
  Floats out = factor * (step.a + step.o2 * (step.b / below));
  if (how.in_place) out = how.keep * load_numbers(how.narrow_out, at.out) - how.lr * out;
  const Bits random = random_bits(small, places, hidden);
  store_numbers({how.narrow_out, how.stochastic}, out, upper(random), at.out);
}

// --- A piece of a tensor ---

// Vectors whose inputs, and moves, are computed one after another: each alone would wait for itself.
constexpr int kTogether = 4;

template <int hidden, bool narrow>
void steps(const SmallStudent& student, const SmallStep& how, const SmallPiece& piece) {
  OfPiece<hidden> of;
  for (int unit = 0; unit < hidden; ++unit) {
    for (int gate = 0; gate < 4; ++gate) {
      of.bias[unit][gate] = float(kOfGate[gate]) * piece.bias[gate * hidden + unit];
    }
  }
  of.c1 = piece.corrections[0];
  of.c2 = piece.corrections[1];
  of.alpha = student.alpha * piece.corrections[2];
  for (int row = 0; row < hidden + 2; ++row) of.keys[row] = mix(piece.key + row * 0x9e3779b1u);
  const Small<hidden> small{student, how, of};

  const int64_t grads = how.narrow_grad ? 2 : 4, moments = how.narrow_moments ? 2 : 4,
                cells = narrow ? 2 : 4, outs = how.narrow_out ? 2 : 4;
  const auto place_of = [&](int64_t at) {
    const auto from = [&](const void* row, int64_t each) {
      return static_cast<const char*>(row) + at * each;
    };
    const auto to = [&](void* row, int64_t each) { return static_cast<char*>(row) + at * each; };
    return Place{from(piece.grad, grads),   from(piece.m, moments),   from(piece.v, moments),
                 from(piece.h, cells),      from(piece.c, cells),     to(piece.new_m, moments),
                 to(piece.new_v, moments),  to(piece.new_h, cells),   to(piece.new_c, cells),
                 to(piece.out, outs),       piece.stride * cells};
  };
  // The last vector's numbers in memory of its size, where it is not whole; other lanes stay zero.
  alignas(64) char grad[kVectorBytes] = {}, m[kVectorBytes] = {}, v[kVectorBytes] = {},
                   h[hidden * kVectorBytes] = {}, c[hidden * kVectorBytes] = {},
                   out[kVectorBytes] = {};
  const Place last{grad, m, v, h, c, m, v, h, c, out, kVectorBytes};
  const int64_t left = piece.count % kWidth, whole = piece.count - left;
  const Place rest = place_of(whole);
  const auto copy = [&](const char* from, char* to, int64_t each) {
    __builtin_memcpy(to, from, left * each);
  };
  if (left) {
    copy(rest.grad, grad, grads);
    copy(rest.m, m, moments);
    copy(rest.v, v, moments);
    for (int unit = 0; unit < hidden; ++unit) {
      copy(rest.h + unit * rest.stride, h + unit * kVectorBytes, cells);
      copy(rest.c + unit * rest.stride, c + unit * kVectorBytes, cells);
    }
    if (how.in_place) copy(rest.out, out, outs);
  }
  for (int64_t at = 0; at < piece.count; at += kTogether * kWidth) {
    Place places[kTogether];
    Step made[kTogether];
    int together = 0;
    for (int64_t next = at; together < kTogether && next < piece.count; next += kWidth) {
      places[together++] = next < whole ? place_of(next) : last;
    }
    for (int k = 0; k < together; ++k) {
      moments_and_inputs(small, counted(piece.place + at + k * kWidth), places[k], made[k]);
    }
    for (int k = 0; k < together; ++k) {
      units<hidden, narrow>(small, counted(piece.place + at + k * kWidth), places[k], made[k]);
    }
    for (int k = 0; k < together; ++k) {
      move(small, counted(piece.place + at + k * kWidth), places[k], made[k]);
    }
  }
  if (left) {
    copy(m, rest.new_m, moments);
    copy(v, rest.new_v, moments);
    for (int unit = 0; unit < hidden; ++unit) {
      copy(h + unit * kVectorBytes, rest.new_h + unit * rest.stride, cells);
      copy(c + unit * kVectorBytes, rest.new_c + unit * rest.stride, cells);
    }
    copy(out, rest.out, outs);
  }
}

SmallKernel kernel_of(int hidden, bool narrow_cells) {
  switch (hidden) {
    case 4:
      return narrow_cells ? steps<4, true> : steps<4, false>;
    case 8:
      return narrow_cells ? steps<8, true> : steps<8, false>;
    case 16:
      return narrow_cells ? steps<16, true> : steps<16, false>;
    default:
      return nullptr;
  }
}

}  // namespace

SmallKernels small_kernels() { return {kernel_of}; }

}  // namespace amalgam::cpu::AMALGAM_ISA
