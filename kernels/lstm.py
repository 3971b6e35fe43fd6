"""An LSTM on blocks of coordinates, for the operations that hold one.

The formulas are in amalgam/operations/lstm.py.

A block is a matrix (UNITS, BLOCK): units down, coordinates along, so that rows of the state fill
whole sectors and a layer is four matrix products. UNITS is the power of two that tensor cores take;
weights are packed with zeros in the units that do not exist, once for a call or for their owner.
"""

from __future__ import annotations

import triton
import triton.language as tl

from amalgam.kernels.launch import on_nvidia

# Packed weights, all (UNITS, ...) zero-padded, a layer after another, gates i, f, a, o in each:
#   W_ih (4, FEATURES, UNITS) of the first layer, (4, UNITS, UNITS) of the others, a row a unit
#   W_hh (4, UNITS, UNITS)
#   b    (4, UNITS)
# then the head (OUTPUTS, UNITS) and its bias (OUTPUTS,).
#
# FOLDED is for networks whose padding has the room: tensor cores would multiply by zeros there.
# b is then column HIDDEN of W_hh, and the first layer's W_ih its columns HIDDEN + 1, ...; neither
# is stored apart. h gets a row of ones and rows of features to match.


@triton.jit
def sizes_of(
    LAYER: tl.constexpr, FEATURES: tl.constexpr, UNITS: tl.constexpr, FOLDED: tl.constexpr
):
    """Where a layer's W_ih, W_hh and b begin in the packed weights, and what follows them."""
    APART: tl.constexpr = 0 if FOLDED else 4 * UNITS
    FIRST: tl.constexpr = 4 * UNITS * UNITS + (FEATURES + 1) * APART
    OTHER: tl.constexpr = 8 * UNITS * UNITS + APART
    W_IH: tl.constexpr = 0 if LAYER == 0 else FIRST + (LAYER - 1) * OTHER
    W_HH: tl.constexpr = W_IH + (FEATURES * APART if LAYER == 0 else 4 * UNITS * UNITS)
    B: tl.constexpr = W_HH + 4 * UNITS * UNITS
    return W_IH, W_HH, B, B + APART


@triton.jit
def exp2(x, PTX: tl.constexpr):
    """Two to the power of x."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def exp(x, PTX: tl.constexpr):
    """The exponential. tl.exp and division guard denormals, at thrice the price of PTX's own."""
    if PTX:
        return exp2(x * 1.4426950408889634, PTX)
    else:
        return tl.exp(x)


