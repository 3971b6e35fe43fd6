"""Each operation's time on the device, beside a copy of the bytes that it has to move.

In the order of what is wanted most, as time may end. ``us`` is a call of its own, host and all, and
``graph_us`` one inside a CUDA graph, without the host; ``share_of_copy`` is what has to be read and
written once, in the latter time, over what a copy of 2 GiB reaches. Compiling is not timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu.inputs import choice_inputs, nominal_weights, teachers_inputs
from gpu.place import (
    Case,
    Place,
    Row,
    configured,
    copy_rate,
    replayed,
    start,
    timed,
    timed_both,
    traffic,
)
from harness import kernel, lstm_weights
from torch import Tensor

from amalgam import AmalgamatedOptimizer
from amalgam.ops import StepSettings, StudentState, initial_state
from amalgam.ops import student_step_ as in_place

SETTINGS = StepSettings()
PAPERS = (2, 20)
F32, BF16 = torch.float32, torch.bfloat16
SHORT = {F32: "float32", BF16: "bfloat16"}
# What the kernels may do, and the dtype of h and c.
WAYS = [
    ("triton", F32),
    ("triton:tf32", F32),
    ("triton:tf32,approximate", F32),
    ("triton:bf16,approximate", F32),
    ("triton:bf16,approximate", BF16),
    ("triton:tf32,approximate", BF16),
    ("triton", BF16),
]
SWEEP = [
    (WAYS[0], PAPERS, ("64x4",)),
    (WAYS[2], PAPERS, ("128x4",)),
    (WAYS[4], PAPERS, ("64x4", "128x4", "256x4")),
]
FUNCTIONAL_SWEEP = [
    ("forward", "triton", ("64x4",)),
    ("forward", "triton:tf32", ("128x4", "128x8", "256x8")),
    ("forward", "triton:bf16", ("128x4", "128x8", "256x8")),
    ("backward", "triton", ("64x4", "128x8")),
    ("backward", "triton:tf32", ("64x4", "128x8")),
]
ON_TENSOR_CORES = [  # of CUDA's kernels; they make no more of other permissions
    ("cuda", F32),
    ("cuda:tf32", F32),
    ("cuda:tf32,approximate", F32),
    ("cuda", BF16),
    ("cuda:tf32", BF16),
    ("cuda:bf16,approximate", BF16),
]
GRAPHED = 10**6  # of more coordinates, the host's part does not show


def weights_of(place: Place, student: tuple[int, int]) -> list[Tensor]:
    layers, hidden = student
    return [w.to(place.device) for w in lstm_weights(2, hidden, layers, 1)]


def begun(place: Place, like: Tensor, weights: list[Tensor], cells: torch.dtype) -> StudentState:
    """A state that is not zero: zeros can be faster than what is trained on."""
    state = initial_state(like, weights, cells)
    state.v.fill_(1.0)
    for cell in (state.h, state.c):
        cell.uniform_(-0.9, 0.9)
    return state


def asks_for_64_bits(
    place: Place, student: tuple[int, int], n: int, call: Callable[[], object]
) -> None:
    """On the stand-in, have the kernel for so many coordinates compiled too."""
    from amalgam.kernels import student_step_in_place as kernels

    if place.real or student[0] * student[1] * n < 2**31 - 2**20:
        return
    narrow = kernels.wide
    kernels.wide = lambda *tensors: True
    try:
        call()
    finally:
        kernels.wide = narrow


def copy_case(place: Place) -> Row:
    return {"gb_per_s": round(copy_rate(place) / 1e9, 1)}


def adamw_case(place: Place, n: int, kind: str) -> Row:
    size = place.size(n)
    param = place.draw(size, seed=1).requires_grad_()
    param.grad = place.draw(size, seed=2)
    optimizer = torch.optim.AdamW([param], capturable=place.real, **{kind: True})
    row: Row = {"operation": f"AdamW {kind}", "n": size}
    return row | timed_both(place, optimizer.step, size, 28 * size)


def in_place_case(
    place: Place,
    way: tuple[str, torch.dtype],
    student: tuple[int, int],
    n: int,
    kind: str = "plain",
    configuration: str | None = None,
) -> Row:
    """A step in place of one tensor; with bfloat16 cells and "stochastic", its parameter too."""
    (backend, cells), size = way, place.size(n)
    weights = weights_of(place, student)
    dtype = BF16 if kind == "stochastic" else F32
    param, grad = place.draw(size, seed=1, dtype=dtype), place.draw(size, seed=2)
    state = begun(place, param, weights, cells)
    how: dict[str, Any] = {"lr": 1e-3, "backend": backend}
    if kind == "stochastic":
        how["seeds"] = [3]
    if kind in ("stochastic", "capturable"):
        how["steps"] = [torch.full((), 5.0, device=place.device)]
        how["lr"] = torch.tensor(1e-3, device=place.device)

    def call() -> None:
        in_place([param], [grad], [state], weights, SETTINGS, **how)

    units = student[0] * student[1]
    moved = size * (16 + 4 * units * cells.itemsize + grad.itemsize + 2 * param.itemsize)
    row: Row = {
        "operation": "student_step_",
        "backend": backend,
        "student": "x".join(map(str, student)),
        "cells": SHORT[cells],
        "kind": kind,
        "n": size,
        "configuration": configuration,
    }
    with configured("student_step_", configuration):
        asks_for_64_bits(place, student, n, call)
        return row | timed_both(place, call, size, moved)


def nominal_case(
    place: Place,
    way: tuple[str, torch.dtype],
    student: tuple[int, int],
    n: int,
    kind: str = "plain",
    configuration: str | None = None,
) -> Row:
    """A step in place of the nominal form, of one tensor, with moments stored as the cells."""
    (backend, cells), size = way, place.size(n)
    weights, settings = nominal_weights(place, *student, (30,))
    param, grad = place.draw(size, seed=1), place.draw(size, seed=2)
    state = begun(place, param, weights, cells)
    state = state._replace(m=state.m.to(cells), v=state.v.to(cells))
    how: dict[str, Any] = {"lr": 1e-3, "backend": backend}
    if kind == "stochastic":
        how["seeds"] = [3]
        how["steps"] = [torch.full((), 5.0, device=place.device)]
        how["lr"] = torch.tensor(1e-3, device=place.device)

    def call() -> None:
        in_place([param], [grad], [state], weights, settings, **how)

    units = student[0] * student[1]
    moved = size * (12 + (4 + 4 * units) * cells.itemsize)
    row: Row = {
        "operation": "student_step_",
        "form": "nominal",
        "backend": backend,
        "student": "x".join(map(str, student)),
        "cells": SHORT[cells],
        "moments": SHORT[cells],
        "kind": kind,
        "n": size,
        "configuration": configuration,
    }
    with configured("student_step_", configuration):
        asks_for_64_bits(place, student, n, call)
        return row | timed_both(place, call, size, moved)


def functional_case(
    place: Place,
    direction: str,
    words: str,
    student: tuple[int, int],
    n: int,
    configuration: str | None = None,
    nominal: bool = False,
) -> Row:
    size = place.size(n)
    name = "student_step" if direction == "forward" else "student_step_backward"
    weights, settings = weights_of(place, student), SETTINGS
    if nominal:
        weights, settings = nominal_weights(place, *student, (30,))
        settings = settings._replace(sizes=[size])
    grad = place.draw(size, seed=2)
    state = begun(place, grad, weights, F32)
    step = (grad, *state, weights, *settings)
    arguments: tuple[Any, ...] = step
    if direction == "backward":
        arguments = ([torch.ones_like(t) for t in (grad, *state)], *step)
    operation = getattr(torch.ops.amalgam, name)

    def call() -> None:
        operation(*arguments, words)

    states = (1 if direction == "forward" else 2) * 4 * student[0] * student[1] * 4
    moved = size * (states + (24 if direction == "forward" else 44))
    row: Row = {
        "operation": name,
        "backend": words,
        "form": "nominal" if nominal else "RNNProp",
        "student": "x".join(map(str, student)),
        "n": size,
        "configuration": configuration,
    }
    with configured(name, configuration):
        return row | timed_both(place, call, size, moved)


def choice_case(
    place: Place, direction: str, words: str, student: tuple[int, int], k: int, n: int
) -> Row:
    size, (layers, hidden) = place.size(n), student
    step = choice_inputs(place, direction, student, k, size, 1)
    name = "choice_step" if direction == "forward" else "choice_step_backward"
    operation = getattr(torch.ops.amalgam, name)
    times = timed(place, lambda: operation(*step, words))
    states = (1 if direction == "forward" else 2) * 4 * layers * hidden * 4
    moved = size * (states + (16 + 20 * k if direction == "forward" else 24 + 36 * k))
    row = {
        "operation": name,
        "backend": words,
        "student": "x".join(map(str, student)),
        "teachers": k,
        "n": size,
        **times.row(),
    }
    row["ns_per_coordinate"] = round(1e9 * times.median / size, 4)
    return row | traffic(place, times, moved)


def teachers_case(place: Place, name: str, direction: str, backend: str, n: int) -> Row:
    k, size = 6, place.size(n)
    arguments = teachers_inputs(place, name, direction, size, 1)
    # Rows of teachers that are read and written; of a distance, the student's row beside.
    rows = 6 * k if name == "teacher_step" else k + 1
    if direction == "backward":
        rows = 9 * k if name == "teacher_step" else 2 * rows
        name += "_backward"
    operation = getattr(torch.ops.amalgam, name)
    times = timed(place, lambda: operation(*arguments, backend))
    row = {"operation": name, "backend": backend, "teachers": k, "n": size, **times.row()}
    if n <= GRAPHED:
        row |= replayed(place, lambda: operation(*arguments, backend)).row("graph_")
    return row | traffic(place, times, 4 * size * rows)


def unroll_case(
    place: Place, words: str, n: int, steps: int, nominal: tuple[int, int] | None = None
) -> Row:
    """Of the paper's student, or of the nominal form of so many layers and units."""
    size = place.size(n)
    weights, settings = weights_of(place, PAPERS), SETTINGS
    if nominal:
        weights, settings = nominal_weights(place, *nominal, (30,))
        weights[2] = torch.stack([weights[2]] * steps)
        assert settings.corrections is not None
        corrections = torch.stack([settings.corrections] * steps)
        settings = settings._replace(corrections=corrections, sizes=[size])
    grads, adjoints = (place.draw(steps, size, seed=i) for i in (1, 2))
    state = begun(place, grads[0], weights, F32)
    arguments = (grads, adjoints, *state, weights, *settings, words)
    times = timed(place, lambda: torch.ops.amalgam.student_unroll_backward(*arguments))
    each = round(1e9 * times.median / size / steps, 4)
    row: Row = {"operation": "student_unroll_backward", "backend": words, "n": size, "steps": steps}
    row["student"] = "x".join(map(str, nominal or PAPERS))
    row["form"] = "nominal" if nominal else "RNNProp"
    return row | times.row() | {"ns_per_coordinate_and_step": each}


