"""Every operation, precision and dtype once, against float64, on numbers drawn anew in every run.

A row has, over all outputs, the largest error relative to the output's norm and the largest ratio
to the error that plain PyTorch makes in float32; ``ok`` says whether that is what the precision
claims. Nothing here stops anything.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from gpu.inputs import choice_inputs, nominal_weights, teachers_inputs
from gpu.place import Case, Place, Row, start
from harness import lstm_weights
from torch import Tensor

from amalgam import AmalgamatedOptimizer
from amalgam.ops import StepSettings, StudentState, initial_state
from amalgam.ops import student_step_ as in_place
from amalgam.policies import Student, StudentConfig

SETTINGS = StepSettings(0.1, 0.9, 0.99, 1e-6)
DRAWS = 6
# What a precision claims: as float32 where None, or an error of updates and states relative to the
# norm. Gradients sum over coordinates and through gates: four times that.
CLAIMS = {
    "": None,
    ":ieee": None,
    ":3xtf32": None,
    ":tf32": 5e-3,
    ":bf16": 5e-2,
    ":tf32,approximate": 1e-2,
    ":bf16,approximate": 5e-2,
}
STUDENTS = [(2, 20, 4099), (2, 20, 64), (1, 20, 1000), (1, 8, 513), (1, 4, 63), (3, 5, 65)]
STUDENTS += [(1, 33, 1000), (2, 40, 257)]
NOMINALS = [(1, 4, 4099), (1, 8, 513), (1, 16, 1000), (1, 20, 257), (2, 20, 64)]
SEED = int.from_bytes(os.urandom(3), "little")


def flat(value: Any) -> list[Tensor]:
    """The tensors of a nest of them."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in flat(part)]


