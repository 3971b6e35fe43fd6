"""A teacher as an optimizer, to stand beside the student that it taught."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amalgam import ops
from amalgam.layout import Layout
from amalgam.optimizers.base import StepOptimizer, check_group, computing_dtype
from amalgam.policies import Teacher, TorchTeacher


class TeacherOptimizer(StepOptimizer):
    """A teacher as an optimizer, to stand beside the student it taught.

    Args:
        params: Parameters or groups, floating point.
        teacher: A :class:`Teacher`, a kind for one with the paper's settings, or a
            :class:`TorchTeacher`. Its rate is then the groups' ``lr``, which schedulers may drive.

    Raises:
        TypeError: A parameter is not floating point.
        ValueError: There is no such kind.
    """

    def __init__(self, params: Any, teacher: Teacher | TorchTeacher | str) -> None:
        self.teacher = Teacher(teacher) if isinstance(teacher, str) else teacher
        super().__init__(params, {"lr": self.teacher.lr})
        for group in self.param_groups:
            check_group(group, ("lr",))

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, how = float(group["lr"]), self.teacher
        for param in params:
            if isinstance(how, Teacher):
                update = self._analytical_update(how, param, lr)
            else:
                update = self._torch_update(how, param, lr)
            param.sub_(update.view(param.shape).to(param.dtype))

    def _analytical_update(self, how: Teacher, param: Tensor, lr: float) -> Tensor:
        state = self.state[param]
        if not state:
            dtype = computing_dtype(param.dtype)
            state["m"] = torch.zeros_like(param, dtype=dtype).reshape(1, -1)
            state["v"] = state["m"].clone()
        update, state["m"], state["v"] = ops.teacher_step(
            param.grad.to(state["m"].dtype).reshape(1, -1),  # type: ignore[union-attr]
            state["m"],
            state["v"],
            [how.kind],
            [lr],
            [how.beta1],
            [how.beta2],  # type: ignore[list-item]
            [how.eps],
        )
        return update

    def _torch_update(self, how: TorchTeacher, param: Tensor, lr: float) -> Tensor:
        """As the optimizer itself would, but that each tensor is a group of its own."""
        state, dtype = self.state[param], computing_dtype(param.dtype)
        flat, grad = (t.to(dtype).reshape(-1) for t in (param, param.grad))  # type: ignore[union-attr]
        layout = Layout({"": param.shape})
        if lr != how.lr:
            how = how.at(lr)
        update, state["teacher"] = how.step(flat, grad, state.get("teacher", {}), layout)
        return update
