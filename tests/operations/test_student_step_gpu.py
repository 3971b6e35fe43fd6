"""``student_step`` by Triton and CUDA, on a GPU or under Triton's interpreter."""

import math

import pytest
import torch
from accuracy import assert_as_accurate, flat
from places import by_cuda, by_triton, needs_gpu
from student_cases import (
    DTYPES,
    SETTINGS,
    check_control,
    check_in_place,
    check_rounding_by_seeds,
    copied,
    draw,
    errors_of_ten_steps,
    make_state,
    make_weights,
    moved,
    nearly,
    of_dtypes,
    skewed_inputs,
    step_in_place,
    two_tensors,
    wanting,
)
from torch import Tensor

from amalgam.operations import registry
from amalgam.operations.kept import Kept
from amalgam.operations.student_step_in_place import InPlaceStep, StudentTensors
from amalgam.ops import (
    StepSettings,
    StudentState,
    initial_state,
    student_step,
    student_step_,
)


@by_triton
@pytest.mark.parametrize(
    ("layers", "hidden", "size"),
    [(2, 20, 0), (2, 20, 1), (2, 20, 64), (2, 20, 200), (1, 4, 63), (3, 5, 65), (1, 33, 31)],
)
def test_triton_step(device: str, size: int, layers: int, hidden: int) -> None:
    forward, backward = [], []
    draws = 30 if size <= 1 else 12 if layers * hidden * size < 1000 else 6
    for seed in range(draws):
        grad, state, weights = skewed_inputs(size, layers, hidden, torch.float32, seed)
        upstream = [draw(*t.shape, seed=seed + 9, dtype=torch.float32) for t in (grad, *state)]
        forward.append(moved((grad, *state, weights, *SETTINGS), device))
        backward.append((moved(upstream, device), *forward[-1]))
    assert_as_accurate(torch.ops.amalgam.student_step, forward, "triton")
    assert_as_accurate(torch.ops.amalgam.student_step_backward, backward, "triton")


CELLS = [torch.float32, torch.bfloat16]
IN_PLACE = [
    *(pytest.param("cuda", *of, cells, marks=needs_gpu) for of in DTYPES for cells in CELLS),
    # Cells are read and written apart from parameters: interpreted, each meet half the dtypes.
    *(pytest.param("cpu", *of, cells) for of, cells in zip(DTYPES, 2 * CELLS, strict=True)),
]


@pytest.mark.parametrize(("device", "dtype", "grad_dtype", "cells"), IN_PLACE, indirect=["device"])
def test_triton_in_place_is_the_references(
    device: str, dtype: torch.dtype, grad_dtype: torch.dtype, cells: torch.dtype
) -> None:
    check_in_place("triton", device, dtype, grad_dtype, cells, 2, 20)


@by_triton
@pytest.mark.parametrize(("layers", "hidden"), [(2, 20), (1, 4)])
def test_triton_adds_three_products_up_to_one(device: str, layers: int, hidden: int) -> None:
    """This is 3xtf32, the default on NVIDIA's GPUs but not of interpreted kernels."""
    forward, backward = [], []
    for seed in range(4 if hidden == 20 else 12):
        grad, state, weights = skewed_inputs(70, layers, hidden, torch.float32, seed)
        upstream = [draw(*t.shape, seed=seed + 9, dtype=torch.float32) for t in (grad, *state)]
        forward.append(moved((grad, *state, weights, *SETTINGS), device))
        backward.append((moved(upstream, device), *forward[-1]))
    assert_as_accurate(torch.ops.amalgam.student_step, forward, "triton:3xtf32")
    assert_as_accurate(torch.ops.amalgam.student_step_backward, backward, "triton:3xtf32")


@by_triton
@pytest.mark.parametrize("hidden", [4, 20])
def test_triton_approximates(device: str, hidden: int) -> None:
    """The interpreter has no approximate instruction and computes tanh precisely."""
    bound = 1e-2 if device == "cuda" else 1e-5
    grad, state, weights = moved(skewed_inputs(70, 2, hidden, torch.float32), device)
    ours = student_step(grad, state, weights, backend="triton:ieee,approximate")
    theirs = student_step(grad, state, weights, backend="reference")
    for one, other in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)


@by_triton
def test_triton_passes_nan_and_infinity_on(device: str) -> None:
    grad, state, weights = skewed_inputs(70, 2, 4, torch.float32)
    grad[3], grad[5], state.c[0, 0, 66] = math.nan, math.inf, math.nan
    grad, state, weights = moved((grad, state, weights), device)
    ours = flat(student_step(grad, state, weights, backend="triton"))
    plain = flat(student_step(grad, state, weights, backend="reference"))
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one.isnan(), other.isnan())