def doubled(value: Any) -> Any:
    """The nest with its float32 tensors in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return [doubled(part) for part in value] if isinstance(value, (list, tuple)) else value


def compare(name: str, draws: Sequence[Sequence[Any]], backend: str, claim: float | None) -> Row:
    """One operation's errors against float64, beside those of plain PyTorch in float32.

    Args:
        name: The operation.
        draws: Its arguments, drawn several times: one draw's largest error is one number.
        backend: Whose errors.
        claim: The largest error relative to an output's norm, or ``None`` for twice the largest of
            plain PyTorch, in geometric mean over the draws, as the tests have it.
    """
    operation = getattr(torch.ops.amalgam, name)
    relative, logs = 0.0, {}
    for arguments in draws:
        truth = flat(operation(*doubled(arguments), "reference"))
        plain = flat(operation(*arguments, "reference"))
        ours = flat(operation(*arguments, backend))
        for index, (our, their, true) in enumerate(zip(ours, plain, truth, strict=True)):
            # A gradient that is 0 but for rounding, as of a choice among one, has no such error.
            if not true.numel() or true.abs().max() < 1e-12:
                continue
            unit = torch.finfo(our.dtype).eps * true.abs().max().item()
            errors = [(each.double() - true).abs().max().item() + unit for each in (our, their)]
            logs.setdefault(index, []).append(math.log(errors[0] / errors[1]))
            norm = (our.double() - true).norm().item() / max(true.norm().item(), 1e-30)
            relative = max(relative, norm) if math.isfinite(norm) else math.inf
    ratios = [math.exp(sum(of_output) / len(of_output)) for of_output in logs.values()]
    ratio = max(ratios, default=0.0)
    ok = math.isfinite(relative) and (ratio <= 2 or (claim is not None and relative <= claim))
    return {"relative": float(f"{relative:.3g}"), "ratio": round(ratio, 2), "ok": ok}


def student_inputs(
    place: Place, layers: int, hidden: int, n: int, seed: int, nominal: bool = False
) -> tuple[Any, ...]:
    """A gradient, state and weights of scales that vary by coordinate; of the nominal form's, too.

    Its coordinates are those of three tensors, one of them empty.
    """
    if nominal:
        weights, settings = nominal_weights(place, layers, hidden, (1, 2, 30))
        settings = settings._replace(sizes=[n // 3, 0, n - n // 3])
    else:
        weights = [w.to(place.device) for w in lstm_weights(2, hidden, layers, 1)]
        settings = SETTINGS
    scale = torch.exp(2 * place.draw(n, seed=seed + 7))
    grad = place.draw(n, seed=seed) * scale
    state = StudentState(
        0.5 * place.draw(n, seed=seed + 1) * scale,
        (place.draw(n, seed=seed + 2) * scale).square(),
        place.draw(layers, hidden, n, seed=seed + 3).tanh(),
        place.draw(layers, hidden, n, seed=seed + 4),
    )
    return grad, *state, weights, *settings


def student_case(
    place: Place,
    direction: str,
    shape: tuple[int, int, int],
    words: str,
    claim: float | None,
    nominal: bool = False,
    backend: str = "triton",
) -> Row:
    draws = [student_inputs(place, *shape, SEED + 100 * draw, nominal) for draw in range(DRAWS)]
    if direction == "forward":
        return compare("student_step", draws, f"{backend}{words}", claim)
    backward = []
    for number, arguments in enumerate(draws):
        seed = SEED + 100 * number + 9
        upstream = [place.draw(*t.shape, seed=seed + i) for i, t in enumerate(arguments[:5])]
        backward.append((upstream, *arguments))
    return compare("student_step_backward", backward, f"{backend}{words}", claim and 4 * claim)


def choice_case(
    place: Place,
    direction: str,
    student: tuple[int, int],
    k: int,
    words: str,
    claim: float | None = None,
) -> Row:
    draws = [
        choice_inputs(place, direction, student, k, 1029, SEED + 100 * draw)
        for draw in range(DRAWS)
    ]
    if direction == "forward":
        return compare("choice_step", draws, words, claim)
    return compare("choice_step_backward", draws, words, claim and 4 * claim)


def teachers_case(place: Place, name: str, backend: str, direction: str) -> Row:
    draws = [
        teachers_inputs(place, name, direction, 10_007, SEED + 100 * draw) for draw in range(DRAWS)
    ]
    suffix = "" if direction == "forward" else "_backward"
    return compare(name + suffix, draws, backend, None)


def in_place_case(
    place: Place,
    compiled: str,
    shape: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    cells: torch.dtype,
    kind: str,
    nominal: bool = False,
) -> Row:
    """Two steps over tensors of odd sizes, beside the reference's; bits where rounded by seeds.

    The nominal form's moments are stored as its cells.
    """
    layers, hidden = shape
    if nominal:
        weights, settings = nominal_weights(place, layers, hidden, (1, 2, 30, 3))
    else:
        weights = [w.to(place.device) for w in lstm_weights(2, hidden, layers, 1)]
        settings = SETTINGS
    results = []
    for backend in (compiled, "reference"):
        params, grads, states = [], [], []
        for i, count in enumerate((1000, 1, 33, 4099)):
            params.append(place.draw(count, seed=SEED + i, dtype=dtypes[0]))
            grads.append(place.draw(count, seed=SEED + 50 + i, dtype=dtypes[1]))
            state = initial_state(params[-1], weights, cells)
            if nominal:
                state = state._replace(m=state.m.to(cells), v=state.v.to(cells))
            states.append(state)
        how: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.01, "backend": backend}
        if kind != "plain":
            how["lr"] = torch.tensor(0.5, device=place.device)
            how["steps"] = [torch.full((), 3.0, device=place.device) for _ in params]
            how["skip"] = torch.zeros((), device=place.device)
        if kind == "stochastic":
            how["seeds"] = [7, 8, 9, 10]
        for _ in range(2):
            in_place(params, grads, states, weights, settings, **how)
        results.append((params, states))
    ours, theirs = (flat(result) for result in results)
    eps = max(torch.finfo(dtypes[0]).eps, torch.finfo(cells).eps)
    worst = 0.0
    for our, their in zip(ours, theirs, strict=True):
        scale = their.double().abs().max().clamp(min=1e-30)
        worst = max(worst, ((our.double() - their.double()).abs().max() / scale).item())
    # Rounded at random, a last bit of float32 moves a value by a whole unit of bfloat16 at most.
    bound = 2 * eps if eps > 1e-4 else 2e-5
    return {"relative": float(f"{worst:.3g}"), "ok": math.isfinite(worst) and worst <= bound}


def poisoned(place: Place, words: str, value: float, where: str) -> Row:
    """A bad number in one coordinate comes out there and nowhere else."""
    arguments = list(student_inputs(place, 2, 20, 200, SEED))
    spot = {
        "grad": arguments[0],
        "m": arguments[1],
        "h": arguments[3][0, 3],
        "c": arguments[4][0, 3],
    }
    spot[where][77] = value
    update, m, v, h, c = torch.ops.amalgam.student_step(*arguments, f"triton{words}")
    theirs = flat(torch.ops.amalgam.student_step(*arguments, "reference"))
    same = [
        torch.equal(our.isnan(), their.isnan())
        for our, their in zip((update, m, v, h, c), theirs, strict=True)
    ]
    return {"ok": all(same), "as_reference": same}


def of_weights(place: Place, words: str) -> Row:
    """NaN in one weight reaches every coordinate's update."""
    arguments = student_inputs(place, 2, 20, 200, SEED)
    arguments[5][1][3, 3] = math.nan
    update = torch.ops.amalgam.student_step(*arguments, f"triton{words}")[0]
    arguments[5][1][3, 3] = 0.0
    return {"ok": bool(update.isnan().all())}


