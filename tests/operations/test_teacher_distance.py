from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import assert_at_most_twice, errors_of, kept
from machine_code import (
    MachineCode,
    assert_cuda_within,
    assert_within,
    budgets,
    compile_kernel,
)
from places import INTERPRETED, ON_CPU, ON_CPU_ONCE, ON_HOST, at, compiled, of_each, on_gpus
from torch import Tensor

from amalgam.operations.registry import BackendError
from amalgam.operations.teacher_distance import distances_and_slope
from amalgam.ops import teacher_distance

GOLDEN = Path(__file__).parents[1] / "golden" / "losses_and_perturbations.npz"
SIZES = [0, 1, 2, 31, 32, 33, 63, 1000, 1025, 1027, 65537]
POOLS = [0, 1, 2, 6]
EPS = 1e-10

GPUS = on_gpus("triton", "cuda")

everywhere = at(*ON_CPU, *GPUS, *INTERPRETED, *ON_HOST)
# The interpreter takes minutes for numerical gradients; one instruction set is enough for them.
compiled_once = at(*ON_CPU_ONCE, *GPUS)
BUDGETS, CUDA_BUDGETS = budgets("teacher_distance")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
hubers = pytest.mark.parametrize("huber_delta", [None, 0.01])


def _values(*shape: int, dtype: torch.dtype, skewed: bool, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, dtype=torch.float64, generator=generator)
    if skewed:
        values *= 10 ** (8 * torch.rand(*shape, dtype=torch.float64, generator=generator) - 4)
    return values.to(dtype)


