"""A frozen learned policy as a teacher: the optimal choice for a student, or a student for another.

Its weights are constants; only where it goes reaches whom it teaches (paper, eq. 4).
"""

from __future__ import annotations

import copy
import hashlib

import torch
from torch import Tensor

from amalgam.layout import Layout
from amalgam.policies.policy import Policy
from amalgam.policies.torch_teacher import TorchState


class PolicyTeacher:
    """A learned policy that teaches, its weights as they are now.

    Equal and hashed by its kind, configuration and weights, which ``repr`` shows in short. What it
    carries is a dictionary of its state's fields, tensors and numbers, ``{}`` before the first
    step.

    Args:
        policy: The policy; copied, so that training it further does not change the teacher.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = copy.deepcopy(policy).requires_grad_(False)
        digest = hashlib.blake2b(digest_size=8)
        for weight in self.policy.weights():
            digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
        self.digest = digest.hexdigest()
        self._policies: dict[torch.device, Policy] = {}

    @property
    def kind(self) -> str:
        """The policy's kind."""
        return self.policy.kind

    def step(
        self, grad: Tensor, state: TorchState, layout: Layout, backend: str = "auto"
    ) -> tuple[Tensor, TorchState]:
        """One step, outside any graph.

        Args:
            grad: The gradient, shape (N,), on any device.
            state: The carried state, on any device; not changed.
            layout: Which tensors the coordinates are.
            backend: What computes it; see :meth:`amalgam.policies.LearnedPolicy.step`.

        Returns:
            The update (N,), to be subtracted, and the new state.

        Raises:
            ValueError: The layout does not fit the gradient.
            RuntimeError: The backend asked for can't compute this policy here.
        """
        with torch.no_grad():
            update, new = self._policy_for(grad).step(
                grad, self._filled(grad, state, layout), layout=layout, backend=backend
            )
        return update, new._asdict()

    def warm_up(self, grad: Tensor, state: TorchState, layout: Layout) -> TorchState:
        """The state after a warm-up step's gradient (N,), on which the policy does not act."""
        with torch.no_grad():
            warmed = self._policy_for(grad).warm_up(
                grad, self._filled(grad, state, layout), layout=layout
            )
        carried: TorchState = warmed._asdict()
        return carried

    def _filled(self, grad: Tensor, state: TorchState, layout: Layout) -> object:
        begin = self._policy_for(grad).initial_state(grad, layout)
        carried = {
            name: value.to(grad.device) if isinstance(value, Tensor) else value
            for name, value in state.items()
        }
        return begin._replace(**carried)

    def _policy_for(self, grad: Tensor) -> Policy:
        """The policy on a gradient's device."""
        device = grad.device
        if device not in self._policies:
            here = self.policy.weights()[0].device == device
            self._policies[device] = self.policy if here else copy.deepcopy(self.policy).to(device)
        return self._policies[device]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PolicyTeacher) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"PolicyTeacher({self.kind} {self.digest}, {self.policy.config})"
