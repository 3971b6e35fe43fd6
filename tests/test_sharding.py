"""Parameters that lie on processes in parts: FSDP2, FSDP1, ZeRO, tensor parallelism, resharding."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip(
        "needs torch.distributed with gloo, which this PyTorch lacks", allow_module_level=True
    )

import sharded

from amalgam import AmalgamatedOptimizer

HERE = Path(__file__).parent
KINDS, DTYPES = list(sharded.STUDENTS), list(sharded.DTYPES)
Found = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("sharded")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "sharded.py", made],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    """What came out of two processes, and of four."""
    return {world: torch.load(folder / f"{world}.pt") for world in (2, 4)}


def alone(
    kind: str = "nominal", model: nn.Module | None = None, **how: Any
) -> tuple[nn.Module, AmalgamatedOptimizer]:
    model = sharded.network() if model is None else model
    return model, AmalgamatedOptimizer(model.parameters(), student=sharded.STUDENTS[kind](), **how)


def trained(kind: str = "nominal", **how: Any) -> list[Tensor]:
    """A network's parameters after as many steps in one process."""
    model, optimizer = alone(kind, **how)
    sharded.train(model, optimizer, range(sharded.STEPS))
    return sharded.params_of(model)


def largest_difference(ours: Any, theirs: Any) -> float:
    """Between lists of tensors, or of dictionaries of them."""
    if isinstance(ours, Tensor):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        return float((ours.double() - theirs.double()).abs().max()) if ours.numel() else 0.0
    assert len(ours) == len(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        return max((largest_difference(ours[name], theirs[name]) for name in ours), default=0.0)
    return max(map(largest_difference, ours, theirs))


@pytest.mark.parametrize(
    ("world", "mesh", "kind", "dtype"),
    [(world, "fsdp2", *case) for world in (2, 4) for case in itertools.product(KINDS, DTYPES)]
    + [(4, "hybrid", kind, "float32") for kind in KINDS],
)
def test_fsdp2_steps_as_one_process_does(
    world: int, mesh: str, kind: str, dtype: str, found: Found
) -> None:
    """Some processes have no row of a tensor; a student that sees an RMS sees the whole one's."""
    of = sharded.DTYPES[dtype]
    model, optimizer = alone(kind, sharded.network(of))
    sharded.train(model, optimizer, range(sharded.STEPS), of)
    params, state = found[world][f"{mesh}-{kind}-{dtype}"]
    # The sum of squares is of parts' sums, in another order.
    allowed = 1e-6 if kind == "told" else 0
    assert largest_difference(params, sharded.params_of(model)) <= allowed
    assert largest_difference(state, sharded.state_of(optimizer)) <= allowed


def test_mixed_precision_and_parameters_on_the_host(found: Found) -> None:
    model, optimizer = alone()
    low = sharded.network(torch.bfloat16)
    for step in range(sharded.STEPS):
        with torch.no_grad():
            for param, master in zip(low.parameters(), model.parameters(), strict=True):
                param.copy_(master)
        sharded.backward(low, step, torch.bfloat16)
        for param, master in zip(low.parameters(), model.parameters(), strict=True):
            master.grad = param.grad.float()
        optimizer.step()
    assert largest_difference(found[2]["mixed-precision"], sharded.params_of(model)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_parallel_steps_as_one_process_does(kind: str, found: Found) -> None:
    """The norm's gradients are partial sums; products are summed in another order than in one."""
    model, optimizer = alone(kind, sharded.Blocks())
    sharded.train(model, optimizer, range(sharded.STEPS))
    params, state = found[2][f"tensor-parallel-{kind}"]
    assert largest_difference(params, sharded.params_of(model)) < 1e-6
    assert largest_difference(state, sharded.state_of(optimizer)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp2_around_tensor_parallel_steps_and_skips_as_one_process_does(
    kind: str, found: Found
) -> None:
    model, optimizer = alone(kind, sharded.Blocks())
    sharded.train(model, optimizer, range(2))
    sharded.train(model, optimizer, range(3, sharded.STEPS))
    params, state, skips = found[4][f"both-{kind}"]
    assert skips == [1] * 4
    assert largest_difference(params, sharded.params_of(model)) < 1e-6
    assert largest_difference(state, sharded.state_of(optimizer)) < 1e-5


@pytest.mark.parametrize("capturable", ["plain", "capturable"])
@pytest.mark.parametrize("nonfinite", ["skip-step", "skip-tensor"])
@pytest.mark.parametrize(("means", "param"), [("fsdp2", 0), ("fsdp1", 2)])
def test_what_one_process_can_not_use_all_skip(
    means: str, param: int, nonfinite: str, capturable: str, found: Found
) -> None:
    model, optimizer = alone(nonfinite=nonfinite)
    sharded.train(model, optimizer, range(1))
    sharded.backward(model, 1)
    list(model.parameters())[param].grad.view(-1)[-1] = torch.inf
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    sharded.train(model, optimizer, range(2, 3))
    params, skips = found[2][f"fault-{means}-{nonfinite}-{capturable}"]
    assert skips == [1, 1]
    assert largest_difference(params, sharded.params_of(model)) == 0


@pytest.mark.parametrize("name", ["fault-fsdp1-flat", "scaled"])
def test_a_step_that_one_process_can_not_take_none_takes(name: str, found: Found) -> None:
    """Of a flat vector's part; and where GradScaler finds it, which then halves its scale."""
    model, optimizer = alone()
    sharded.train(model, optimizer, range(1))
    sharded.train(model, optimizer, range(2, 3))
    params, told = found[2][name]
    assert told == ([1, 1] if name == "fault-fsdp1-flat" else [2.0, 2.0])
    assert largest_difference(params, sharded.params_of(model)) == 0


def test_all_processes_raise(found: Found) -> None:
    for message in found[2]["raising"]:
        assert message.startswith(
            "gradients of params[0] of group 0 of shape (3, 6) are not finite"
        )


def test_zero_steps_and_skips_as_one_process_does(found: Found) -> None:
    """The process that steps the unusable tensor is one; the other skips by ``skip_group``."""
    model, optimizer = alone()
    sharded.train(model, optimizer, range(2))
    sharded.train(model, optimizer, range(3, sharded.STEPS))
    params, skips = found[2]["zero"]
    assert skips == [1, 1]
    assert largest_difference(params, sharded.params_of(model)) == 0


@pytest.mark.parametrize("form", sharded.FORMS)
def test_a_checkpoint_of_two_processes_loads_on_one_and_four(
    form: str, folder: Path, found: Found
) -> None:
    flat, how = sharded.FORMS[form]
    unbroken = trained(lr=0.5, **how)
    assert largest_difference(found[2][form], unbroken) == 0
    assert largest_difference(found[4][form], unbroken) == 0
    with pytest.warns(UserWarning, match="single process"):
        resumed = sharded.resumed(folder / form, flat, lambda model: model, **how)
    assert largest_difference(resumed, unbroken) == 0


@pytest.mark.parametrize("origin", ["from-a-whole", "broadcast"])
def test_whole_states_load_into_parts(origin: str, found: Found) -> None:
    assert largest_difference(found[2][origin], trained()) == 0


@pytest.mark.parametrize("case", ["original-sharded", "flat-full", "flat-sharded"])
@pytest.mark.parametrize("kind", ["nominal", "paper"])
def test_fsdp1_steps_saves_and_loads(kind: str, case: str, found: Found) -> None:
    unbroken, resumed = found[2][f"fsdp1-{kind}-{case}"]
    assert largest_difference(unbroken, trained(kind)) == 0
    assert largest_difference(resumed, unbroken) == 0


def test_parts_are_rounded_by_bits_of_their_own_and_right_on_average(found: Found) -> None:
    one = sharded.rounded(nn.Parameter(sharded.ones_to_round()), rounding="stochastic")
    exact = float(sharded.rounded(nn.Parameter(sharded.ones_to_round().float())).mean())
    first, second = found[2]["rounding"]
    assert torch.equal(first, one[:2048])
    assert not torch.equal(first, second)
    # A mean of 4,096 elements that lie within one bit, 0.004, of each other.
    assert float(torch.cat((first, second)).double().mean()) == pytest.approx(exact, abs=2e-4)
    assert exact < 1 - 1e-3


def test_copies_of_a_part_are_rounded_alike(found: Found) -> None:
    """Of a mesh of two by two, whose first dimension copies."""
    parts = found[4]["rounding"]
    assert torch.equal(parts[0], parts[2])
    assert torch.equal(parts[1], parts[3])
    assert not torch.equal(parts[0], parts[1])


def test_statistics_are_of_whole_tensors(found: Found) -> None:
    model, optimizer = alone("told")
    sharded.train(model, optimizer, range(2))
    sharded.backward(model, 2)
    ours = optimizer.stats()
    assert found[2]["statistics"].keys() == ours.keys()
    for name, theirs in found[2]["statistics"].items():
        assert theirs[:2] == pytest.approx(ours[name][:2], rel=1e-6)
        assert theirs[2] == pytest.approx(ours[name].agreement, rel=1e-6)


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("policy", "TypeError: params must be plain tensors, not DTensors: PolicyOptimizer keeps"),
        (
            "teacher",
            "TypeError: params must be plain tensors, not DTensors: TeacherOptimizer keeps",
        ),
        ("compiled", "RuntimeError: a compiled step takes .* whole in every process"),
        ("into-a-plain-one", "ValueError: state.m of .* must be a plain tensor"),
        ("flat", "ValueError: student must not depend on tensors' shapes or RMS where FSDP1"),
        (
            "matrices",
            "ValueError: orthogonal must be False where FSDP1 has made parts of flat vectors",
        ),
    ],
)
def test_what_can_not_be_sharded_is_refused(what: str, why: str, found: Found) -> None:
    assert re.match(why, found[2]["refusals"][what]), found[2]["refusals"][what]


def test_a_group_to_skip_with_is_checked() -> None:
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="skip_group must be 'auto' or 'world', not 'word'; did"):
        AmalgamatedOptimizer(params, student=sharded.nominal(), skip_group="word")
    with pytest.raises(TypeError, match="skip_group must be .* a torch.distributed.Proc.*, not 3"):
        AmalgamatedOptimizer(params, student=sharded.nominal(), skip_group=3)
    optimizer = AmalgamatedOptimizer(params, student=sharded.nominal(), skip_group="world")
    params[0].grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="'world' needs torch.distributed.init_process_group"):
        optimizer.step()
