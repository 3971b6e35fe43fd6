"""The state of AmalgamatedOptimizer: its shapes, what may be done to it, and how it is loaded."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from students import nominal
from torch import Tensor, nn

from amalgam import (
    AmalgamatedOptimizer,
    PolicyOptimizer,
    Student,
    StudentConfig,
    TeacherOptimizer,
)
from amalgam.operations.cell_codes import encoded, numbers_of
from amalgam.optimizers import separate_units
from amalgam.optimizers.state import planar as planar_cells
from amalgam.policies import FusedStudent

SHAPES = [(6, 4), (), (5,), (4, 3, 2, 2), (0, 3)]
NAMES = ["step", "m", "v", "h", "c"]


def paper(**config: Any) -> Student:
    config = {"layers": 2, "hidden": 3, "warmup_steps": 2, "warmup_lr": 0.1, **config}
    return Student(StudentConfig(**config), generator=torch.Generator().manual_seed(1))


STUDENTS = [pytest.param(nominal, id="nominal"), pytest.param(paper, id="paper")]
Make = Callable[..., FusedStudent]


def tensors(shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def run(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for param in (p for group in optimizer.param_groups for p in group["params"]):
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def stepped(make: Make, steps: int = 4, **how: Any) -> tuple[AmalgamatedOptimizer, list[Any]]:
    params = tensors()
    optimizer = AmalgamatedOptimizer(params, student=make(), **how)
    run(optimizer, range(steps))
    return optimizer, params


@pytest.mark.parametrize("make", STUDENTS)
@pytest.mark.parametrize(("cells", "beside"), [(torch.float32, 0), (torch.int8, 1)])
def test_every_tensor_begins_with_the_parameters_shape(
    make: Make, cells: torch.dtype, beside: int
) -> None:
    """The scale of codes lies beside the units that it is of."""
    optimizer, params = stepped(make, cells_dtype=cells)
    config = optimizer.config
    for param in params:
        entry = optimizer.state[param]
        assert list(entry) == NAMES
        assert entry["m"].shape == entry["v"].shape == param.shape
        for name in ("h", "c"):
            assert entry[name].shape == (*param.shape, config.layers, config.hidden + beside)
            assert entry[name].dtype == cells


def masked(value: Tensor) -> Tensor:
    return value[torch.tensor([True, False, True, True, False, True])]


def reshaped_storage(value: Tensor) -> Tensor:
    return masked(value).contiguous(memory_format=torch.contiguous_format)


def strided(value: Tensor) -> Tensor:
    kept = masked(value)
    return torch.stack((kept, kept), -1)[..., 0]


def sliced(value: Tensor) -> Tensor:
    kept = masked(value)
    return torch.cat((kept, kept))[: len(kept)]


def wide(value: Tensor) -> Tensor:
    return masked(value).double()


def requiring_gradients(value: Tensor) -> Tensor:
    return masked(value).clone().requires_grad_()


EDITS = [masked, reshaped_storage, strided, sliced, wide, requiring_gradients]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("make", STUDENTS)
@pytest.mark.parametrize(
    ("edit", "cells"),
    [*((edit, torch.float32) for edit in EDITS), (masked, torch.int8), (wide, torch.int8)],
)
def test_pruned_rows_step_as_they_would_have(
    edit: Any, cells: torch.dtype, make: Make, backend: str
) -> None:
    """What densifying and pruning loops do to the state, row by row of the parameter."""
    (whole,) = tensors([(6, 4)])
    pruned = nn.Parameter(masked(whole.detach()))
    student = make()
    how: dict[str, Any] = {"student": student, "backend": backend, "cells_dtype": cells}
    others = AmalgamatedOptimizer([whole], **how)
    run(others, range(4))
    optimizer = AmalgamatedOptimizer([pruned], **how)
    entry = others.state[whole]
    optimizer.state[pruned] = {
        name: edit(value) if value.dim() else value.clone() for name, value in entry.items()
    }
    pruned.data.copy_(masked(whole.detach()))
    for step in range(3):
        grad = torch.randn((6, 4), generator=torch.Generator().manual_seed(step))
        whole.grad, pruned.grad = grad, masked(grad)
        others.step()
        optimizer.step()
    torch.testing.assert_close(pruned.detach(), masked(whole.detach()), rtol=1e-5, atol=1e-6)
    for name, value in optimizer.state[pruned].items():
        assert value.dtype == (cells if name in ("h", "c") else torch.float32)
        if value.dim():
            torch.testing.assert_close(value, masked(entry[name]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", STUDENTS)
@pytest.mark.parametrize("cells", [torch.float32, torch.int8])
def test_state_grows_as_parameters_are_added_to(make: Make, cells: torch.dtype) -> None:
    """What densifying does: rows of zeros behind the state's, under one new parameter."""
    optimizer, params = stepped(make, cells_dtype=cells)
    old = params[0]
    new = nn.Parameter(torch.cat((old.detach(), torch.ones(2, 4))))
    entry = optimizer.state.pop(old)
    for name, value in entry.items():
        if value.dim():
            entry[name] = torch.cat((value, torch.zeros((2, *value.shape[1:]))))
    optimizer.param_groups[0]["params"][0] = new
    optimizer.state[new] = entry
    run(optimizer, range(4, 6))
    assert float(entry["step"]) == 6
    assert entry["h"].shape[0] == 8
    assert entry["h"].dtype == cells