def many_case(place: Place, rival: str) -> Row:
    """A step of 1,000 parameters of 100 elements: what each tensor costs."""
    count, each = 1000 if place.real else 20, 100
    values, slopes = place.draw(count * each, seed=1), place.draw(count * each, seed=2)
    params = [part.clone().requires_grad_() for part in values.split(each)]
    grads = [part.clone() for part in slopes.split(each)]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    if rival.startswith("AdamW"):
        kind = rival.split()[1]
        step: Callable[[], object] = torch.optim.AdamW(
            params, capturable=place.real, **{kind: True}
        ).step
    else:
        step = AmalgamatedOptimizer(
            params, backend=rival, capturable=True, warmup_steps=0, lr=1e-3
        ).step
    row: Row = {"operation": "step of 1,000 tensors of 100", "backend": rival, "n": count * each}
    row |= timed(place, step).row()
    return row | replayed(place, step, 1).row("graph_")


def rival_case(place: Place, kind: str, n: int) -> Row:
    """The step as plain PyTorch has it, eager or through torch.compile."""
    size = place.size(n)
    weights = weights_of(place, PAPERS)
    param, grad = place.draw(size, seed=1), place.draw(size, seed=2)
    state = begun(place, param, weights, F32)
    function = kernel("student_step", "reference" if kind == "eager" else "compiled")

    def call() -> None:
        with torch.no_grad():
            update, new = function(grad, state, weights, SETTINGS)
            param.sub_(update)
            for old, value in zip(state, new, strict=True):
                old.copy_(value)

    times = timed(place, call)
    row = {"operation": "student_step_", "backend": kind, "student": "2x20", "n": size}
    row |= times.row() | {"ns_per_coordinate": round(1e9 * times.median / size, 4)}
    return row | traffic(place, times, 668 * size)


