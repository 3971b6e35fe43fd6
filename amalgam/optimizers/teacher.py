"""A teacher as an optimizer, to stand beside the student that it taught."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from amalgam.layout import Layout
from amalgam.optimizers.base import StepOptimizer, computing_dtype
from amalgam.policies import AnyTeacher, Teacher


class TeacherOptimizer(StepOptimizer):
    """A teacher as an optimizer, to stand beside the student it taught; each tensor on its own.

    Args:
        params: Parameters or groups, floating point.
        teacher: A :class:`Teacher`, a kind for one with the paper's settings, a
            :class:`TorchTeacher`, or any :class:`AnyTeacher` that is no policy. Its learning rate
            is then the groups' ``lr``, which schedulers may drive; where it has none, ``lr`` is 1
            and multiplies its updates.

    Raises:
        TypeError: A parameter is not floating point.
        ValueError: There is no such kind, or the teacher is a policy.
    """

    def __init__(self, params: Any, teacher: AnyTeacher | str) -> None:
        self.teacher: AnyTeacher = Teacher(teacher) if isinstance(teacher, str) else teacher
        if self.teacher.policy is not None:
            raise ValueError(
                f"teacher must be no policy, as {teacher} is; PolicyOptimizer(params, "
                f"teacher.policy) makes an optimizer of that"
            )
        rate = self.teacher.lr
        # State is of use to a teacher with the same constants alone; rates are the groups'.
        alike = self.teacher if rate is None else self.teacher.at(1.0)
        super().__init__(params, {"lr": 1.0 if rate is None else rate, "teacher": repr(alike)})

    def _check_loaded(self, group: dict[str, Any], theirs: dict[str, Any]) -> None:
        ours = self.defaults["teacher"]
        # Those of earlier versions do not say whose they are.
        loaded = theirs.get("teacher", ours)
        if loaded != ours:
            raise ValueError(
                f"state_dict belongs to another teacher ({loaded}) than this optimizer's ({ours}); "
                f"load it into one made with that teacher"
            )

    def _loaded_entry(
        self,
        group: dict[str, Any],
        theirs: dict[str, Any],
        param: Tensor,
        entry: dict[str, Any],
    ) -> dict[str, Any]:
        if entry and "teacher" not in entry:
            raise ValueError(
                "state_dict must hold each tensor's state as 'teacher', but is of an earlier "
                "version of amalgam; begin anew, or go on with that version"
            )
        return _in_dtype(entry, computing_dtype(param.dtype))

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, teacher, factor = float(group["lr"]), self.teacher, 1.0
        if teacher.lr is None:
            factor = lr
        elif lr != teacher.lr:
            teacher = teacher.at(lr)
        for param in params:
            state, dtype = self.state[param], computing_dtype(param.dtype)
            layout = Layout({"": param.shape})
            flat, grad = (t.to(dtype).reshape(-1) for t in (param, param.grad))  # type: ignore[union-attr]
            if not state:
                state["teacher"] = teacher.initial_state(flat, layout)
            update, state["teacher"] = teacher.step(flat, grad, state["teacher"], layout)
            if factor != 1:
                update = update * factor
            param.sub_(update.view(param.shape).to(param.dtype))


def _in_dtype(state: Any, dtype: torch.dtype) -> Any:
    """A copy of a teacher's state, as a teacher keeps it that computes in a dtype.

    Beside float64 some numbers are float32, those of steps among them: what was kept so stays.
    """
    if dtype == torch.float64 and torch.float64 in {t.dtype for t in _tensors(state)}:
        return copy.deepcopy(state)
    return _cast(state, dtype)


def _tensors(nest: Any) -> list[Tensor]:
    if isinstance(nest, dict | list | tuple):
        parts = nest.values() if isinstance(nest, dict) else nest
        return [tensor for part in parts for tensor in _tensors(part)]
    return [nest] if isinstance(nest, Tensor) else []


def _cast(nest: Any, dtype: torch.dtype, key: str = "") -> Any:
    """A copy of a nest with its floating-point tensors in a dtype, but for counts of steps."""
    if isinstance(nest, dict):
        return {name: _cast(part, dtype, name) for name, part in nest.items()}
    if isinstance(nest, list | tuple):
        return type(nest)(_cast(part, dtype, key) for part in nest)
    if not isinstance(nest, Tensor):
        return nest
    counts = key.rpartition("/")[2] == "step" or not nest.is_floating_point()
    return nest.clone() if counts else nest.to(dtype, copy=True)