@pytest.mark.parametrize("make", STUDENTS)
def test_data_assigned_to_the_state_is_what_is_stepped(make: Make) -> None:
    """As whoever offloads assigns it; a view of what was there before would go on being written."""
    optimizer, _ = stepped(make)
    twin = copy.deepcopy(optimizer)
    for entry in optimizer.state.values():
        for name, value in entry.items():
            value.data = value.data.clone(memory_format=torch.contiguous_format)
            assert name in NAMES
    for one in (optimizer, twin):
        run(one, range(4, 7))
    for ours, theirs in zip(optimizer.state.values(), twin.state.values(), strict=True):
        for name in NAMES:
            assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("cells", [torch.float32, torch.int8])
def test_a_parameter_cast_to_float64_takes_its_state_along(cells: torch.dtype) -> None:
    optimizer, params = stepped(nominal, cells_dtype=cells)
    params[0].data = params[0].data.double()
    run(optimizer, range(4, 6))
    assert {v.dtype for n, v in optimizer.state[params[0]].items() if n != "step"} == {
        torch.float64
    }
    assert float(optimizer.state[params[0]]["step"]) == 6


def saved(optimizer: AmalgamatedOptimizer) -> dict[str, Any]:
    """Through a file, unpickling nothing but tensors and plain values."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def everything(optimizer: torch.optim.Optimizer) -> Any:
    """All that a refused load must leave as it was."""
    return copy.deepcopy((optimizer.state_dict(), optimizer.param_groups))


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for each, its in zip(one, other, strict=True):
            assert_same(each, its)
    else:
        assert one == other


def planar(state_dict: dict[str, Any], digest: str) -> dict[str, Any]:
    """As earlier versions saved it: coordinates last, fewer settings, and weights' digest alone."""
    old = copy.deepcopy(state_dict)
    del old["amalgam"]
    for group in old["param_groups"]:
        group["student"] = digest
        for name in ("maximize", "foreach", "fused", "betas", "capturable", "rounding", "seed"):
            del group[name]
    for entry in old["state"].values():
        for name in ("h", "c"):
            entry[name] = entry[name].movedim((-2, -1), (0, 1)).contiguous()
    return old


@pytest.mark.parametrize("make", STUDENTS)
def test_checkpoints_of_earlier_versions_load(make: Make) -> None:
    optimizer, params = stepped(make)
    weights = json.loads(optimizer.param_groups[0]["student"])["weights"]
    old = planar(optimizer.state_dict(), weights)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = AmalgamatedOptimizer(twins, student=make())
    resumed.load_state_dict(old)
    for one in (optimizer, resumed):
        run(one, range(4, 7))
    assert all(map(torch.equal, params, twins))
    with pytest.raises(ValueError, match="another student .* weights is 'beef' there"):
        resumed.load_state_dict(planar(optimizer.state_dict(), "beef"))


