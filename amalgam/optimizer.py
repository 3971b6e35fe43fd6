"""Policies as ``torch.optim`` optimizers: the student, other learned ones, and the teachers."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from amalgam import ops
from amalgam.layout import Layout
from amalgam.operations.kept import Kept
from amalgam.operations.rounding import ROW
from amalgam.ops import StudentState
from amalgam.policies import Policy, Student, Teacher, TorchTeacher, load_policy

DEFAULT_STUDENT = "digits"
_STATE = StudentState._fields


class _PolicyOptimizer(Optimizer):
    """What the optimizers here share: closures, refusals, and steps taken whole or not at all."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._skipped: int | Tensor = 0

    @property
    def skipped_steps(self) -> int:
        """Steps not taken because a gradient was not finite (or too large to be squared).

        Parameters and state stayed as they were. With ``capturable``, counted on the device: to
        read it waits for that.
        """
        return int(self._skipped)

    def __getstate__(self) -> dict[str, Any]:
        """All but hooks; torch's own keeps three attributes, and copies would lack the rest."""
        return {name: value for name, value in self.__dict__.items() if "hook" not in name}

    @overload
    def step(self, closure: None = ...) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; with ``capturable``, without waiting for a GPU.

        Args:
            closure: Computes the loss anew, with gradients, and returns it.

        Returns:
            What the closure returned, or ``None``.

        Raises:
            RuntimeError: A gradient is sparse; or a CUDA graph captures a step that can't be in
                one, or a first one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [
            p.grad for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        if any(grad.is_sparse for grad in gradients):
            raise RuntimeError(
                f"{type(self).__name__} takes dense gradients only; for embeddings, sparse=False"
            )
        if all(group.get("capturable") for group in self.param_groups):
            self._step_on_device(gradients)
            return loss
        if _capturing():
            raise RuntimeError("a step in a CUDA graph needs all groups' capturable=True")
        if not all(map(_finite, _largest(gradients))):
            self._skipped += 1
            if self._skipped == 1:
                warnings.warn(
                    "a gradient was not finite: the step was skipped, parameters and state are "
                    "as they were. Further skips are counted in skipped_steps, without a word.",
                    RuntimeWarning,
                    stacklevel=3,
                )
            return loss
        for group in self.param_groups:
            self._step_group(group, [p for p in group["params"] if p.grad is not None])
        return loss

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        raise NotImplementedError

    def _step_on_device(self, gradients: list[Tensor]) -> None:
        raise NotImplementedError


def _largest(gradients: Iterable[Tensor]) -> Iterator[Tensor]:
    """The largest magnitude of the gradients of each device and dtype."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in gradients:
        if grad.numel():
            by_kind.setdefault((grad.device, grad.dtype), []).append(grad)
    for grads in by_kind.values():
        yield torch.stack(torch._foreach_norm(grads, math.inf)).max()


def _finite(largest: Tensor) -> Tensor:
    """Whether a magnitude is finite and small enough to be squared in float32."""
    return largest < math.sqrt(torch.finfo(_computing(largest.dtype)).max)


def _computing(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute and keep state in for parameters of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_group(group: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if not float(group[name]) >= 0:
            raise ValueError(f"{name} must be 0 or more, not {group[name]}")
    for param in group["params"]:
        if not param.is_floating_point():
            raise TypeError(f"params must be floating-point tensors, not {param.dtype}")


class _LearnedOptimizer(_PolicyOptimizer):
    """What the optimizers with learned weights share: whose weights they are, and their state."""

    _subject = "policy"

    def _policy_state(self, entry: dict[str, Any]) -> list[str]:
        """The names of a parameter's state that are the policy's."""
        return [name for name, value in entry.items() if name != "step" and torch.is_tensor(value)]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            TypeError: A parameter is not floating point.
            ValueError: A setting is out of range.
        """
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            _check_group(group, ("lr", "weight_decay", "warmup_steps", "warmup_lr"))
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from another's :meth:`state_dict`.

        Args:
            state_dict: As an optimizer with the same policy gave it; not changed. State keeps
                the dtype it was saved in, whatever the parameters' is.

        Raises:
            ValueError: It comes from another policy, or its groups do not fit.
        """
        subject = self._subject
        for group in state_dict["param_groups"]:
            theirs, ours = group.get(subject), self.defaults[subject]
            if theirs != ours:
                raise ValueError(
                    f"state_dict belongs to another {subject} ({theirs}) than this optimizer's "
                    f"({ours}); load it into one made with that {subject}"
                )
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, param in zip(saved, own, strict=True):
            entry = state_dict["state"].get(index, {})
            for name in self._policy_state(entry):
                # Optimizer.load_state_dict casts state to the parameter's dtype.
                self.state[param][name] = entry[name].detach().to(param.device, copy=True)


class AmalgamatedOptimizer(_LearnedOptimizer):
    """A learned optimizer where AdamW was: the student steps on every coordinate.

    The first ``warmup_steps`` are SGD, during which the student only watches (its moments follow,
    its LSTM waits): so it was meta-trained. Then every parameter becomes
    ``p (1 - lr weight_decay) - lr update``. Source: Optimizer Amalgamation (ICLR 2022).

    A step in which any gradient is not finite is not taken, and counted in ``skipped_steps``.

    Args:
        params: Parameters or groups, floating point; float64 ones are computed in float64, all
            others in float32, in which their state is kept.
        lr: Factor on the student's updates and on warm-up's, 1 for as it was trained; schedulers
            may drive it.
        student: A :class:`Student`, a shipped one's name, or a path to a file it was saved to.
            Its weights are taken once, here.
        backend: ``"auto"`` for the fastest that works, or a backend's name.
        warmup_steps: SGD steps before the student takes over; 0 for none, ``None`` for what the
            student was trained with.
        warmup_lr: Their learning rate; ``None`` for what the student was trained with.
        weight_decay: Decoupled weight decay, multiplied by ``lr`` as in AdamW; as ``lr`` is 1 here
            and not 1e-3, useful values are a thousand times smaller.
        cells_dtype: ``torch.bfloat16`` keeps the LSTM's state of parameters that are computed in
            float32 in half the memory, rounded after every step.
        rounding: ``"nearest"``, or ``"stochastic"``: the LSTM's state and parameters, where they
            are bfloat16, are rounded up or down at random and right on average, so that updates
            below a parameter's last bit are not lost. (To float16, always nearest.)
        seed: Of that, in [0, 2^32): the same seed, steps and gradients give the same bits.
        capturable: As PyTorch's optimizers have it: a step waits for no GPU, so that a CUDA graph
            can hold it. ``lr`` and ``weight_decay`` may be tensors on the device and count when the
            graph is replayed; steps are counted, warm-up ended and non-finite gradients skipped on
            the device, without the warning. Take a step before capturing, so that all state exists.

    Raises:
        TypeError: A parameter is not floating point.
        ValueError: A setting is out of range, a backend's name unknown, or the file no student.
        FileNotFoundError: ``student`` is neither a name nor a file.
    """

    _subject = "student"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        student: Student | str | os.PathLike[str] = DEFAULT_STUDENT,
        backend: str = "auto",
        warmup_steps: int | None = None,
        warmup_lr: float | None = None,
        weight_decay: float = 0.0,
        *,
        cells_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        capturable: bool = False,
    ) -> None:
        ops.check_backend(backend)
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding must be 'nearest' or 'stochastic', not {rounding!r}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2^32), not {seed}")
        if cells_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"cells_dtype must be float32, bfloat16 or None, not {cells_dtype}")
        if not isinstance(student, Student):
            student = Student.load(student)
        self.backend = backend
        self.cells_dtype = cells_dtype
        self.config = student.config
        own = [
            w.detach().cpu().clone(memory_format=torch.contiguous_format) for w in student.weights()
        ]
        self._weights = {(torch.device("cpu"), own[0].dtype): own}
        self._kept = Kept()
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "warmup_steps": self.config.warmup_steps if warmup_steps is None else warmup_steps,
            "warmup_lr": self.config.warmup_lr if warmup_lr is None else warmup_lr,
            "student": _digest(own),
            "rounding": rounding,
            "seed": seed,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler asks: whether step() reads its scale and flag, and the host need not."""
        return all(group["capturable"] for group in self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from another's :meth:`state_dict` with the same student."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for param in group["params"]:
                if param in self.state:
                    step = self.state[param]["step"]
                    self.state[param]["step"] = step.to(_home_of_steps(group, param))

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if group["rounding"] == "stochastic":
            self._step_with_steps(group, params, {})
            return
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        trained = []
        for param in params:
            state = self._state_of(group, param)
            if state["step"] < group["warmup_steps"]:
                rate = lr * float(group["warmup_lr"])
                ops.warm_up_(
                    *(param, param.grad, state["m"], state["v"], self.config.settings),  # type: ignore[arg-type]
                    keep=1 - lr * decay,
                    rate=rate,
                )
            else:
                trained.append(param)
            state["step"] += 1
        for batch in _alike(trained):
            self._run(batch, lr=lr, weight_decay=decay)

    def _step_on_device(self, gradients: list[Tensor]) -> None:
        scale, found = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        if scale is not None:
            for device in {grad.device for grad in gradients}:
                on_device = [grad for grad in gradients if grad.device == device]
                torch._foreach_div_(on_device, scale.to(device, non_blocking=True))
        flags = [~_finite(largest) for largest in _largest(gradients)]
        flags += [] if found is None else [found.reshape(()) != 0]
        skip: dict[torch.device, Tensor] = {}
        if flags:
            home = flags[0].device
            flag = torch.stack([each.to(home, non_blocking=True) for each in flags]).any()
            if not isinstance(self._skipped, Tensor):
                _check_before_capture()
                self._skipped = torch.full((), self._skipped, device=home)
            self._skipped += flag.to(self._skipped.device, non_blocking=True)
            for device in {grad.device for grad in gradients}:
                skip[device] = flag.to(device, torch.float32, non_blocking=True)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            self._step_with_steps(group, params, skip)

    def _step_with_steps(
        self, group: dict[str, Any], params: list[Tensor], skip: dict[torch.device, Tensor]
    ) -> None:
        """A step by what the devices hold: how many steps were taken, and whether to skip this."""
        for param in params:
            self._state_of(group, param)
        seeds = None
        if group["rounding"] == "stochastic":
            every = chain.from_iterable(g["params"] for g in self.param_groups)
            seeds = {p: _seed_of(group["seed"], number) for number, p in enumerate(every)}
        for batch in _alike(params):
            device = batch[0].device
            steps = [self.state[param]["step"] for param in batch]
            self._run(
                batch,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                steps=steps,
                warmup_steps=group["warmup_steps"],
                warmup_lr=float(group["warmup_lr"]),
                skip=skip.get(device),
                seeds=None if seeds is None else [seeds[param] for param in batch],
            )
            if device in skip:
                # A list, as PyTorch would read one tensor back as a number, and wait for it.
                torch._foreach_add_(steps, [1 - skip[device]] * len(steps))
            else:
                torch._foreach_add_(steps, 1)

    def _run(self, batch: list[Tensor], **how: Any) -> None:
        with self._kept:
            ops.student_step_(
                batch,
                [param.grad for param in batch if param.grad is not None],
                [StudentState(*(self.state[p][name] for name in _STATE)) for p in batch],
                self._weights_for(batch[0].device, _computing(batch[0].dtype)),
                self.config.settings,
                backend=self.backend,
                **how,
            )

    def _state_of(self, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if not state:
            _check_before_capture()
            dtype = _computing(param.dtype)
            weights = self._weights_for(param.device, dtype)
            cells = self.cells_dtype if dtype == torch.float32 else None
            state["step"] = torch.zeros((), device=_home_of_steps(group, param))
            state.update(ops.initial_state(param, weights, cells)._asdict())
        return state

    def _weights_for(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        if (device, dtype) not in self._weights:
            own = next(iter(self._weights.values()))
            self._weights[device, dtype] = [w.to(device, dtype) for w in own]
        return self._weights[device, dtype]


class PolicyOptimizer(_LearnedOptimizer):
    """Any learned policy as an optimizer: :class:`Choice`, the baselines, one's own.

    As :class:`AmalgamatedOptimizer`, which is faster and takes a :class:`Student` alone: the first
    ``warmup_steps`` are SGD, then every parameter becomes ``p (1 - lr weight_decay) - lr update``,
    and a step with a gradient that is not finite is not taken. A policy that does not step
    coordinatewise sees, in every step, all of a group's parameters that have a gradient.

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
            "weight_decay": weight_decay,
            "warmup_steps": config.warmup_steps if warmup_steps is None else warmup_steps,
            "warmup_lr": config.warmup_lr if warmup_lr is None else warmup_lr,
            "policy": f"{own.kind} {_digest(own.weights())}",
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            TypeError: A parameter is not floating point.
            ValueError: A setting is out of range, or a policy that is not coordinatewise is to
                step parameters of several dtypes or devices together.
        """
        super().add_param_group(param_group)
        policy = next(iter(self._policies.values()))
        kinds = {(p.device, _computing(p.dtype)) for p in self.param_groups[-1]["params"]}
        if not policy.coordinatewise and len(kinds) > 1:
            self.param_groups.pop()
            raise ValueError(
                f"params must be of one dtype and device in each group, for a {policy.kind} steps "
                f"them together, not of {sorted(map(str, kinds))}"
            )

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if not params:
            return
        policy = self._policy_for(params[0])
        by_progress: dict[bool, list[Tensor]] = {}
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros(())
            warming = bool(state["step"] < group["warmup_steps"])
            by_progress.setdefault(warming, []).append(param)
            state["step"] += 1
        for warming, batch in by_progress.items():
            for unit in [[param] for param in batch] if policy.coordinatewise else [batch]:
                self._step_unit(group, unit, warming)

    def _step_unit(self, group: dict[str, Any], unit: list[Tensor], warming: bool) -> None:
        """Step parameters that the policy is to see together."""
        policy = self._policy_for(unit[0])
        layout = Layout({str(index): param.shape for index, param in enumerate(unit)})
        dtype = policy.weights()[0].dtype
        grad = torch.cat([p.grad.reshape(-1).to(dtype) for p in unit if p.grad is not None])
        state = self._gather(policy, group, unit, grad, layout)
        if warming:
            rate = float(group["warmup_lr"])
            update, state = rate * grad, policy.warm_up(grad, state, layout=layout)
        else:
            update, state = policy.step(grad, state, layout=layout, backend=self.backend)
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
        """The policy's state of parameters together, from what is kept of each and of all."""
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
            fields[name] = torch.cat(parts, -1) if torch.is_tensor(fresh) else parts[0]
        return begin._replace(**fields)

    def _scatter(
        self, policy: Policy, group: dict[str, Any], unit: list[Tensor], state: Any
    ) -> None:
        """Keep a state by parameter, and what is of all by group."""
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
        key = param.device, _computing(param.dtype)
        if key not in self._policies:
            first = next(iter(self._policies.values()))
            self._policies[key] = copy.deepcopy(first).to(device=key[0], dtype=key[1])
        return self._policies[key]


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _check_before_capture() -> None:
    """Refuse to have a graph make state: every replay would make it anew."""
    if _capturing():
        raise RuntimeError(
            "take a step with every parameter's gradient before capturing one in a CUDA graph, "
            "which would reset at every replay what its first step makes"
        )


def _home_of_steps(group: dict[str, Any], param: Tensor) -> torch.device:
    """Where a parameter's steps are counted: where they are read."""
    on_device = group["capturable"] or group["rounding"] == "stochastic"
    return param.device if on_device else torch.device("cpu")


def _alike(params: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Batches that one call can step: on one device, computed in one dtype."""
    batches: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in params:
        batches.setdefault((param.device, _computing(param.dtype)), []).append(param)
    return batches.values()


def _seed_of(seed: int, number: int) -> int:
    """A parameter's own seed; of neighbours, far apart."""
    return (seed + number * ROW) % 2**32


def _digest(weights: Iterable[Tensor]) -> str:
    """A short fingerprint of weights, to tell policies apart."""
    digest = hashlib.blake2b(digest_size=8)
    for weight in weights:
        digest.update(weight.to(torch.float64).numpy().tobytes())
    return digest.hexdigest()


class TeacherOptimizer(_PolicyOptimizer):
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
            _check_group(group, ("lr",))

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
            dtype = _computing(param.dtype)
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
        state, dtype = self.state[param], _computing(param.dtype)
        flat, grad = (t.to(dtype).reshape(-1) for t in (param, param.grad))  # type: ignore[union-attr]
        layout = Layout({"": param.shape})
        if lr != how.lr:
            how = how.at(lr)
        update, state["teacher"] = how.step(flat, grad, state.get("teacher", {}), layout)
        return update
