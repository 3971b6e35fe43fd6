"""What the device's arithmetic does, where documents give a bound or say nothing.

The errors of special functions over the numbers that students feed them, and what tensor cores do
to operands and sums: the constants of tests/tensor_cores.py, read off hardware.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from gpu.place import Case, Place, Row, start
from torch import Tensor

COUNT = 1 << 20
FUNCTIONS = {
    "ex2.approx.ftz.f32": (-20.0, 20.0, torch.exp2),
    "rcp.approx.ftz.f32": (1.0, 1e4, torch.reciprocal),
    "tanh.approx.f32": (-8.0, 8.0, torch.tanh),
    "sqrt.approx.f32": (1e-12, 1e4, torch.sqrt),
}


@triton.jit
def special(x, out, BLOCK: tl.constexpr, NAME: tl.constexpr):
    """One PTX instruction on every number."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at)
    if NAME == "ex2.approx.ftz.f32":
        result = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
        )
    elif NAME == "rcp.approx.ftz.f32":
        result = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
        )
    elif NAME == "sqrt.approx.f32":
        result = tl.inline_asm_elementwise(
            "sqrt.approx.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
        )
    tl.store(out + at, result)


@triton.jit
def divided(x, y, out, BLOCK: tl.constexpr):
    """Triton's own division."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at) / tl.load(y + at))


@triton.jit
def multiplied(a, b, c, out, ROWS: tl.constexpr, INNER: tl.constexpr, KIND: tl.constexpr):
    """C + A B on tensor cores."""
    row, k = tl.arange(0, ROWS), tl.arange(0, INNER)
    left = tl.load(a + row[:, None] * INNER + k[None, :])
    right = tl.load(b + k[:, None] * ROWS + row[None, :])
    here = row[:, None] * ROWS + row[None, :]
    if KIND == "bf16":
        result = tl.dot(left.to(tl.bfloat16), right.to(tl.bfloat16), tl.load(c + here))
    else:
        result = tl.dot(left, right, tl.load(c + here), input_precision="tf32")
    tl.store(out + here, result)


def errors(ours: Tensor, truth: Tensor) -> Row:
    """Relative errors, in units of float32's last place at one (2^-23)."""
    there = truth != 0
    ours, truth = ours[there], truth[there]
    error = ((ours.double() - truth) / truth).abs() * 2.0**23
    return {
        "largest_ulp": round(error.max().item(), 4),
        "mean_ulp": round(error.mean().item(), 4),
        "root_mean_square_ulp": round(error.square().mean().sqrt().item(), 4),
        "correctly_rounded": round((ours == truth.float()).double().mean().item(), 4),
    }


def special_case(place: Place, name: str) -> Row:
    least, most, exact = FUNCTIONS[name]
    n = place.size(COUNT)
    x = torch.empty(n, device=place.device)
    x.uniform_(least, most) if least < 0 else x.log_normal_().clamp_(least, most)
    out = torch.empty_like(x)
    special[(n // 1024,)](x, out, BLOCK=1024, NAME=name)
    return errors(out, exact(x.double()))


def division_case(place: Place) -> Row:
    n = place.size(COUNT)
    x, y = (torch.empty(n, device=place.device).uniform_(0.5, 2.0) for _ in "xy")
    out = torch.empty_like(x)
    divided[(n // 1024,)](x, y, out, BLOCK=1024)
    return errors(out, x.double() / y.double())


def product_of(
    place: Place, kind: str, rows: int, left: list[float], right: list[float], first: float
) -> float:
    """One element of first + left . right, the other terms of the inner dimension zero."""
    inner = 16
    a, b = torch.zeros(rows, inner), torch.zeros(inner, rows)
    a[:, : len(left)] = torch.tensor(left)
    b[: len(right)] = torch.tensor(right)[:, None]
    a, b = a.to(place.device), b.to(place.device)
    c = torch.full((rows, rows), first, device=place.device)
    out = torch.full_like(c, torch.nan)
    multiplied[(1,)](a, b, c, out, ROWS=rows, INNER=inner, KIND=kind, num_warps=4)
    assert not place.real or bool((out == out[0, 0]).all())
    return out[0, 0].item()


def tensor_core_case(place: Place, kind: str, rows: int) -> Row:
    """What is kept of small terms beside a one, how they are rounded, and how many at a time.

    Of 64 rows, Triton takes Hopper's wgmma, and of 32, as students have units, mma.sync.
    """
    dot = functools.partial(product_of, place, kind, rows)
    half = 2.0**-12 + 2.0**-11
    found: Row = {"operand 1 + 1.5 x 2^-11, less 1": dot([1 + half], [1.0], -1.0)}
    for bit in (24, 25, 26, 27):
        for count in (1, 2, 4, 8, 16):
            value = dot([2.0**-bit] * count, [1.0] * count, 1.0)
            found[f"1 + {count} x 2^-{bit}, in 2^-23"] = (value - 1) * 2.0**23
    found["1 + 1.5 x 2^-24, in 2^-23"] = (dot([1.5 * 2.0**-24], [1.0], 1.0) - 1) * 2.0**23
    found["-1 - 1.5 x 2^-24, in 2^-23"] = (dot([-1.5 * 2.0**-24], [1.0], -1.0) + 1) * 2.0**23
    # A large term among products: how many others are added together with it.
    for place_of_one in (0, 3, 4, 7, 8, 15):
        terms = [2.0**-25] * 16
        terms[place_of_one] = 1.0
        value = dot(terms, [1.0] * 16, 0.0)
        found[f"15 x 2^-25 and a one at {place_of_one}, in 2^-23"] = (value - 1) * 2.0**23
    return found


def poison_case(place: Place) -> Row:
    """The bits of the NaN that arithmetic makes."""
    n = place.size(1024)
    x = torch.zeros(n, device=place.device)
    out = torch.empty_like(x)
    divided[(1,)](x, x, out, BLOCK=1024)
    bits = out.view(torch.int32)[0].item() & 0xFFFFFFFF
    return {"0 / 0": hex(bits)}


def cases(place: Place) -> list[tuple[str, Case]]:
    part = functools.partial
    return [
        *((name, part(special_case, place, name)) for name in FUNCTIONS),
        ("division", part(division_case, place)),
        *(
            (f"tensor cores, {kind}, {rows} rows", part(tensor_core_case, place, kind, rows))
            for kind in ("tf32", "bf16")
            for rows in (32, 64)
        ),
        ("NaN", part(poison_case, place)),
    ]


def main() -> None:
    place = start("arithmetic")
    place.run_cases(cases(place))


if __name__ == "__main__":
    main()