@pytest.mark.parametrize("make", STUDENTS)
def test_odd_counts_and_strides_are_taken(make: Make) -> None:
    optimizer, params = stepped(make)
    odd = saved(optimizer)
    kinds = (int, float, Tensor.double, lambda count: count.view(1), int)
    for kind, entry in zip(kinds, odd["state"].values(), strict=True):
        entry["step"] = kind(entry["step"])
        entry["m"] = torch.stack((entry["m"], entry["m"]), -1)[..., 1]
        entry["h"] = entry["h"].contiguous()
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = AmalgamatedOptimizer(twins, student=make())
    resumed.load_state_dict(odd)
    for one in (optimizer, resumed):
        run(one, range(4, 7))
    assert all(map(torch.equal, params, twins))


@pytest.mark.parametrize("make", STUDENTS)
@pytest.mark.parametrize(
    ("theirs", "ours", "kept"),
    [
        ({"cells_dtype": torch.bfloat16}, {}, torch.float32),
        ({}, {"cells_dtype": torch.bfloat16}, torch.bfloat16),
        ({}, {"cells_dtype": torch.int8}, torch.int8),
        ({"cells_dtype": torch.bfloat16}, {"cells_dtype": torch.int8}, torch.int8),
        ({"cells_dtype": torch.int8}, {}, torch.float32),
        ({"cells_dtype": torch.int8}, {"cells_dtype": torch.bfloat16}, torch.bfloat16),
        ({"cells_dtype": torch.int8}, {"cells_dtype": torch.int8}, torch.int8),
    ],
)
def test_what_is_loaded_is_kept_as_this_optimizer_keeps_it(
    make: Make, theirs: dict[str, Any], ours: dict[str, Any], kept: torch.dtype
) -> None:
    optimizer, params = stepped(make, **theirs)
    resumed = AmalgamatedOptimizer(params, student=make(), **ours)
    resumed.load_state_dict(optimizer.state_dict())
    assert {entry["h"].dtype for entry in resumed.state.values()} == {kept}
    for ours_of, theirs_of in zip(resumed.state.values(), optimizer.state.values(), strict=True):
        for name in ("h", "c"):
            numbers = numbers_of(planar_cells(theirs_of[name]))
            found = planar_cells(ours_of[name])
            coded = kept == torch.int8
            assert torch.equal(found, encoded(numbers.float()) if coded else numbers.to(kept))
        assert torch.equal(ours_of["m"], theirs_of["m"])
    run(resumed, range(4, 6))


@pytest.mark.parametrize("make", STUDENTS)
def test_float64_state_goes_on_in_float32(make: Make) -> None:
    params = [nn.Parameter(p.detach().double()) for p in tensors()]
    optimizer = AmalgamatedOptimizer(params, student=make())
    run(optimizer, range(4))
    narrow = [nn.Parameter(p.detach().float()) for p in params]
    resumed = AmalgamatedOptimizer(narrow, student=make())
    resumed.load_state_dict(saved(optimizer))
    for one in (optimizer, resumed):
        run(one, range(4, 8))
    for wide_one, ours in zip(params, narrow, strict=True):
        torch.testing.assert_close(ours, wide_one.float(), rtol=1e-4, atol=1e-4)


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda state_dict: state_dict["state"][3].pop(name)  # type: ignore[no-any-return]


def shortened(state_dict: dict[str, Any]) -> None:
    state_dict["state"][3]["c"] = state_dict["state"][3]["c"][1:]


def of_another_kind(state_dict: dict[str, Any]) -> None:
    state_dict["state"][3]["v"] = "v"