@by_triton
def test_triton_without_eps(device: str) -> None:
    """Places behind the last coordinate once had v = 0: no test had beta2 = eps = 0."""
    grad, state, weights = skewed_inputs(5, 2, 4, torch.float32)
    grad = grad + (grad == 0)
    upstream = [draw(*t.shape, seed=9, dtype=torch.float32) for t in (grad, *state)]
    arguments = moved((upstream, grad, list(state), weights), device)
    upstream, grad, state, weights = arguments
    operation = torch.ops.amalgam.student_step_backward
    settings = StepSettings(beta2=0.0, eps=0.0)
    found = flat(operation(upstream, grad, *state, weights, *settings, "triton"))
    assert all(tensor.isfinite().all() for tensor in found)


@by_triton
def test_triton_takes_strided_inputs_and_repeats_bits(device: str) -> None:
    grad, state, weights = moved(skewed_inputs(300, 2, 4, torch.float32), device)
    spread = [torch.stack((t, t), -1)[..., 0] for t in (grad, *state)]
    assert not spread[3].is_contiguous()
    inputs = wanting(*spread, *weights)
    results = []
    for start in (inputs, wanting(grad, *state, *weights)):
        update, new = student_step(
            start[0], StudentState(*start[1:5]), start[5:], SETTINGS, backend="triton"
        )
        loss = sum(t.square().sum() for t in (update, *new))
        results.append([update, *new, *torch.autograd.grad(loss, start)])
    assert all(map(torch.equal, *results))


@by_triton
def test_triton_packs_kept_weights_once_and_when_they_change(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from amalgam.kernels import lstm_weights

    packs, pack = [], lstm_weights.pack
    monkeypatch.setattr(lstm_weights, "pack", lambda *how: packs.append(how) or pack(*how))
    grad, state, weights = moved(skewed_inputs(70, 2, 4, torch.float32), device)
    owner = Kept()
    for change in (0.0, 0.0, 0.5):
        if change:
            weights[0].add_(change)
        with owner:
            ours = student_step(grad, state, weights, backend="triton")
        theirs = student_step(grad, state, weights, backend="reference")
        torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-5, atol=1e-5)
    assert len(packs) == 2


@by_triton
def test_triton_opcheck(device: str) -> None:
    grad, state, weights = moved(skewed_inputs(5, 2, 4, torch.float32), device)
    inputs = wanting(grad, *state, *weights)
    torch.library.opcheck(
        torch.ops.amalgam.student_step.default, (*inputs[:5], inputs[5:], *SETTINGS, "triton")
    )
    lists, none = [[t] for t in (grad.clone(), grad, *state)], (None, [], 0, [])
    torch.library.opcheck(
        torch.ops.amalgam.student_step_.default,
        (*lists, weights, *SETTINGS, 1.0, 0.0, *none, "triton"),
    )