def cases(place: Place) -> Iterator[tuple[str, Case]]:
    part = functools.partial

    def ours(way: Any, student: tuple[int, int], n: int, kind: str = "plain") -> tuple[str, Case]:
        label = f"{way[0]} {student[0]}x{student[1]} {SHORT[way[1]]} {kind} n={n}"
        return f"in place {label}", part(in_place_case, place, way, student, n, kind)

    yield "copy", part(copy_case, place)
    yield "AdamW fused n=10000000", part(adamw_case, place, 10**7, "fused")
    tiled = ON_TENSOR_CORES if place.real else []
    for way in (*WAYS, *tiled):
        yield ours(way, PAPERS, 10**7)
    for way in tiled:
        yield ours(way, (1, 20), 10**7)
    for student in ((1, 4), (1, 8), (1, 16), (1, 20)):
        yield ours(("triton:bf16,approximate", BF16), student, 10**7)
        yield ours(("triton", F32), student, 10**7)
        if place.real and student != (1, 20):
            for way in (("cuda:approximate", BF16), ("cuda", BF16), ("cuda", F32)):
                yield ours(way, student, 10**7)
                yield ours(way, student, 10**4)
    for student in ((1, 4), (1, 8), (1, 16)):
        for way, kind in (
            (("triton", BF16), "plain"),
            (("triton:bf16,approximate", BF16), "plain"),
            (("triton:bf16,approximate", BF16), "stochastic"),
            (("triton", BF16), "stochastic"),
            (("triton", F32), "plain"),
        ):
            label = f"{way[0]} {student[0]}x{student[1]} {SHORT[way[1]]} {kind} n=10000000"
            yield f"in place nominal {label}", part(nominal_case, place, way, student, 10**7, kind)
        for way, kind in (
            (("cuda", BF16), "plain"),
            (("cuda:approximate", BF16), "plain"),
            (("cuda:approximate", BF16), "stochastic"),
            (("cuda", F32), "plain"),
        ):
            if place.real:
                label = f"{way[0]} {student[0]}x{student[1]} {SHORT[way[1]]} {kind} n=10000000"
                case = part(nominal_case, place, way, student, 10**7, kind)
                yield f"in place nominal {label}", case
    for student in ((1, 4), (1, 8)):
        for how in ("512x4", "256x4", "1024x4"):
            case = part(nominal_case, place, ("triton", BF16), student, 10**7, "plain", how)
            yield f"configuration in place nominal {student[0]}x{student[1]} {how}", case
    yield "AdamW fused n=100000000", part(adamw_case, place, 10**8, "fused")
    for way in (*WAYS, *tiled):
        yield ours(way, PAPERS, 10**8)
    for kind in ("capturable", "stochastic"):
        for way in tiled[-1:]:
            yield ours(way, PAPERS, 10**7, kind)
        yield ours(("triton:bf16,approximate", BF16), PAPERS, 10**7, kind)
        yield ours(("triton:bf16,approximate", BF16), (1, 4), 10**7, kind)
    for n in (10**6, 10**7):
        for direction in ("forward", "backward"):
            for words in ("triton", "triton:tf32", "triton:bf16"):
                label = f"{direction} {words} 2x20 n={n}"
                yield label, part(functional_case, place, direction, words, PAPERS, n)
    for direction in ("forward", "backward"):
        for words in ("triton", "cuda") if place.real else ("triton",):
            for student in ((1, 4), (1, 8)):
                case = part(functional_case, place, direction, words, student, 10**6, None, True)
                yield f"{direction} nominal {words} 1x{student[1]} n=1000000", case
    for n in (10**4, 10**5, 10**6):
        for kind in ("fused", "foreach"):
            yield f"AdamW {kind} n={n}", part(adamw_case, place, n, kind)
        for way in (WAYS[0], WAYS[2], WAYS[4], *tiled[::2], *tiled[-1:]):
            yield ours(way, PAPERS, n)
    for direction in ("forward", "backward"):
        yield (
            f"{direction} triton 2x20 n=10000",
            part(functional_case, place, direction, "triton", PAPERS, 10**4),
        )
    for rival in ("triton", *(["cuda"] if place.real else []), "AdamW fused", "AdamW foreach"):
        yield f"1,000 tensors {rival}", part(many_case, place, rival)
    # How many coordinates a program takes, and by how many warps.
    for way, student, configurations in SWEEP:
        for how in configurations:
            label = f"{way[0]} {student[0]}x{student[1]} {SHORT[way[1]]} {how}"
            case = part(in_place_case, place, way, student, 10**7, "plain", how)
            yield f"configuration in place {label}", case
    for direction, words, configurations in FUNCTIONAL_SWEEP:
        for how in configurations:
            case = part(functional_case, place, direction, words, PAPERS, 10**6, how)
            yield f"configuration {direction} {words} {how}", case
    for direction in ("forward", "backward"):
        for k in (2, 6):
            for words in ("triton", "triton:tf32"):
                name = f"choice {direction} {words} k={k}"
                yield name, part(choice_case, place, direction, words, PAPERS, k, 10**6)
            for words in ("triton", "cuda") if place.real else ("triton",):
                for student in ((1, 4), (1, 8)):
                    name = f"choice {direction} {words} 1x{student[1]} k={k}"
                    yield name, part(choice_case, place, direction, words, student, k, 10**6)
    for n in (10**4, 10**7):
        for direction in ("forward", "backward"):
            for name, backend in (
                ("teacher_step", "triton"),
                ("teacher_step", "cuda"),
                ("teacher_distance", "triton"),
                ("teacher_distance", "cuda"),
                ("teacher_distance", "reference"),
            ):
                if place.real or backend != "cuda":
                    label = f"{name} {direction} {backend} n={n}"
                    yield label, part(teachers_case, place, name, direction, backend, n)
    for n, steps in ((10**5, 20), (10**6, 20)):
        yield f"unroll n={n} T={steps}", part(unroll_case, place, "triton", n, steps)
    for words in ("triton", "cuda") if place.real else ("triton",):
        for units in (4, 8):
            case = part(unroll_case, place, words, 10**5, 20, (1, units))
            yield f"unroll nominal {words} 1x{units} n=100000 T=20", case
    yield "eager n=1000000", part(rival_case, place, "eager", 10**6)
    if place.real:  # elsewhere it would time the compiler of another machine
        yield "torch.compile n=1000000", part(rival_case, place, "compiled", 10**6)


def main() -> None:
    place = start("speed")
    place.run_cases(cases(place))


if __name__ == "__main__":
    main()