def with_a_negative_rate(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["lr"] = -1.0


def with_a_wrong_rounding(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["rounding"] = "stochastik"


def with_another_group(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"].append(state_dict["param_groups"][0])


def with_a_parameter_less(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["params"].pop()


def of_another_optimizer(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0].pop("student")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (without("c"), r"state of params\[3\] .* lacks \['c'\]"),
        (shortened, r"state\.c of params\[3\] .* 2, 1, 4\), or as codes .* 1, 5\), not \(3,"),
        (of_another_kind, r"state\.v of params\[3\] .* not str"),
        (with_a_negative_rate, "lr must be 0 or more and finite, not -1.0"),
        (with_a_wrong_rounding, "not 'stochastik'; did you mean 'stochastic'"),
        (with_another_group, "different number of parameter groups, 2, than this optimizer, 1"),
        (with_a_parameter_less, "doesn't match the size of optimizer's group"),
        (of_another_optimizer, "must name its student in every group, but one has none"),
        (lambda state_dict: state_dict.pop("state"), r"must hold \['state'\]"),
    ],
)
def test_a_refused_load_changes_nothing(spoil: Any, named: str) -> None:
    optimizer, _ = stepped(nominal)
    other, _ = stepped(nominal, steps=2)
    bad = saved(other)
    spoil(bad)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=named):
        optimizer.load_state_dict(bad)
    assert_same(everything(optimizer), before)
    run(optimizer, range(4, 5))


@pytest.mark.parametrize(
    ("make", "config", "named"),
    [
        (paper, {"alpha": 0.2}, "alpha is 0.1 there and 0.2 here"),
        (paper, {"eps": 1e-8}, "eps is 1e-10 there and 1e-08 here"),
        (nominal, {"lr": 0.01}, "lr is 0.005 there and 0.01 here"),
        (nominal, {"gain": 3.0}, "gain is 2.0 there and 3.0 here"),
        (nominal, {"beta1": 0.8}, "beta1 is 0.9 there and 0.8 here"),
    ],
)
@pytest.mark.parametrize("of", [AmalgamatedOptimizer, PolicyOptimizer])
def test_the_same_weights_with_other_constants_are_another_student(
    make: Make, config: dict[str, float], named: str, of: Any
) -> None:
    def optimizer_of(student: FusedStudent) -> Any:
        if of is PolicyOptimizer:
            return PolicyOptimizer(tensors(), student)
        return AmalgamatedOptimizer(tensors(), student=student)

    state_dict = optimizer_of(make()).state_dict()
    with pytest.raises(ValueError, match=named):
        optimizer_of(make(**config)).load_state_dict(state_dict)
    own_warm_up = optimizer_of(make(warmup_steps=7))
    own_warm_up.load_state_dict(state_dict)
    assert own_warm_up.param_groups[0]["warmup_steps"] == make().config.warmup_steps


@pytest.mark.parametrize("make", STUDENTS)
def test_a_run_resumes_when_the_students_file_is_gone(make: Make, tmp_path: Any) -> None:
    path = tmp_path / "student.safetensors"
    make().save(path)
    params = tensors()
    optimizer = AmalgamatedOptimizer(params, student=path)
    run(optimizer, range(4))
    checkpoint = saved(optimizer)
    path.unlink()
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = AmalgamatedOptimizer(twins, student=checkpoint)
    resumed.load_state_dict(checkpoint)
    for one in (optimizer, resumed):
        run(one, range(4, 8))
    assert all(map(torch.equal, params, twins))
    assert resumed.config == optimizer.config


def test_a_state_dict_may_leave_the_student_out() -> None:
    optimizer, params = stepped(nominal, include_student=False)
    state_dict = optimizer.state_dict()
    assert "student" not in state_dict["amalgam"]
    with pytest.raises(ValueError, match="holds one, but this one.*include_student was False"):
        AmalgamatedOptimizer(params, student=state_dict)
    AmalgamatedOptimizer(params, student=nominal()).load_state_dict(state_dict)
    kept_by_others = {name: state_dict[name] for name in ("state", "param_groups")}
    AmalgamatedOptimizer(params, student=nominal()).load_state_dict(kept_by_others)


def test_a_students_kind_must_be_known_and_its_weights_fit() -> None:
    optimizer, params = stepped(nominal)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["amalgam"]["student"]["weights"].pop("head.bias")
    with pytest.raises(ValueError, match="not usable: (?s:.*)head.bias"):
        AmalgamatedOptimizer(params, student=state_dict)
    for kind in ("os.path", "choice"):
        state_dict["amalgam"]["student"]["kind"] = kind
        with pytest.raises(ValueError, match=f"known kind, which '{kind}' is not"):
            AmalgamatedOptimizer(params, student=state_dict)


def optimizers() -> list[tuple[str, Any]]:
    return [
        ("amalgamated", AmalgamatedOptimizer(tensors(), student=nominal())),
        ("policy", PolicyOptimizer(tensors(), nominal())),
        ("teacher", TeacherOptimizer(tensors(), "adam")),
    ]


@pytest.mark.parametrize(("name", "optimizer"), optimizers())
def test_hooks_of_loads_are_honoured(name: str, optimizer: Any) -> None:
    run(optimizer, range(2))
    state_dict = optimizer.state_dict()
    wrapped = {"optimizer": state_dict}
    seen: list[str] = []

    def unwrap(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append("pre")
        return copy.deepcopy(given["optimizer"])

    def halve(_: Any, given: dict[str, Any]) -> None:
        given["param_groups"][0]["lr"] = 0.5

    def after(loaded: Any) -> None:
        seen.append("post")
        loaded.state[loaded.param_groups[0]["params"][1]]["noted"] = "by a hook"

    handles = [optimizer.register_load_state_dict_pre_hook(unwrap)]
    handles.append(optimizer.register_load_state_dict_pre_hook(halve))
    handles.append(optimizer.register_load_state_dict_post_hook(after))
    optimizer.load_state_dict(wrapped)
    assert seen == ["pre", "post"]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.state[optimizer.param_groups[0]["params"][1]].pop("noted") == "by a hook"
    assert list(wrapped) == ["optimizer"]
    run(optimizer, range(2, 3))


def test_hooks_of_state_dicts_are_honoured() -> None:
    optimizer, _ = stepped(nominal)
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("pre"))

    def rename(o: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append(",".join(state_dict))
        return {"all": state_dict}

    optimizer.register_state_dict_post_hook(rename)
    assert list(optimizer.state_dict()) == ["all"]
    assert calls == ["pre", "state,param_groups,amalgam"]


@pytest.mark.parametrize("make", STUDENTS)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"cells_dtype": torch.int8},
        {
            "cells_dtype": torch.bfloat16,
            "moments_dtype": torch.bfloat16,
            "rounding": "stochastic",
        },
    ],
)
def test_units_apart_have_the_parameters_shape_and_load(make: Make, how: dict[str, Any]) -> None:
    """For what takes no state but tensors like the parameter, and of one dtype."""
    optimizer, params = stepped(make, **how)
    optimizer.register_state_dict_post_hook(separate_units)
    apart = optimizer.state_dict()
    layers, hidden = optimizer.config.layers, optimizer.config.hidden
    for entry, param in zip(apart["state"].values(), params, strict=True):
        assert len(entry) == 3 + 2 * layers * hidden
        assert all(value.shape == param.shape for name, value in entry.items() if name != "step")
        part = entry[f"h.{layers - 1}.{hidden - 1}"]
        assert {value.dtype for value in entry.values()} == {torch.float32}
        exact = numbers_of(planar_cells(optimizer.state[param]["h"])).float()[-1, -1]
        assert torch.equal(part, exact)
        assert part.is_contiguous()
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = AmalgamatedOptimizer(twins, student=apart, **how)
    resumed.load_state_dict(apart)
    for one in (optimizer, resumed):
        run(one, range(4, 7))
    assert all(map(torch.equal, params, twins))
    for ours, theirs in zip(resumed.state.values(), optimizer.state.values(), strict=True):
        assert torch.equal(ours["h"], theirs["h"])
    del apart["state"][0]["c.0.1"]
    with pytest.raises(ValueError, match=r"state of params\[0\] .* lacks \['c'\]"):
        resumed.load_state_dict(apart)


def test_state_of_strangers_is_kept_as_it_is() -> None:
    """As torch.optim keeps state that belongs to no parameter."""
    optimizer, _ = stepped(nominal)
    state_dict = optimizer.state_dict()
    state_dict["state"]["of the run"] = {"epoch": 3}
    optimizer.load_state_dict(state_dict)
    assert optimizer.state_dict()["state"]["of the run"] == {"epoch": 3}
    run(optimizer, range(4, 5))