@by_triton
@pytest.mark.parametrize("hidden", [4, 20])
def test_triton_steps_alike_with_places_of_64_bits(
    device: str, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from amalgam.kernels import student_step, student_step_in_place

    grad, state, weights = moved(skewed_inputs(70, 2, hidden, torch.float32), device)
    upstream = [torch.ones_like(t) for t in (grad, *state)]
    arguments = (grad, *state, weights, *SETTINGS, "triton")
    results = []
    for wide in (False, True):
        for kernels in (student_step, student_step_in_place):
            monkeypatch.setattr(kernels, "wide", lambda *_, wide=wide: wide)
        in_place = two_tensors("triton", device, torch.float32, torch.float32, hidden)
        forward = torch.ops.amalgam.student_step(*arguments)
        backward = torch.ops.amalgam.student_step_backward(upstream, *arguments)
        results.append(flat((in_place, forward, backward)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@needs_gpu
@pytest.mark.usefixtures("triton_works", "cuda_works")
@pytest.mark.parametrize(
    ("backend", "cells", "bound"),
    [
        ("triton:3xtf32", torch.float32, 1e-6),
        ("triton:tf32", torch.float32, 5e-4),
        ("triton:bf16", torch.float32, 5e-3),
        ("cuda:3xtf32", torch.float32, 1e-6),
        ("cuda:tf32", torch.float32, 5e-4),
        ("cuda:tf32,approximate", torch.float32, 1e-3),
        ("cuda:3xtf32", torch.bfloat16, 1e-6),
        ("cuda:tf32", torch.bfloat16, 5e-4),
        ("cuda:bf16,approximate", torch.bfloat16, 5e-3),
    ],
)
def test_steps_many_aligned_coordinates_to_the_same_bits(
    backend: str, cells: torch.dtype, bound: float
) -> None:
    """A warp may overwrite what another has not read yet; the results must not show it."""
    weights = moved(make_weights(2, 20, dtype=torch.float32), "cuda")
    grad, state, _ = moved(skewed_inputs(1 << 14, 2, 20, torch.float32), "cuda")
    narrow = state._replace(h=state.h.to(cells), c=state.c.to(cells))
    results = []
    for _ in range(20):
        param, twin = torch.zeros_like(grad), StudentState(*(t.clone() for t in narrow))
        student_step_([param], [grad], [twin], weights, backend=backend)
        results.append((param, *twin))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    same = narrow._replace(h=narrow.h.float(), c=narrow.c.float())
    theirs, _ = student_step(grad, same, weights, backend="reference")
    torch.testing.assert_close(-results[0][0], theirs, rtol=0, atol=bound)


@needs_gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.usefixtures("triton_works", "cuda_works")
def test_steps_where_places_need_64_bits(backend: str) -> None:
    """h has more than 2^31 numbers; the last coordinates are stepped like any others."""
    n, few = 2**29 + 70, 100
    weights = moved(make_weights(1, 4, dtype=torch.float32), "cuda")
    param, grad = (torch.zeros(n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    ends = [draw(few, seed=seed).bfloat16().cuda() for seed in (1, 2)]
    param[-few:], grad[-few:] = ends
    state = initial_state(param, weights, torch.bfloat16)
    parts = initial_state(ends[0], weights, torch.bfloat16)
    student_step_([param], [grad], [state], weights, backend=backend)
    student_step_([ends[0]], [ends[1]], [parts], weights, backend=backend)
    torch.testing.assert_close(param[-few:], ends[0])
    for whole, part in zip(state, parts, strict=True):
        torch.testing.assert_close(whole[..., -few:], part)


@by_triton
@pytest.mark.parametrize("hidden", [4, 20])
def test_triton_rounds_by_seeds_to_the_same_bits(device: str, hidden: int) -> None:
    # On tensor cores, kernels of other dtypes add in other orders.
    alike = nearly if device == "cuda" and hidden == 20 else torch.equal
    check_rounding_by_seeds("triton", device, hidden, alike)


@by_triton
@pytest.mark.parametrize(("hidden", "cells"), [(4, torch.float32), (20, torch.bfloat16)])
def test_triton_lets_the_device_decide(device: str, hidden: int, cells: torch.dtype) -> None:
    check_control("triton", device, cells, hidden)


@needs_gpu
@pytest.mark.usefixtures("triton_works")
@pytest.mark.parametrize(
    ("permitted", "bound"),
    [("ieee", 1e-5), ("3xtf32", 1e-5), ("tf32", 5e-3), ("bf16", 5e-2), ("tf32,approximate", 1e-2)],
)
def test_triton_errs_no_more_than_permitted(permitted: str, bound: float) -> None:
    assert max(errors_of_ten_steps(f"triton:{permitted}", "cuda", 3000)) <= bound


CUDA_SIZES = [(1, 4), (1, 8), (1, 16), (2, 4), (2, 8), (1, 20), (2, 20)]


@by_cuda
@pytest.mark.parametrize("cells", [torch.float32, torch.bfloat16])
@of_dtypes
@pytest.mark.parametrize(("layers", "hidden"), CUDA_SIZES)
def test_cuda_in_place_is_the_references(
    layers: int,
    hidden: int,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    cells: torch.dtype,
) -> None:
    check_in_place("cuda", "cuda", dtype, grad_dtype, cells, layers, hidden)


@by_cuda
@pytest.mark.parametrize("size", [1, 64, 1000, 4099])
@pytest.mark.parametrize(("layers", "hidden"), CUDA_SIZES)
def test_cuda_errs_as_the_reference(layers: int, hidden: int, size: int) -> None:
    draws = []
    for seed in range(60 if size == 1 else 8):
        inputs = skewed_inputs(size, layers, hidden, torch.float32, seed)
        draws.append(moved((inputs[0], *inputs[1], inputs[2]), "cuda"))
    assert_as_accurate(step_in_place, draws, "cuda")


@by_cuda
@pytest.mark.parametrize(("layers", "hidden"), CUDA_SIZES)
def test_cuda_approximates(layers: int, hidden: int) -> None:
    grad, state, weights = moved(skewed_inputs(1000, layers, hidden, torch.float32), "cuda")
    ours, theirs = (
        step_in_place(grad, *state, weights, name) for name in ("cuda:approximate", "reference")
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    assert not torch.equal(ours[3], theirs[3])


@by_cuda
@pytest.mark.parametrize(
    ("backend", "hidden"), [("cuda", 4), ("cuda", 8), ("cuda", 20), ("cuda:tf32", 20)]
)
def test_cuda_rounds_by_seeds_to_the_same_bits(backend: str, hidden: int) -> None:
    check_rounding_by_seeds(backend, "cuda", hidden)


@by_cuda
@pytest.mark.parametrize(
    ("backend", "hidden"),
    [("cuda", 4), ("cuda", 8), ("cuda", 20), ("cuda:tf32", 20), ("cuda:bf16,approximate", 20)],
)
@pytest.mark.parametrize("cells", [torch.float32, torch.bfloat16])
def test_cuda_lets_the_device_decide(backend: str, hidden: int, cells: torch.dtype) -> None:
    check_control(backend, "cuda", cells, hidden)


@by_cuda
@pytest.mark.parametrize("hidden", [8, 20])
@pytest.mark.parametrize("narrow", [False, True])
def test_cuda_alike_wherever_tensors_begin(narrow: bool, hidden: int) -> None:
    """Unaligned tensors are read a number at a time, and the results have the same bits."""
    dtype = torch.bfloat16 if narrow else torch.float32
    weights = moved(make_weights(1, hidden, dtype=torch.float32), "cuda")
    results = []
    for shift in (0, 1):
        size = 4096 - 3 * shift  # which isn't a multiple of what a thread takes either
        tensors = [draw(4099, seed=seed).to(dtype).cuda()[shift:] for seed in (1, 2)]
        param, grad = (tensor[:size] for tensor in tensors)
        state = moved(make_state(4099, layers=1, hidden=hidden, dtype=torch.float32), "cuda")
        state = StudentState(*(t[..., shift : shift + size].contiguous() for t in state))
        state = state._replace(h=state.h.to(dtype), c=state.c.to(dtype))
        student_step_([param], [grad], [state], weights, backend="cuda")
        results.append([t[..., 1 - shift :][..., :4000] for t in (param, *state)])
    assert all(map(torch.equal, *results))


@by_cuda
@pytest.mark.parametrize("hidden", [4, 20])
@pytest.mark.parametrize("permitted", ["3xtf32", "tf32", "tf32,approximate"])
def test_cuda_passes_nan_and_infinity_on(permitted: str, hidden: int) -> None:
    grad, state, weights = skewed_inputs(72, 2, hidden, torch.float32)
    grad[3], grad[5], state.c[0, 0, 66] = math.nan, math.inf, math.nan
    grad, state, weights = moved((grad, state, weights), "cuda")
    ours, plain = (
        step_in_place(grad, *state, weights, name) for name in (f"cuda:{permitted}", "reference")
    )
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one.isnan(), other.isnan())


@by_cuda
@pytest.mark.parametrize("hidden", [4, 20])
def test_cuda_opcheck(hidden: int) -> None:
    grad, state, weights = moved(skewed_inputs(5, 2, hidden, torch.float32), "cuda")
    lists, none = [[t] for t in (grad.clone(), grad, *state)], (None, [], 0, [])
    torch.library.opcheck(
        torch.ops.amalgam.student_step_.default,
        (*lists, weights, *SETTINGS, 1.0, 0.0, *none, "cuda"),
    )


def in_place_step(grad: Tensor, state: StudentState, weights: list[Tensor]) -> InPlaceStep:
    """A step of one tensor as backends are given it."""
    tensors = StudentTensors([grad.clone()], [state])
    return InPlaceStep(tensors, [grad], weights, SETTINGS, 1.0, 0.0, None, [], 0, [])


@by_cuda
def test_cuda_auto_takes_what_is_compiled_in_and_triton_the_rest() -> None:
    for hidden, expected in ((4, "cuda"), (20, "cuda"), (5, "triton")):
        grad, state, weights = moved(skewed_inputs(5, 2, hidden, torch.float32), "cuda")
        step = in_place_step(grad, state, weights)
        assert registry.resolve("student_step_", "auto", state.m, step) == expected
        student_step_([grad.clone()], [grad], [state], weights)
    with pytest.raises(RuntimeError, match=r"1x4.*, this one is 2x5; backend='triton'"):
        student_step_([grad.clone()], [grad], [state], weights, backend="cuda")


@by_cuda
def test_cuda_leaves_products_in_float32_to_triton() -> None:
    for hidden, expected in ((4, "cuda:ieee"), (20, "triton:ieee")):
        grad, state, weights = moved(skewed_inputs(5, 2, hidden, torch.float32), "cuda")
        step = in_place_step(grad, state, weights)
        assert registry.resolve("student_step_", "auto:ieee", state.m, step) == expected
    with pytest.raises(RuntimeError, match="products on tensor cores, backend='triton:ieee'"):
        student_step_([grad.clone()], [grad], [state], weights, backend="cuda:ieee")


@pytest.mark.parametrize(
    ("permitted", "of_float32", "of_bfloat16"),
    [
        ("", "3xtf32", "3xtf32"),
        ("approximate", "3xtf32", "3xtf32"),
        ("3xtf32,approximate", "3xtf32", "3xtf32"),
        ("tf32", "tf32", "tf32"),
        ("tf32,approximate", "tf32,approximate", "tf32"),
        ("bf16", "tf32", "tf32"),
        ("bf16,approximate", "tf32,approximate", "bf16,approximate"),
    ],
)
def test_cuda_makes_of_permissions_what_is_fastest(
    permitted: str, of_float32: str, of_bfloat16: str
) -> None:
    from amalgam.backends import core, student_step_in_place

    module, _ = core.load()
    if module is None or module.cuda is None:
        pytest.skip("the core here has no CUDA kernels")
    numerics = registry._parse(f"cuda:{permitted}")[1]
    for cells, expected in ((torch.float32, of_float32), (torch.bfloat16, of_bfloat16)):
        for aligned, computed in ((True, expected), (False, "3xtf32")):
            found = student_step_in_place._numerics_of(False, 2, 20, cells, aligned, numerics)
            assert found == registry._parse(f"cuda:{computed}")[1]


@by_cuda
@pytest.mark.parametrize("cells", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("permitted", "bound"),
    [("3xtf32", 1e-5), ("tf32", 5e-3), ("bf16", 5e-2), ("tf32,approximate", 1e-2)]
    + [("bf16,approximate", 5e-2)],
)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("size", [3001, 3008])
def test_cuda_errs_no_more_than_permitted(
    size: int, layers: int, permitted: str, bound: float, cells: torch.dtype
) -> None:
    """States and updates lie in [-1, 1]; ten steps add their errors up."""
    grad, start, weights = skewed_inputs(size, layers, 20, torch.float32)
    start = start._replace(h=start.h.to(cells), c=start.c.to(cells))
    if cells == torch.bfloat16:
        bound += 10 * torch.finfo(cells).eps
    results = []
    for backend, dtype in ((f"cuda:{permitted}", torch.float32), ("reference", torch.float64)):
        state = moved(start, "cuda")
        if backend == "reference":
            state = StudentState(*(t.to(dtype) for t in state))
        param = torch.zeros(size, dtype=dtype, device="cuda")
        for _ in range(10):
            student_step_(
                [param],
                [grad.cuda().to(dtype)],
                [state],
                [w.cuda().to(dtype) for w in weights],
                backend=backend,
            )
        results.append((param, state.h.double()))
    (param, h), (true_param, true_h) = results
    assert (10 * (param - true_param)).abs().max() <= 10 * bound
    assert (h - true_h).abs().max() <= bound


@by_cuda
@pytest.mark.parametrize("cells", [torch.float32, torch.bfloat16])
def test_cuda_steps_tensors_of_many_sizes_at_once(cells: torch.dtype) -> None:
    """There are more tiles than warps, and a warp walks over many tensors."""
    sizes = [1 << 19, 64, *range(1, 200), 8, 1 << 18, 100003, *range(8, 1600, 8)]
    weights = moved(make_weights(2, 20, dtype=torch.float32), "cuda")
    params = [draw(n, seed=1).float().cuda() for n in sizes]
    states = []
    for n in sizes:
        state = moved(make_state(n, hidden=20, dtype=torch.float32), "cuda")
        states.append(state._replace(h=state.h.to(cells), c=state.c.to(cells)))
    alone = [p.clone() for p in params], [copied(state) for state in states]
    student_step_(params, [p * 2 for p in params], states, weights, backend="cuda")
    for param, state in zip(*alone, strict=True):
        student_step_([param], [param * 2], [state], weights, backend="cuda")
    assert all(map(torch.equal, flat((params, states)), flat(alone)))