def _truth(
    student: Tensor, teachers: Tensor, grad: Tensor, huber_delta: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances and both gradients in the platform's long double."""
    s, t, g = (x.detach().cpu().double().numpy().astype(np.longdouble) for x in
               (student, teachers, grad))  # fmt: skip
    difference = s - t
    penalty, slope = difference * difference / 2, difference
    if huber_delta is not None:
        delta = np.longdouble(huber_delta)
        size = np.abs(difference)
        penalty = np.where(size < delta, penalty, delta * (size - delta / 2))
        slope = np.clip(difference, -delta, delta)
    total = penalty.sum(1) + np.longdouble(EPS)
    weighted = (g / total)[:, None] * slope
    return np.log(total) - np.log(np.longdouble(max(len(s), 1))), weighted.sum(0), -weighted


def _run(
    student: Tensor, teachers: Tensor, grad: Tensor, huber_delta: float | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    student = student.detach().requires_grad_()
    teachers = teachers.detach().requires_grad_()
    distances = teacher_distance(
        student, teachers, eps=EPS, huber_delta=huber_delta, backend=backend
    )
    gradients = torch.autograd.grad(distances, (student, teachers), grad)
    return distances.detach(), *gradients


def _assert_accurate(
    student: Tensor, teachers: Tensor, huber_delta: float | None, backend: str
) -> None:
    """The rule of accuracy.py, of one draw.

    Where PyTorch rounds luckily its error is 0, so one evaluation of the formula may round as often
    as it has operations, half a unit in the last place each: a gradient's sum, + eps, quotient,
    difference and product; and a distance's difference and square, whose relative error the log
    makes absolute, and the result's own.
    """
    grad = _values(teachers.shape[0], dtype=student.dtype, skewed=False, seed=teachers.shape[0]).to(
        student.device
    )
    results = _run(student, teachers, grad, huber_delta, backend)
    plain = kept(_run, student, teachers, grad, huber_delta, "reference")
    truths = kept(_truth, student, teachers, grad, huber_delta)
    for name, ours, theirs, truth in zip(
        ("distances", "in_student", "in_teachers"), results, plain, truths, strict=True
    ):
        assert ours.dtype == student.dtype
        scale = float(np.abs(truth).max(initial=0))
        roundings = 1 + scale if name == "distances" else 2.5 * scale
        unit = torch.finfo(student.dtype).eps * roundings
        assert_at_most_twice(name, [errors_of(ours, theirs, truth, unit)])


def _places_of(n: int) -> list[Any]:
    """The interpreter takes a minute for 65537 coordinates, and all others are one masked block.

    4099, of another test, are three blocks, and two of CUDA's.
    """
    places = [*ON_CPU, *GPUS, *([*INTERPRETED, *ON_HOST] if n in (0, 1, 33, 1027) else ())]
    return [pytest.param(*p.values, n, id=f"{p.id}-{n}", marks=p.marks) for p in places]


def of_sizes(sizes: Sequence[int]) -> pytest.MarkDecorator:
    """Every place, with the sizes that it computes in seconds."""
    places = [place for n in sizes for place in _places_of(n)]
    return pytest.mark.parametrize(("backend", "device", "n"), places, indirect=["backend"])


@of_sizes(SIZES)
@dtypes
@hubers
@pytest.mark.parametrize("k", POOLS)
def test_accuracy(
    backend: str, device: str, dtype: torch.dtype, huber_delta: float | None, k: int, n: int
) -> None:
    student = _values(n, dtype=dtype, skewed=False, seed=n).to(device)
    teachers = _values(k, n, dtype=dtype, skewed=False, seed=n + 1).to(device)
    _assert_accurate(student, teachers, huber_delta, backend)


@of_sizes([33, 1027, 65537])
@dtypes
@hubers
def test_accuracy_over_eight_decades(
    backend: str, device: str, dtype: torch.dtype, huber_delta: float | None, n: int
) -> None:
    student = _values(n, dtype=dtype, skewed=True, seed=1).to(device)
    teachers = _values(6, n, dtype=dtype, skewed=True, seed=2).to(device)
    _assert_accurate(student, teachers, huber_delta, backend)


@everywhere
@dtypes
@hubers
def test_zeros_and_identical_vectors(
    backend: str, device: str, dtype: torch.dtype, huber_delta: float | None
) -> None:
    student = _values(1027, dtype=dtype, skewed=True, seed=3).to(device)
    _assert_accurate(student, student.expand(2, -1), huber_delta, backend)
    zeros = torch.zeros_like(student)
    _assert_accurate(zeros, torch.stack([zeros, student]), huber_delta, backend)


@everywhere
@hubers
def test_non_contiguous_inputs(backend: str, device: str, huber_delta: float | None) -> None:
    student = _values(2 * 1027, dtype=torch.float32, skewed=False, seed=4).to(device)[::2]
    teachers = _values(1027, 3, dtype=torch.float32, skewed=False, seed=5).to(device).T
    assert not student.is_contiguous()
    assert not teachers.is_contiguous()
    results = _run(student, teachers, torch.ones(1, device=device).expand(3), huber_delta, backend)
    packed = _run(
        student.contiguous(),
        teachers.contiguous(),
        torch.ones(3, device=device),
        huber_delta,
        backend,
    )
    for ours, expected in zip(results, packed, strict=True):
        assert torch.equal(ours, expected)


@everywhere
def test_addresses_that_no_wide_load_can_use(backend: str, device: str) -> None:
    numbers = _values(4 * 4099 + 1, dtype=torch.float32, skewed=False, seed=6).to(device)
    _assert_accurate(numbers[1:4100], numbers[4100:].view(3, 4099), None, backend)


@everywhere
@hubers
@pytest.mark.parametrize("n", [33, 1027])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_inputs_propagate_as_in_pytorch(
    backend: str, device: str, huber_delta: float | None, n: int, bad: float
) -> None:
    for where in (0, n - 1):
        student = _values(n, dtype=torch.float32, skewed=False, seed=7).to(device)
        teachers = _values(3, n, dtype=torch.float32, skewed=False, seed=8).to(device)
        teachers[1, where] = bad
        teachers[2, where] = bad
        for in_student in (False, True):
            if in_student:
                student[where] = bad
            grad = torch.ones(3, device=device)
            results = _run(student, teachers, grad, huber_delta, backend)
            # Autograd of the reference is no truth here: torch.where's makes NaN of 0 * inf.
            distances, total = torch.ops.amalgam.teacher_distance(
                student, teachers, EPS, huber_delta, "reference"
            )
            gradients = torch.ops.amalgam.teacher_distance_backward(
                grad, student, teachers, total, EPS, huber_delta, True, "reference"
            )
            for ours, theirs in zip(results, (distances, *gradients), strict=True):
                torch.testing.assert_close(ours, theirs, equal_nan=True)


@everywhere
@hubers
def test_only_the_gradients_asked_for(backend: str, device: str, huber_delta: float | None) -> None:
    student = _values(1027, dtype=torch.float64, skewed=False, seed=9).to(device)
    teachers = _values(2, 1027, dtype=torch.float64, skewed=False, seed=10).to(device)
    grad = torch.ones(2, dtype=torch.float64, device=device)
    _, in_student, in_teachers = _run(student, teachers, grad, huber_delta, backend)

    alone = student.clone().requires_grad_()
    distances = teacher_distance(alone, teachers, huber_delta=huber_delta, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(distances, alone, grad)[0], in_student)

    alone = teachers.clone().requires_grad_()
    distances = teacher_distance(student, alone, huber_delta=huber_delta, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(distances, alone, grad)[0], in_teachers)


@compiled_once
@hubers
def test_gradcheck(backend: str, device: str, huber_delta: float | None) -> None:
    student = _values(35, dtype=torch.float64, skewed=False, seed=11).to(device).requires_grad_()
    teachers = _values(3, 35, dtype=torch.float64, skewed=False, seed=12).to(device)
    assert torch.autograd.gradcheck(
        lambda s, t: teacher_distance(s, t, huber_delta=huber_delta, backend=backend),
        (student, teachers.requires_grad_()),
    )


@at(*ON_CPU_ONCE, *GPUS, *INTERPRETED)
@hubers
def test_opcheck(backend: str, device: str, huber_delta: float | None) -> None:
    student = _values(33, dtype=torch.float32, skewed=False, seed=13).to(device)
    teachers = _values(2, 33, dtype=torch.float32, skewed=False, seed=14).to(device)
    grad, total = torch.ones(2, device=device), torch.full((2,), 3.0, device=device)
    torch.library.opcheck(
        torch.ops.amalgam.teacher_distance.default,
        (student.requires_grad_(), teachers.requires_grad_(), EPS, huber_delta, backend),
    )
    for need_teachers in (False, True):
        torch.library.opcheck(
            torch.ops.amalgam.teacher_distance_backward.default,
            (grad, student.detach(), teachers.detach(), total, EPS, huber_delta, need_teachers,
             backend),
        )  # fmt: skip


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@compiled
@dtypes
@hubers
@pytest.mark.usefixtures("threads")
def test_same_bits_for_any_number_of_threads(
    backend: str, dtype: torch.dtype, huber_delta: float | None
) -> None:
    student = _values(5 * 65537, dtype=dtype, skewed=False, seed=15)
    teachers = _values(3, 5 * 65537, dtype=dtype, skewed=False, seed=16)
    grad = torch.ones(3, dtype=dtype)
    torch.set_num_threads(1)
    alone = _run(student, teachers, grad, huber_delta, backend)
    for count in (2, 3):
        torch.set_num_threads(count)
        for ours, expected in zip(
            _run(student, teachers, grad, huber_delta, backend), alone, strict=True
        ):
            assert torch.equal(ours, expected)


@at(*GPUS)
def test_same_bits_again_and_on_another_stream(backend: str, device: str) -> None:
    student = _values(10**6 + 1, dtype=torch.float32, skewed=False, seed=17).to(device)
    teachers = _values(6, 10**6 + 1, dtype=torch.float32, skewed=False, seed=18).to(device)
    grad = torch.ones(6, device=device)
    first = _run(student, teachers, grad, None, backend)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        again = _run(student, teachers, grad, None, backend)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True)
def test_more_elements_than_32_bits_count(backend: str) -> None:
    n = 2**30 + 5
    if torch.cuda.mem_get_info()[0] < 20 * n:
        pytest.skip("needs 20 GiB of free GPU memory")
    student = torch.zeros(n, device="cuda")
    teachers = torch.zeros(3, n, device="cuda")
    teachers[2, -1] = 2.0
    distances = teacher_distance(student, teachers, backend=backend)
    expected = torch.tensor([EPS, EPS, 2.0], dtype=torch.float64).log() - math.log(n)
    torch.testing.assert_close(distances.cpu(), expected.float())


# --- Many rows by one call ---

# R and Q.
ROWS = [(1, 1), (3, 3), (6, 2), (3, 1)]
of_rows = pytest.mark.parametrize(("rows", "teacher_rows"), ROWS)


def _drawn_rows(
    rows: int, teacher_rows: int, k: int, n: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    students = _values(rows, n, dtype=dtype, skewed=False, seed=19 + n)
    return students, _values(k, teacher_rows, n, dtype=dtype, skewed=False, seed=20 + n)


def _weighted(distances: Tensor) -> Tensor:
    """A gradient that no two of the distances share."""
    order = torch.arange(1.0, distances.numel() + 1, dtype=distances.dtype, device=distances.device)
    return distances * order.view(distances.shape)


def _one_by_one(
    students: Tensor, teachers: Tensor, huber_delta: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Distances (R, K) and slopes (R, N) by calls of one row each, in memory of its own."""
    distances = students.new_empty(len(students), len(teachers))
    slopes = torch.empty_like(students)
    how: dict[str, Any] = {"eps": EPS, "huber_delta": huber_delta, "backend": backend}
    for row, student in enumerate(students):
        own = teachers[:, row % teachers.shape[1]].clone()
        distances[row] = teacher_distance(student.clone(), own, **how)
    weighted = _weighted(distances)
    for row, student in enumerate(students):
        own = teachers[:, row % teachers.shape[1], None].clone()
        grad = weighted[row : row + 1].clone()
        _, slope = distances_and_slope(student[None].clone(), own, lambda _, g=grad: g, **how)
        slopes[row] = slope
    return distances, slopes


def _assert_as_one_by_one(
    students: Tensor, teachers: Tensor, huber_delta: float | None, backend: str
) -> None:
    how: dict[str, Any] = {"eps": EPS, "huber_delta": huber_delta, "backend": backend}
    distances, slopes = distances_and_slope(students, teachers, _weighted, **how)
    expected, expected_slopes = _one_by_one(students, teachers, huber_delta, backend)
    assert slopes is not None
    assert torch.equal(distances, expected)
    assert torch.equal(slopes, expected_slopes)
    alone, nothing = distances_and_slope(students, teachers, None, **how)
    assert torch.equal(alone, expected)
    assert nothing is None


def _row_cases() -> list[Any]:
    """Places, dtypes, Huber's deltas and sizes: few on GPUs, where each compiles a kernel more.

    4099 are several blocks, and rows of an odd number begin where no wide load can.
    """
    few = [(torch.float32, None, 4099), (torch.float32, 0.01, 4099), (torch.float64, 0.01, 32)]
    every = [
        (dtype, huber_delta, n)
        for dtype in (torch.float32, torch.float64)
        for huber_delta in (None, 0.01)
        for n in (1, 32, 4099)
    ]
    return [
        pytest.param(
            *(*place.values, dtype, huber_delta, n),
            id=f"{place.id}-f{8 * dtype.itemsize}-{huber_delta}-{n}",
            marks=place.marks,
        )
        for places, cases in ((GPUS, few), ([*ON_CPU, *INTERPRETED, *ON_HOST], every))
        for place in places
        for dtype, huber_delta, n in cases
    ]


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "huber_delta", "n"), _row_cases(), indirect=["backend"]
)
@of_rows
def test_rows_have_the_bits_of_one_by_one(
    backend: str,
    device: str,
    dtype: torch.dtype,
    huber_delta: float | None,
    n: int,
    rows: int,
    teacher_rows: int,
) -> None:
    students, teachers = _drawn_rows(rows, teacher_rows, 3, n, dtype)
    _assert_as_one_by_one(students.to(device), teachers.to(device), huber_delta, backend)


@everywhere
@pytest.mark.parametrize(
    ("rows", "teacher_rows", "k", "n"),
    [
        *((0, 0, 2, 33), (0, 1, 2, 33), (0, 3, 0, 0)),
        *((4, 2, 0, 33), (4, 2, 2, 0), (4, 4, 0, 0)),
    ],
)
def test_rows_of_nothing(
    backend: str, device: str, rows: int, teacher_rows: int, k: int, n: int
) -> None:
    students, teachers = (each.to(device) for each in _drawn_rows(rows, teacher_rows, k, n))
    _assert_as_one_by_one(students, teachers, None, backend)
    distances, slopes = distances_and_slope(students, teachers, _weighted, backend=backend)
    assert slopes is not None
    assert not slopes.any()
    torch.testing.assert_close(distances, torch.full_like(distances, math.log(EPS)))


@at(*ON_CPU, *on_gpus("cuda"), *INTERPRETED, *ON_HOST)
def test_rows_where_no_wide_load_can_begin(backend: str, device: str) -> None:
    students, teachers = _drawn_rows(4, 2, 3, 4100)
    shifted = [
        torch.cat((each.flatten()[:1], each.flatten())).to(device)[1:].view(each.shape)
        for each in (students, teachers)
    ]
    _assert_as_one_by_one(*shifted, None, backend)


@everywhere
def test_rows_in_other_strides(backend: str, device: str) -> None:
    students, teachers = (each.to(device) for each in _drawn_rows(6, 3, 2, 33))
    how: dict[str, Any] = {"gradient": _weighted, "backend": backend}
    packed = distances_and_slope(students, teachers, **how)
    strided = distances_and_slope(
        students.T.contiguous().T, teachers.transpose(0, 2).contiguous().transpose(0, 2), **how
    )
    for ours, expected in zip(strided, packed, strict=True):
        assert ours is not None
        assert expected is not None
        assert torch.equal(ours, expected)


@compiled
@of_rows
@pytest.mark.usefixtures("threads")
def test_rows_have_the_same_bits_for_any_number_of_threads(
    backend: str, rows: int, teacher_rows: int
) -> None:
    students, teachers = _drawn_rows(rows, teacher_rows, 3, 65537)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        _assert_as_one_by_one(students, teachers, None, backend)


@dtypes
@hubers
@of_rows
def test_the_reference_takes_rows(
    dtype: torch.dtype, huber_delta: float | None, rows: int, teacher_rows: int
) -> None:
    students, teachers = _drawn_rows(rows, teacher_rows, 3, 33, dtype)
    found = distances_and_slope(
        students, teachers, _weighted, eps=EPS, huber_delta=huber_delta, backend="reference"
    )
    expected = _one_by_one(students, teachers, huber_delta, "reference")
    for ours, one_by_one in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, one_by_one)


@at(*GPUS, *INTERPRETED, *ON_HOST)
def test_more_rows_than_a_grid_has_are_refused(backend: str, device: str) -> None:
    students = torch.zeros(65536, 0, device=device)
    teachers = torch.zeros(0, 1, 0, device=device)
    distances, _ = distances_and_slope(students[1:], teachers, None, backend=backend)
    assert distances.shape == (65535, 0)
    with pytest.raises(BackendError, match="at most 65535 rows at once, not 65536"):
        distances_and_slope(students, teachers, None, backend=backend)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"students": torch.zeros(4)}, ValueError, r"students must have shape \(R, N\), not"),
        ({"students": torch.zeros(4, 3).int()}, TypeError, "students must be"),
        ({"teachers": torch.zeros(2, 2, 3).int()}, TypeError, "teachers must be"),
        ({"teachers": torch.zeros(2, 3)}, ValueError, r"teachers must have shape \(K, Q, 3\)"),
        ({"teachers": torch.zeros(2, 2, 4)}, ValueError, r"teachers must have shape \(K, Q, 3\)"),
        ({"teachers": torch.zeros(2, 3, 3)}, ValueError, "teachers must .* Q divides 4, not"),
        ({"teachers": torch.zeros(2, 8, 3)}, ValueError, "teachers must .* Q divides 4, not"),
        ({"teachers": torch.zeros(2, 0, 3)}, ValueError, "teachers must .* Q divides 4, not"),
        ({"teachers": torch.zeros(2, 2, 3).double()}, ValueError, "teachers must be torch.float32"),
        ({"huber_delta": 0.0}, ValueError, "huber_delta must be positive"),
        ({"gradient": lambda _: torch.zeros(4)}, ValueError, r"gradient must have shape \(4, 2\)"),
        ({"gradient": Tensor.double}, ValueError, "gradient must be torch.float32"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_rows_that_do_not_fit(
    changes: dict[str, Any], error: type[Exception], message: str, backend: str
) -> None:
    fitting = {"students": torch.zeros(4, 3), "teachers": torch.zeros(2, 2, 3)}
    with pytest.raises(error, match=message):
        distances_and_slope(**{**fitting, "gradient": _weighted, "backend": backend, **changes})


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True)
def test_rows_of_more_elements_than_32_bits_count(backend: str) -> None:
    rows, n = 3, 2**30 + 5
    if torch.cuda.mem_get_info()[0] < 40 * n:
        pytest.skip("needs 40 GiB of free GPU memory")
    students = torch.zeros(rows, n, device="cuda")
    teachers = torch.zeros(1, rows, n, device="cuda")
    teachers[0, -1, -1] = 2.0
    distances, slopes = distances_and_slope(students, teachers, torch.ones_like, backend=backend)
    expected = torch.tensor([EPS, EPS, 2.0], dtype=torch.float64).log() - math.log(n)
    torch.testing.assert_close(distances[:, 0].cpu(), expected.float())
    assert slopes is not None
    assert slopes[-1, -1].item() == -1.0


# --- What the authors measure, and machine code ---


@of_each
@pytest.mark.parametrize(
    ("key", "huber_delta"), [("log_distance", None), ("log_distance_huber_0.01", 0.01)]
)
def test_what_the_authors_code_computes(backend: str, key: str, huber_delta: float | None) -> None:
    golden = np.load(GOLDEN)
    student, teacher = (
        torch.cat([torch.from_numpy(golden[f"{who}.{i}"]).flatten() for i in range(3)]).double()
        for who in ("student", "teacher")
    )
    ours = teacher_distance(student, teacher[None], huber_delta=huber_delta, backend=backend)
    assert ours.item() == pytest.approx(golden[key].item(), rel=1e-5)
    itself = teacher_distance(student, student[None], backend=backend)
    assert itself.item() == pytest.approx(golden["log_distance_self"].item(), rel=1e-5)


def compiled_for(kernel: str, arch: int) -> MachineCode:
    from amalgam.kernels import teacher_distance as kernels

    counts = {"n": "i64", "k": "i32", "teacher_rows": "i32"}
    types = {**counts, "eps": "fp64", "delta": "fp64", "partials": "*fp64"}
    constants = {"HUBER": True, "WITH_TEACHERS": True, "BLOCK": kernels.BLOCK}
    function = getattr(kernels, kernel)
    return compile_kernel(function, arch, types, constants, True, kernels.OPTIONS)


@pytest.mark.compiles(by=compiled_for)
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("kernel", ["sum_blocks", "gradients"])
def test_triton_kernels_compile_without_spills(
    kernel: str, arch: int, compilation: MachineCode
) -> None:
    from amalgam.kernels.teacher_distance import BLOCK, OPTIONS

    costs = compilation.costs(BLOCK / (32 * OPTIONS["num_warps"]))
    assert_within(costs, BUDGETS[f"{kernel} sm_{arch}"])
    assert re.search(r"ld\.global\S*\.v4", compilation.ptx)
    assert not re.search(r"\b(ld|st)\.local", compilation.ptx)
    assert compilation.count("LDG") > 0
    assert compilation.count("LDL", "STL") == 0


CUDA_KERNELS = {
    "cuda sum_tiles sm_90 float32": "sum_tilesILb0EfE",
    "cuda sum_tiles sm_90 float32,huber": "sum_tilesILb1EfE",
    "cuda gradients sm_90 float32": "gradientsILb0ELb0EfE",
    "cuda gradients sm_90 float32,huber,teachers": "gradientsILb1ELb1EfE",
}
"""Fragments of the mangled names of CUDA's kernels."""


def test_cuda_kernels_keep_to_their_budgets() -> None:
    assert_cuda_within(CUDA_BUDGETS, CUDA_KERNELS)


def test_forward_mode_derivatives_are_the_references() -> None:
    """An operator would drop tangents in silence."""
    generator = torch.Generator().manual_seed(0)
    student, along = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    teachers = torch.randn(2, 7, generator=generator, dtype=torch.float64)

    def distances(at: Tensor, backend: str = "auto") -> Tensor:
        return teacher_distance(at, teachers, backend=backend)

    _, found = torch.func.jvp(distances, (student,), (along,))
    step = 1e-6
    ends = [distances(student + sign * step * along) for sign in (1, -1)]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)
    with pytest.raises(RuntimeError, match="backend='cpu' can't .* no forward-mode derivatives"):
        torch.func.jvp(lambda at: distances(at, "cpu"), (student,), (along,))