def into_case(place: Place, direction: str) -> Row:
    """Steps into memory that is there, as the unrolls take them, beside the functional form."""
    from amalgam.operations.student_step import backward_into, step_into

    grad, *state, weights = student_inputs(place, 2, 20, 1000, SEED)[:6]
    old = StudentState(*state)
    several = grad[None], StudentState(*(t[None] for t in old)), [w[None] for w in weights]
    if direction == "forward":
        out = [torch.full_like(t, math.nan) for t in (grad, *old)]
        targets = out[0][None], StudentState(*(t[None] for t in out[1:]))
        step_into(*targets, *several, SETTINGS, "triton")
        expected = torch.ops.amalgam.student_step(grad, *old, weights, *SETTINGS, "triton")
    else:
        ones = [torch.ones_like(t) for t in (grad, *old)]
        d_state = StudentState(*(t.clone() for t in ones[1:]))
        targets = ones[0][None], StudentState(*(t[None] for t in d_state))
        d_grad, d_weights = backward_into(*targets, *several, SETTINGS, "triton")
        out = [d_grad[0], *d_state, *(weight[0] for weight in d_weights)]
        expected = torch.ops.amalgam.student_step_backward(
            ones, grad, *old, weights, *SETTINGS, "triton"
        )
    return {"ok": all(map(torch.equal, out, flat(expected)))}


def unroll_case(place: Place, words: str, claim: float | None) -> Row:
    steps, draws = 6, []
    for seed in range(SEED, SEED + 100 * DRAWS, 100):
        _grad, *state, weights = student_inputs(place, 2, 20, 1000, seed)[:6]
        grads, adjoints = (
            torch.stack([place.draw(1000, seed=seed + first + t) for t in range(steps)])
            for first in (20, 40)
        )
        draws.append((grads, adjoints, *state, weights, *SETTINGS))
    return compare("student_unroll_backward", draws, f"triton{words}", claim and 4 * claim)


def nominal_unroll_case(place: Place, backend: str) -> Row:
    """Of the nominal form, each of whose steps has biases and corrections of its own."""
    steps, n, draws = 6, 1000, []
    for seed in range(SEED, SEED + 100 * DRAWS, 100):
        _grad, *state, weights = student_inputs(place, 1, 8, n, seed, nominal=True)[:6]
        settings = student_inputs(place, 1, 8, n, seed, nominal=True)[6:]
        alpha, beta1, beta2, eps, corrections, sizes = settings
        weights[2] = torch.stack([weights[2]] * steps)
        grads, adjoints = (
            torch.stack([place.draw(n, seed=seed + first + t) for t in range(steps)])
            for first in (20, 40)
        )
        of_steps = torch.stack([corrections] * steps), sizes
        draws.append((grads, adjoints, *state, weights, alpha, beta1, beta2, eps, *of_steps))
    return compare("student_unroll_backward", draws, backend, None)


def graph_case(place: Place) -> Row:
    """Replays of a captured optimizer step, beside steps that are not captured."""
    if not place.real:
        return {"ok": True, "left_out": "a graph needs a GPU"}
    student = Student(StudentConfig(), generator=torch.Generator().manual_seed(1))
    results = []
    for captured in (False, True):
        params = [place.draw(n, seed=SEED + n).requires_grad_() for n in (1000, 33)]
        for param in params:
            param.grad = place.draw(len(param), seed=SEED + 5)
        optimizer = AmalgamatedOptimizer(params, student=student, capturable=True, warmup_steps=2)
        optimizer.step()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
        for _ in range(6):
            if captured:
                graph.replay()
            else:
                optimizer.step()
        results.append([p.detach().clone() for p in params])
    return {"ok": all(map(torch.equal, *results))}


