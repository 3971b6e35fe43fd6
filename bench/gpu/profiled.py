"""One launch of each kernel that a profiler is to look at, of 2^21 coordinates."""

from __future__ import annotations

import functools

import torch
from gpu.place import Place, Row, start
from gpu.speed import F32, PAPERS, SETTINGS, WAYS, begun, weights_of

from amalgam.ops import student_step_ as in_place

N = 1 << 21


def launched(place: Place, backend: str, cells: torch.dtype, student: tuple[int, int]) -> Row:
    size = place.size(N)
    weights = weights_of(place, student)
    param, grad = place.draw(size, seed=1), place.draw(size, seed=2)
    state = begun(place, param, weights, cells)
    in_place([param], [grad], [state], weights, SETTINGS, backend=backend)
    return {"launched": "in_place", "n": size}


def backwards(place: Place) -> Row:
    size = place.size(N)
    weights = weights_of(place, PAPERS)
    grad = place.draw(size, seed=2)
    state = begun(place, grad, weights, F32)
    ones = [torch.ones_like(t) for t in (grad, *state)]
    torch.ops.amalgam.student_step_backward(ones, grad, *state, weights, *SETTINGS, "triton")
    return {"launched": "backward", "n": size}


def main() -> None:
    place = start("ncu")
    part = functools.partial
    small = ("triton:bf16,approximate", torch.bfloat16)
    place.run_cases(
        [
            ("in place 3xtf32", part(launched, place, *WAYS[0], PAPERS)),
            ("in place tf32,approximate", part(launched, place, *WAYS[2], PAPERS)),
            ("in place bf16,approximate", part(launched, place, *WAYS[4], PAPERS)),
            ("in place 1x4", part(launched, place, *small, (1, 4))),
            ("backward", part(backwards, place)),
        ]
    )


if __name__ == "__main__":
    main()
