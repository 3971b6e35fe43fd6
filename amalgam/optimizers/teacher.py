"""A teacher as an optimizer, to stand beside the student that it taught."""

from __future__ import annotations

from typing import Any

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
        super().__init__(params, {"lr": 1.0 if rate is None else rate})

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
        return super()._loaded_entry(group, theirs, param, entry)

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
