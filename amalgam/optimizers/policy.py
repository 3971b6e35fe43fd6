"""Any learned policy as an optimizer, by the policy's own step."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor

from amalgam import ops
from amalgam.layout import Layout
from amalgam.optimizers.base import LearnedOptimizer, computing_dtype, warn_of_adamws_numbers
from amalgam.optimizers.identity import identity_of
from amalgam.optimizers.schedule import PEAK
from amalgam.policies import FusedStudent, Policy, load_policy


class PolicyOptimizer(LearnedOptimizer):
    """Any learned policy as an optimizer: :class:`Choice`, the baselines, one's own.

    The first ``warmup_steps`` are SGD, then every parameter becomes
    ``p (1 - lr weight_decay) - lr update``; a step with a gradient that is not finite is not taken.
    All that is as in :class:`AmalgamatedOptimizer`, which is faster and takes only students. A
    policy that does not step coordinatewise sees, in every step, all of a group's parameters that
    have a gradient.

    Args:
        params: Parameters or groups, floating point; float64 ones are computed in float64, all
            others in float32, in which their state is kept.
        policy: The policy, or a path to a file it was saved to. It is copied, here.
        lr: Factor on the policy's updates and on warm-up's; schedulers may drive it.
        backend: As in the policy's ``step``.
        warmup_steps: SGD steps before the policy takes over; 0 for none, ``None`` for what its
            configuration says.
        warmup_lr: Their learning rate; ``None`` likewise.
        weight_decay: Decoupled weight decay, multiplied by ``lr``.

    Raises:
        TypeError: A parameter is not floating point.
        ValueError: A setting is out of range, a backend's name unknown, or the file no policy;
            or a group of a policy that is not coordinatewise has parameters of several dtypes or
            devices.
        FileNotFoundError: ``policy`` is a path to no file.
    """

    def __init__(
        self,
        params: Any,
        policy: Policy | str | os.PathLike[str],
        lr: float | Tensor = 1.0,
        *,
        backend: str = "auto",
        warmup_steps: int | None = None,
        warmup_lr: float | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        ops.check_backend(backend)
        if not isinstance(policy, Policy):
            policy = load_policy(policy)
        self.backend = backend
        own = copy.deepcopy(policy).cpu().requires_grad_(False)
        self._policies = {(torch.device("cpu"), own.weights()[0].dtype): own}
        config = own.config
        defaults = {
            "lr": lr,
            PEAK: 0.0,
            "weight_decay": weight_decay,
            "warmup_steps": config.warmup_steps if warmup_steps is None else warmup_steps,
            "warmup_lr": config.warmup_lr if warmup_lr is None else warmup_lr,
            "policy": identity_of(own),
        }
        super().__init__(params, defaults)
        warn_of_adamws_numbers(self)

    def _config(self) -> Any:
        return next(iter(self._policies.values())).config

    def _paced(self) -> bool:
        policy = next(iter(self._policies.values()))
        return isinstance(policy, FusedStudent) and policy.paced

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        policy = next(iter(self._policies.values()))
        kinds = {(p.device, computing_dtype(p.dtype)) for p in group["params"]}
        if not policy.coordinatewise and len(kinds) > 1:
            raise ValueError(
                f"params must be of one dtype and device in each group, for a {policy.kind} steps "
                f"them together, not of {sorted(map(str, kinds))}"
            )

    def _loaded_entry(
        self,
        group: dict[str, Any],
        theirs: dict[str, Any],
        param: Tensor,
        entry: dict[str, Any],
    ) -> dict[str, Any]:
        return {
            name: value.detach().to(param.device, copy=True)
            if isinstance(value, Tensor) and name != "step"
            else copy.deepcopy(value)
            for name, value in entry.items()
        }

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if not params:
            return
        policy, left = self._policy_for(params[0]), float(self._left_of(group))
        by_progress: dict[bool, list[Tensor]] = {}
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            warming = bool(state["step"] < group["warmup_steps"])
            by_progress.setdefault(warming, []).append(param)
            state["step"] += 1
        for warming, batch in by_progress.items():
            for unit in [[param] for param in batch] if policy.coordinatewise else [batch]:
                self._step_unit(group, unit, warming, left)

    def _step_unit(
        self, group: dict[str, Any], unit: list[Tensor], warming: bool, left: float
    ) -> None:
        """Step parameters that the policy sees together."""
        policy = self._policy_for(unit[0])
        layout = Layout({str(index): param.shape for index, param in enumerate(unit)})
        dtype = policy.weights()[0].dtype
        grad = torch.cat([p.grad.reshape(-1).to(dtype) for p in unit if p.grad is not None])
        state = self._gather(policy, group, unit, grad, layout)
        if warming:
            rate = float(group["warmup_lr"])
            update, state = rate * grad, policy.warm_up(grad, state, layout=layout)
        else:
            seen: dict[str, Any] = {}
            if policy.sees_params:
                seen["params"] = torch.cat([param.reshape(-1).to(dtype) for param in unit])
            if self._paced():
                seen["left"] = left
            update, state = policy.step(grad, state, layout=layout, backend=self.backend, **seen)
        self._scatter(policy, group, unit, state)
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        for param, change in zip(unit, layout.unflatten(update).values(), strict=True):
            param.copy_(param.to(dtype) * (1 - lr * decay) - lr * change)

    def _gather(
        self,
        policy: Policy,
        group: dict[str, Any],
        unit: list[Tensor],
        grad: Tensor,
        layout: Layout,
    ) -> Any:
        """The policy's state of these parameters together; its shared fields are the group's."""
        begin = policy.initial_state(grad, layout)
        fields = {}
        for name, fresh in begin._asdict().items():
            if name in policy.shared:
                kept = group.get(f"shared.{name}", fresh)
                fields[name] = kept.to(fresh) if torch.is_tensor(kept) else kept
                continue
            parts = []
            for param in unit:
                if name not in self.state[param]:
                    alone = policy.initial_state(
                        grad.new_zeros(param.numel()), Layout({"": param.shape})
                    )
                    self.state[param][name] = getattr(alone, name)
                parts.append(self.state[param][name])
            # State that was loaded may be of an optimizer that computes in another dtype.
            whole = torch.cat(parts, -1).to(fresh.dtype) if torch.is_tensor(fresh) else parts[0]
            fields[name] = whole
        return begin._replace(**fields)

    def _scatter(
        self, policy: Policy, group: dict[str, Any], unit: list[Tensor], state: Any
    ) -> None:
        """Split a state into each parameter's, and keep its shared fields in the group."""
        sizes = [param.numel() for param in unit]
        for name, value in state._asdict().items():
            if name in policy.shared:
                group[f"shared.{name}"] = value
                continue
            if not torch.is_tensor(value):
                parts = [value] * len(unit)
            elif name in policy.per_tensor:
                # Tensors without coordinates have no column.
                parts = list(value.split([min(size, 1) for size in sizes], -1))
            else:
                parts = list(value.split(sizes, -1))
            for param, part in zip(unit, parts, strict=True):
                self.state[param][name] = part.clone() if torch.is_tensor(part) else part

    def _policy_for(self, param: Tensor) -> Policy:
        key = param.device, computing_dtype(param.dtype)
        if key not in self._policies:
            first = next(iter(self._policies.values()))
            self._policies[key] = copy.deepcopy(first).to(device=key[0], dtype=key[1])
        return self._policies[key]