@triton.jit
def sqrt(x, PTX: tl.constexpr):
    """The square root, denormal numbers' too."""
    if PTX:
        return tl.inline_asm_elementwise(
            "sqrt.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.sqrt_rn(x)


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    """1 / x."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def sigmoid(x, PTX: tl.constexpr, APPROXIMATE: tl.constexpr):
    """1 / (1 + exp(-x)); APPROXIMATE: with 11 bits, and x is half the sum: see pack."""
    if APPROXIMATE:
        return 0.5 * tanh(x, PTX, APPROXIMATE) + 0.5
    else:
        return reciprocal(1.0 + exp(-x, PTX), PTX)


@triton.jit
def tanh(x, PTX: tl.constexpr, APPROXIMATE: tl.constexpr):
    """The hyperbolic tangent; APPROXIMATE: with 11 bits, in one instruction where there is one."""
    if APPROXIMATE and PTX:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        far = 1.0 - 2.0 * reciprocal(1.0 + exp(2.0 * x, PTX), PTX)
        # Near zero that difference cancels; this is the minimax polynomial up to 0.6.
        s = x * x
        p = s * -0.005895107518881559 + 0.020795932039618492
        p = p * s - 0.05378381907939911
        p = p * s + 0.13331924378871918
        p = p * s - 0.33333298563957214
        return tl.where(tl.abs(x) < 0.6, x + x * (s * p), far)


@triton.jit
def scaled_sigmoid(t, PTX: tl.constexpr, APPROXIMATE: tl.constexpr):
    """The sigmoid of x, t being -log2(e) x; APPROXIMATE: x / 2."""
    if APPROXIMATE:
        return 0.5 * tanh(t, PTX, APPROXIMATE) + 0.5
    else:
        return reciprocal(1.0 + exp2(t, PTX), PTX)


@triton.jit
def scaled_tanh(t, PTX: tl.constexpr, APPROXIMATE: tl.constexpr):
    """The hyperbolic tangent of x, t being 2 log2(e) x; APPROXIMATE: x itself."""
    if APPROXIMATE:
        return tanh(t, PTX, APPROXIMATE)
    else:
        far = 1.0 - 2.0 * reciprocal(1.0 + exp2(t, PTX), PTX)
        # As in tanh, up to 0.6, with the scale in the coefficients.
        s = t * t
        p = s * -5.107893688615239e-08 + 1.5001599882731683e-06
        p = p * s - 3.23012920932367e-05
        p = p * s + 0.0006666074584105334
        p = p * s - 0.013876012692381166
        p = p * s + 0.34657359027997264
        return tl.where(tl.abs(t) < 1.7312340490667562, t * p, far)


@triton.jit
def four(packed, PTX: tl.constexpr):
    """Four packed numbers, from a multiple of four on; all threads load them."""
    if PTX:
        # Of scalars, Triton makes a load each.
        a, b, c, d = tl.inline_asm_elementwise(
            "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,l",
            [packed.to(tl.int64)], dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True, pack=1,
        )  # fmt: skip
        return a, b, c, d
    else:
        return tl.load(packed), tl.load(packed + 1), tl.load(packed + 2), tl.load(packed + 3)


@triton.jit
def _rounded(x):
    """Rounded to TF32's 11 bits. NaN may become zero, and the largest numbers infinity.

    x - _rounded(x) is NaN in either case, and where x is infinite.
    """
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _to_truncate(x):
    """What tensor cores, which truncate to TF32, turn into the rounded x; NaN stays.

    The NaN that hardware makes is 0x7fffffff, to which nothing can be added.
    """
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits + 0x1000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _split_products(a, low_a, b, sums, RESTS: tl.constexpr):
    """The sums plus the product of a and b, from the part of each that TF32 holds and the rest.

    The product of both rests is computed only with RESTS. The rest of NaN and of infinity is NaN,
    and so is the result. Triton's own tf32x3 guards infinities, at twice the price.
    """
    high_b = _rounded(b)
    # The rest has 12 bits at most: rounding it would err as much as truncation does.
    low_b = b - high_b
    # Begins at zero, as tensor cores truncate when they add: large sums would lose small products.
    total = tl.zeros_like(sums)
    if RESTS:
        total = tl.dot(low_a, low_b, total, input_precision="tf32")
    total = tl.dot(a, low_b, total, input_precision="tf32")
    total = tl.dot(low_a, high_b, total, input_precision="tf32")
    return sums + tl.dot(a, high_b, total, input_precision="tf32")


@triton.jit
def product(a, b, sums, PRECISION: tl.constexpr):
    """The sums plus the matrix product, accumulated in float32."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), sums)
    elif PRECISION == "3xtf32":
        high_a = _rounded(a)
        # One coordinate's gradient may outweigh the others, and its product's error all else.
        return _split_products(high_a, a - high_a, b, sums, True)
    elif PRECISION == "tf32":
        return tl.dot(_to_truncate(a), _to_truncate(b), sums, input_precision="tf32")
    else:
        return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def column(packed, UNITS: tl.constexpr):
    """A number a unit, (UNITS,)."""
    return tl.load(packed + tl.arange(0, UNITS))


@triton.jit
def square(packed, UNITS: tl.constexpr):
    """A matrix of weights between units, (UNITS, UNITS)."""
    unit = tl.arange(0, UNITS)
    return tl.load(packed + unit[:, None] * UNITS + unit[None, :])


@triton.jit
def weights_at(packed, other, UNITS: tl.constexpr, PRECISION: tl.constexpr):
    """A matrix of packed weights, and what TF32 leaves of it, which only 3xtf32 uses."""
    if PRECISION == "bf16":
        weights = square(other, UNITS)
        return weights, weights
    else:
        weights = square(packed, UNITS)
        return weights, square(other, UNITS) if PRECISION == "3xtf32" else weights


@triton.jit
def weighed(
    weights,  # (UNITS, UNITS), with what TF32 leaves of them, as weights_at gives them
    low,
    x,  # (UNITS, BLOCK)
    sums,  # (UNITS, BLOCK)
    PRECISION: tl.constexpr,
    RESTS: tl.constexpr,
):
    """The sums plus the product of the weights with x."""
    if PRECISION == "3xtf32":
        return _split_products(weights, low, x, sums, RESTS)
    elif PRECISION == "tf32":
        return tl.dot(weights, _to_truncate(x), sums, input_precision="tf32")
    else:
        return product(weights, x, sums, PRECISION)


@triton.jit
def gate_sums(
    packed,  # the packed weights
    other,
    x,  # (UNITS, BLOCK) what the layer below gave; unused by the first layer
    h,  # (UNITS, BLOCK) the layer's own h of before
    sums,  # (UNITS, BLOCK) the gate's sums so far
    GATE: tl.constexpr,
    LAYER: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
    FOLDED: tl.constexpr,
    PRECISION: tl.constexpr,
    RESTS: tl.constexpr,
):
    """A gate's sums before its activation, (UNITS, BLOCK)."""
    W_IH, W_HH, B, _END = sizes_of(LAYER, FEATURES, UNITS, FOLDED)
    FROM: tl.constexpr = GATE * UNITS * UNITS
    if not FOLDED:
        sums += column(packed + B + GATE * UNITS, UNITS)[:, None]
    if LAYER > 0:
        weights, low = weights_at(packed + W_IH + FROM, other + W_IH + FROM, UNITS, PRECISION)
        sums = weighed(weights, low, x, sums, PRECISION, False)
    weights, low = weights_at(packed + W_HH + FROM, other + W_HH + FROM, UNITS, PRECISION)
    return weighed(weights, low, h, sums, PRECISION, RESTS)


@triton.jit
def gates_weighed(
    weights,  # in bfloat16, from where the four gates' matrices begin
    x,  # (UNITS, BLOCK)
    i,  # (UNITS, BLOCK) the gates' sums so far
    f,
    a,
    o,
    UNITS: tl.constexpr,
):
    """The gates' sums plus the products of their weights with x.

    All weights' loads are issued before the first is used, since a program has few warps to hide
    their latency. In other precisions the weights take so many registers that it does not pay.
    """
    to_i = square(weights, UNITS)
    to_f = square(weights + UNITS * UNITS, UNITS)
    to_a = square(weights + 2 * UNITS * UNITS, UNITS)
    to_o = square(weights + 3 * UNITS * UNITS, UNITS)
    x = x.to(tl.bfloat16)
    return tl.dot(to_i, x, i), tl.dot(to_f, x, f), tl.dot(to_a, x, a), tl.dot(to_o, x, o)


@triton.jit
def rows_of(LAYER: tl.constexpr, HIDDEN: tl.constexpr, UNITS: tl.constexpr, at, n):
    """Where a layer's rows of (LAYERS, HIDDEN, N) lie: (UNITS, BLOCK) offsets, of at's type."""
    unit = (LAYER * HIDDEN + tl.arange(0, UNITS)).to(at.dtype)
    return unit[:, None] * n + at[None, :]


@triton.jit
def cell(
    packed,  # the packed weights
    other,
    x,  # (UNITS, BLOCK) the layer below's new h; unused by the first layer
    h,  # (UNITS, BLOCK) the layer's own h of before
    c,  # (UNITS, BLOCK) and its c
    i,  # (UNITS, BLOCK) of the first layer, what its gates take of the features; zeros of others
    f,
    a,
    o,
    LAYER: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
    FOLDED: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    RESTS: tl.constexpr,  # whether h has rows so large that what TF32 leaves of both factors counts
):
    """A layer's gates i, f, a, o, its new c, and the tanh of that."""
    if PRECISION == "bf16" and FOLDED:
        W_IH, W_HH, _B, _END = sizes_of(LAYER, FEATURES, UNITS, FOLDED)
        if LAYER > 0:
            i, f, a, o = gates_weighed(other + W_IH, x, i, f, a, o, UNITS)
        i, f, a, o = gates_weighed(other + W_HH, h, i, f, a, o, UNITS)
    else:
        i = gate_sums(packed, other, x, h, i, 0, LAYER, FEATURES, UNITS, FOLDED, PRECISION, RESTS)
        f = gate_sums(packed, other, x, h, f, 1, LAYER, FEATURES, UNITS, FOLDED, PRECISION, RESTS)
        a = gate_sums(packed, other, x, h, a, 2, LAYER, FEATURES, UNITS, FOLDED, PRECISION, RESTS)
        o = gate_sums(packed, other, x, h, o, 3, LAYER, FEATURES, UNITS, FOLDED, PRECISION, RESTS)
    i = sigmoid(i, PTX, APPROXIMATE)
    f = sigmoid(f, PTX, APPROXIMATE)
    a = tanh(a, PTX, APPROXIMATE)
    o = sigmoid(o, PTX, APPROXIMATE)
    c = tl.fma(f, c, i * a)
    return i, f, a, o, c, tanh(c, PTX, APPROXIMATE)


@triton.jit
def add(partial, value, later):
    """Adds to the program's sum so far; ``later`` says whether there is one."""
    total = value.to(tl.float64)
    if later:
        total += tl.load(partial)
    tl.store(partial, total)


@triton.jit
def recurrent_gradients(
    packed,
    other,
    partials,  # this program's sums, as the packed weights
    d_gate,  # (UNITS, BLOCK) of the gate's sum
    x,  # (UNITS, BLOCK)
    h,  # (UNITS, BLOCK)
    d_x,  # (UNITS, BLOCK) gradients in x so far, of layers that have one below
    d_h,  # (UNITS, BLOCK) and in h
    later,
    gate,
    LAYER: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
    FOLDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One gate's part of all gradients but the features'; the weights' go to the program's sums.

    The gate's number is a loop's variable at run time: of the unrolled loop, the compiler mixes the
    gates' loads, and spills.
    """
    W_IH, W_HH, B, _END = sizes_of(LAYER, FEATURES, UNITS, FOLDED)
    unit = tl.arange(0, UNITS)
    matrix = unit[:, None] * UNITS + unit[None, :]
    none = tl.zeros((UNITS, UNITS), tl.float32)

    if not FOLDED:
        add(partials + B + gate * UNITS + unit, tl.sum(d_gate, 1), later)
    w_hh = W_HH + gate * UNITS * UNITS
    add(partials + w_hh + matrix, product(d_gate, tl.trans(h), none, PRECISION), later)
    weights, low = weights_at(packed + w_hh, other + w_hh, UNITS, PRECISION)
    d_h = weighed(tl.trans(weights), tl.trans(low), d_gate, d_h, PRECISION, False)
    if LAYER > 0:
        w_ih = W_IH + gate * UNITS * UNITS
        add(partials + w_ih + matrix, product(d_gate, tl.trans(x), none, PRECISION), later)
        weights, low = weights_at(packed + w_ih, other + w_ih, UNITS, PRECISION)
        d_x = weighed(tl.trans(weights), tl.trans(low), d_gate, d_x, PRECISION, False)
    return d_x, d_h


@triton.jit
def cell_gradients(
    d_x,  # (UNITS, BLOCK) of the layer's new h, by what the layer above or the head takes of it
    d_new_h,  # (LAYERS, HIDDEN, N)
    d_new_c,  # (LAYERS, HIDDEN, N)
    d_c,  # (LAYERS, HIDDEN, N) out
    rows,  # (UNITS, BLOCK) where the layer's rows lie
    used,  # (UNITS, BLOCK) which of them exist
    c,  # (UNITS, BLOCK) the layer's old c
    i,  # (UNITS, BLOCK) its gates, and the tanh of its new c, as cell gives them
    f,
    a,
    o,
    squashed,
):
    """Writes the gradients in the old c, and returns those in the sums of gates i, f, a, o."""
    d_out = d_x + tl.load(d_new_h + rows, mask=used, other=0.0)
    d_cell = tl.load(d_new_c + rows, mask=used, other=0.0)
    d_cell += d_out * o * (1.0 - squashed * squashed)
    tl.store(d_c + rows, d_cell * f, mask=used)
    d_i = d_cell * a * i * (1.0 - i)
    d_f = d_cell * c * f * (1.0 - f)
    d_a = d_cell * i * (1.0 - a * a)
    d_o = d_out * squashed * o * (1.0 - o)
    return d_i, d_f, d_a, d_o


@triton.jit
def of_gate(gate, i, f, a, o):
    """What belongs to a gate, whose number is known at run time."""
    first_three = tl.where(gate == 0, i, tl.where(gate == 1, f, a))
    return tl.where(gate == 3, o, first_three)


def precision_of(precision: str | None) -> str:
    """The precision asked for; by default the fastest that errs as float32 does."""
    return precision or ("3xtf32" if on_nvidia() else "ieee")