def cases(place: Place) -> Iterator[tuple[str, Case]]:
    part = functools.partial
    for direction in ("forward", "backward"):
        for (words, claim), shape in ((i, s) for s in STUDENTS for i in CLAIMS.items()):
            if shape[2] != 4099 and words not in ("", ":tf32"):
                continue
            if direction == "backward" and "approximate" in words:
                continue
            label = "{}x{} n={}".format(*shape)
            name = f"student_step {direction} {label} {words[1:] or 'default'}"
            yield name, part(student_case, place, direction, shape, words, claim)
        for shape in NOMINALS:
            for words, claim in CLAIMS.items():
                if words not in ("", ":tf32", ":tf32,approximate"):
                    continue
                if direction == "backward" and "approximate" in words:
                    continue
                label = "{}x{} n={}".format(*shape)
                name = f"nominal student_step {direction} {label} {words[1:] or 'default'}"
                yield name, part(student_case, place, direction, shape, words, claim, True)
        for shape in ((1, 4, 4099), (1, 8, 513)) if place.real else ():
            label = f"nominal student_step {direction} {shape[0]}x{shape[1]} n={shape[2]} cuda"
            yield label, part(student_case, place, direction, shape, "", None, True, "cuda")
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    students = [("triton", (2, 20)), ("triton", (1, 4))]
    if place.real:
        students += [("cuda", (1, 4)), ("cuda", (1, 8)), ("cuda", (1, 16)), ("cuda", (2, 8))]
        students += [("cuda", (1, 20)), ("cuda", (2, 20))]
    for backend, shape in students:
        for kind, dtypes, cells in (
            ("plain", (f32, f32), f32),
            ("plain", (bf16, bf16), bf16),
            ("plain", (f16, f32), f32),
            ("control", (f32, f32), f32),
            ("stochastic", (bf16, f32), bf16),
        ):
            label = f"{shape[0]}x{shape[1]} {kind} " + "/".join(
                str(d).removeprefix("torch.") for d in (*dtypes, cells)
            )
            name = f"student_step_ {label}" + ("" if backend == "triton" else f" {backend}")
            yield name, part(in_place_case, place, backend, shape, dtypes, cells, kind)
    for shape in ((1, 4), (1, 8), (1, 16), (2, 20)):
        for kind, dtypes, cells in (
            ("plain", (f32, f32), f32),
            ("plain", (bf16, bf16), bf16),
            ("stochastic", (bf16, f32), bf16),
        ):
            label = f"{shape[0]}x{shape[1]} {kind} " + "/".join(
                str(d).removeprefix("torch.") for d in (*dtypes, cells)
            )
            case = part(in_place_case, place, "triton", shape, dtypes, cells, kind, True)
            yield f"nominal student_step_ {label}", case
            if place.real and shape != (2, 20):
                case = part(in_place_case, place, "cuda", shape, dtypes, cells, kind, True)
                yield f"nominal student_step_ {label} cuda", case
    for words in ("", ":tf32", ":bf16"):
        for where, value in (
            ("grad", math.nan),
            ("grad", math.inf),
            ("h", math.nan),
            ("c", math.nan),
        ):
            name = f"poisoned {where} {value} {words[1:] or 'default'}"
            yield name, part(poisoned, place, words, value, where)
        yield f"poisoned weight {words[1:] or 'default'}", part(of_weights, place, words)
    for direction in ("forward", "backward"):
        for k, (words, claim) in (
            (k, i) for k in (1, 2, 6) for i in list(CLAIMS.items())[:1] + [(":tf32", 5e-3)]
        ):
            name = f"choice_step {direction} k={k} {words[1:] or 'default'}"
            yield name, part(choice_case, place, direction, (2, 20), k, f"triton{words}", claim)
        for backend in ("triton", "cuda") if place.real else ("triton",):
            for student, k in (((1, 4), 2), ((1, 8), 6)):
                name = f"choice_step {direction} 1x{student[1]} k={k} {backend}"
                yield name, part(choice_case, place, direction, student, k, backend)
        for name, backend in (
            ("teacher_step", "triton"),
            ("teacher_step", "cuda"),
            ("teacher_distance", "triton"),
            ("teacher_distance", "cuda"),
        ):
            if backend == "triton" or place.real:
                label = f"{name} {direction} {backend}"
                yield label, part(teachers_case, place, name, backend, direction)
        yield f"into {direction}", part(into_case, place, direction)
    yield "student_unroll_backward default", part(unroll_case, place, "", None)
    yield "student_unroll_backward tf32", part(unroll_case, place, ":tf32", 5e-3)
    for backend in ("triton", "cuda") if place.real else ("triton",):
        case = part(nominal_unroll_case, place, backend)
        yield f"nominal student_unroll_backward {backend}", case
    yield "an optimizer's step in a graph", part(graph_case, place)


def main() -> None:
    place = start("smoke")
    place.write({"seed": SEED})
    place.run_cases(cases(place))


if __name__ == "__main__":
    main()
