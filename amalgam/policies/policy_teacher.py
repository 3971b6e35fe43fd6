"""A frozen learned policy as a teacher: the optimal choice for a student, or a student for another.

Its weights are constants. A student learns from the parameters that it reaches (paper, eq. 4).
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from amalgam.digest import digest_of
from amalgam.layout import Layout
from amalgam.policies.policy import Policy


class PolicyTeacher:
    """A learned policy that teaches with the weights that it has now.

    Two are equal, and hash alike, if their kinds, configurations and weights are equal; ``repr``
    shows the first two and a digest of the weights. The state is a dictionary of the fields of the
    policy's state, ``{}`` before the first step.

    Args:
        policy: The policy; copied, so that training it further does not change the teacher.

    Attributes:
        policy: The copy.
        digest: A digest of its weights, 16 hexadecimal digits.
        lr: ``None``: a policy has no learning rate.
    """

    lr: ClassVar[None] = None

    def __init__(self, policy: Policy) -> None:
        self.policy = copy.deepcopy(policy).requires_grad_(False)
        self.digest = digest_of(self.policy.weights())
        self._policies: dict[tuple[torch.device, torch.dtype], Policy] = {}

    @property
    def kind(self) -> str:
        """The policy's kind."""
        return self.policy.kind

    @property
    def label(self) -> str:
        """The digest of its weights."""
        return self.digest

    def at(self, lr: float) -> NoReturn:
        """Raise ValueError: a policy has no learning rate."""
        raise ValueError(f"lr can't be set to {lr:g}: {self} has no learning rate")

    def initial_state(self, like: Tensor, layout: Layout | None = None) -> dict[str, Any]:
        """The state before the first step, ``{}``: the first step knows the layout."""
        return {}

    def step(
        self,
        params: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        layout: Layout,
        backend: str = "auto",
    ) -> tuple[Tensor, dict[str, Any]]:
        """One step, outside any graph.

        Args:
            params: The parameters, shape (N,), for policies that see them.
            grad: The gradient, shape (N,), on any device.
            state: The carried state, on any device; not changed.
            layout: Which tensors the coordinates are.
            backend: What computes it; see :meth:`amalgam.policies.Policy.step`.

        Returns:
            The update (N,), to be subtracted, and the new state.

        Raises:
            ValueError: The layout does not fit the gradient.
            RuntimeError: The backend asked for can't compute this policy here.
        """
        seen: dict[str, Any] = {"params": params} if self.policy.sees_params else {}
        with torch.no_grad():
            update, new = self._policy_for(grad).step(
                grad, self._filled(grad, state, layout), layout=layout, backend=backend, **seen
            )
        return update, new._asdict()

    def warm_up(
        self, params: Tensor, grad: Tensor, state: dict[str, Any], layout: Layout
    ) -> dict[str, Any]:
        """The state after a warm-up step's gradient (N,), on which the policy does not act."""
        with torch.no_grad():
            warmed = self._policy_for(grad).warm_up(
                grad, self._filled(grad, state, layout), layout=layout
            )
        fields: dict[str, Any] = warmed._asdict()
        return fields

    def _filled(self, grad: Tensor, state: dict[str, Any], layout: Layout) -> Any:
        """The policy's own state, on the gradient's device."""
        begin = self._policy_for(grad).initial_state(grad, layout)
        fields = {
            name: value.to(grad.device) if isinstance(value, Tensor) else value
            for name, value in state.items()
        }
        return begin._replace(**fields)

    def _policy_for(self, grad: Tensor) -> Policy:
        """The policy on a gradient's device, in its dtype."""
        where = grad.device, grad.dtype
        if where not in self._policies:
            weight = self.policy.weights()[0]
            fits = (weight.device, weight.dtype) == where
            self._policies[where] = self.policy if fits else copy.deepcopy(self.policy).to(*where)
        return self._policies[where]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PolicyTeacher) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"PolicyTeacher({self.kind} {self.digest}, {self.policy.config})"
