"""The student as an optimizer, by its fused step."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam import ops
from amalgam.digest import digest_of
from amalgam.operations.kept import Kept
from amalgam.operations.largest_magnitude import largest_magnitudes
from amalgam.operations.rounding import ROW
from amalgam.ops import StudentState, StudentTensors
from amalgam.optimizers.base import (
    LearnedOptimizer,
    check_before_capture,
    computing_dtype,
    finite,
)
from amalgam.policies import FusedStudent, NominalStudent, load_policy
from amalgam.policies.fused_student import ContextConstants, TensorContext

DEFAULT_STUDENT = "standard"
_STATE = StudentState._fields


class AmalgamatedOptimizer(LearnedOptimizer):
    """A learned optimizer where AdamW was: the student steps on every coordinate.

    Every parameter becomes ``p (1 - lr weight_decay) - lr update``. A :class:`NominalStudent`
    steps from the beginning. The paper's :class:`Student` needs ``warmup_steps`` of SGD first,
    during which it only watches (its moments follow, its LSTM waits): so it was meta-trained.
    Source: Optimizer Amalgamation (ICLR 2022).

    A step in which any gradient is not finite is not taken, and counted in ``skipped_steps``.

    Args:
        params: Parameters or groups, floating point; float64 ones are computed in float64, all
            others in float32, in which their state is kept.
        lr: Factor on the student's updates and on warm-up's, 1 for as it was trained; schedulers
            may drive it.
        student: A :class:`NominalStudent` or a :class:`Student`, a shipped one's name, or a path to
            a file it was saved to. Its weights are taken once, here.
        backend: ``"auto"`` for the fastest that works, or a backend's name.
        warmup_steps: SGD steps before the student takes over; 0 for none, ``None`` for what the
            student was trained with.
        warmup_lr: Their learning rate; ``None`` for what the student was trained with.
        weight_decay: Decoupled weight decay, multiplied by ``lr`` as in AdamW; as ``lr`` is 1 here
            and not 1e-3, useful values are a thousand times smaller.
        cells_dtype: ``torch.bfloat16`` keeps the LSTM's state of parameters that are computed in
            float32 in half the memory, rounded after every step.
        moments_dtype: ``torch.bfloat16`` keeps m and v likewise; it needs ``"stochastic"``
            rounding, as v changes by less than its last bit in a step.
        rounding: ``"nearest"``, or ``"stochastic"``: state and parameters, where they are bfloat16,
            are rounded up or down at random and right on average, so that updates below a
            parameter's last bit are not lost. (To float16, always nearest.)
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
        student: FusedStudent | str | os.PathLike[str] = DEFAULT_STUDENT,
        backend: str = "auto",
        warmup_steps: int | None = None,
        warmup_lr: float | None = None,
        weight_decay: float = 0.0,
        *,
        cells_dtype: torch.dtype | None = None,
        moments_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        capturable: bool = False,
    ) -> None:
        ops.check_backend(backend)
        check_stored("cells_dtype", cells_dtype)
        check_stored("moments_dtype", moments_dtype)
        student = student_of(student)
        self.backend = backend
        self.cells_dtype = cells_dtype
        self.moments_dtype = moments_dtype
        self.config = student.config
        self._student = copy.deepcopy(student).cpu().requires_grad_(False)
        own = [
            w.detach().cpu().clone(memory_format=torch.contiguous_format) for w in student.weights()
        ]
        self._weights = {(torch.device("cpu"), own[0].dtype): _weights_of(student, own)}
        self._kept = Kept()
        self._constants: dict[Any, ContextConstants | None] = {}
        self._batches: dict[int, _Made] = {}
        self._entries: list[dict[str, Any]] = []
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "warmup_steps": self.config.warmup_steps if warmup_steps is None else warmup_steps,
            "warmup_lr": self.config.warmup_lr if warmup_lr is None else warmup_lr,
            "student": digest_of(weight.double() for weight in own),
            "rounding": rounding,
            "seed": seed,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler asks: whether step() reads its scale and flag, and the host need not."""
        return all(group["capturable"] for group in self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_batches": {}, "_entries": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_batches" in state:  # a copy, and not load_state_dict
            self._count_all_together()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            TypeError: A parameter is not floating point.
            ValueError: A setting is out of range.
        """
        super().add_param_group(param_group)
        try:
            self._check_rounding(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_rounding(self, group: dict[str, Any]) -> None:
        rounding, seed = group["rounding"], group["seed"]
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding must be 'nearest' or 'stochastic', not {rounding!r}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2^32), not {seed}")
        if self.moments_dtype == torch.bfloat16 and rounding != "stochastic":
            raise ValueError(
                "moments_dtype=torch.bfloat16 needs rounding='stochastic', as the second moment "
                f"changes by less than its last bit in a step; rounding is {rounding!r}"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from another's :meth:`state_dict` with the same student.

        Raises:
            ValueError: It comes from another student, its groups do not fit, or its rounding does
                not fit ``moments_dtype``.
        """
        for group in state_dict["param_groups"]:
            self._check_rounding({**self.defaults, **group})
        self._batches.clear()
        self._entries.clear()
        super().load_state_dict(state_dict)
        self._count_all_together()

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if group["rounding"] == "stochastic":
            self._step_with_steps(group, params, {})
            return
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        for batch in self._batches_of(group, params):
            warming = batch.below(group["warmup_steps"])
            self._warm_up(group, [batch.tensors.params[index] for index in warming])
            trained = batch.without(warming, self._constants_of) if warming else batch
            self._run(trained, lr=lr, weight_decay=decay)
            batch.count(1)

    def _warm_up(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        for param in params:
            state = self.state[param]
            ops.warm_up_(
                *(param, param.grad, state["m"], state["v"], self.config.settings),  # type: ignore[arg-type]
                keep=1 - lr * decay,
                rate=lr * float(group["warmup_lr"]),
            )

    def _step_on_device(self, gradients: list[Tensor]) -> None:
        scale, found = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        if scale is not None:
            for device in {grad.device for grad in gradients}:
                on_device = [grad for grad in gradients if grad.device == device]
                torch._foreach_div_(on_device, scale.to(device, non_blocking=True))
        flags = [~finite(largest) for largest in largest_magnitudes(gradients)]
        flags += [] if found is None else [found.reshape(()) != 0]
        skip: dict[torch.device, Tensor] = {}
        if flags:
            home = flags[0].device
            flag = torch.stack([each.to(home, non_blocking=True) for each in flags]).any()
            if not isinstance(self._skipped, Tensor):
                check_before_capture()
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
        seeds = None
        if group["rounding"] == "stochastic":
            every = chain.from_iterable(g["params"] for g in self.param_groups)
            seeds = {p: _seed_of(group["seed"], number) for number, p in enumerate(every)}
        for batch in self._batches_of(group, params):
            written = batch.tensors.params
            device = written[0].device
            self._run(
                batch,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                steps=batch.steps,
                warmup_steps=group["warmup_steps"],
                warmup_lr=float(group["warmup_lr"]),
                skip=skip.get(device),
                seeds=None if seeds is None else [seeds[param] for param in written],
            )
            batch.count(1 - skip[device] if device in skip else 1)

    def _run(self, batch: _Batch, **how: Any) -> None:
        params = batch.tensors.params
        if not params:
            return
        weights = self._weights_for(params[0].device, computing_dtype(params[0].dtype))
        context = batch.context(self._student, weights.own[0])
        operation, settings = self._student.with_context(weights.operation, weights.own, context)
        with self._kept:
            ops.step_tensors_(
                batch.tensors,
                [grad for grad in map(_grad, params) if grad is not None],
                operation,
                settings._replace(sizes=()),
                backend=self.backend,
                **how,
            )

    def _begin_step(self) -> None:
        # Looking a parameter up in the dictionary would hash it, which takes longer than all this.
        entries = list(self.state.values())
        if not (_same(entries, self._entries) and all(entries)):
            self._entries = entries
            self._batches.clear()

    def _batches_of(self, group: dict[str, Any], params: list[Tensor]) -> list[_Batch]:
        """The group's parameters in batches of one device and computing dtype, one call each.

        They are kept while these parameters are stepped, stay where they are, and keep their state.
        """
        made = self._batches.get(id(group))
        if (
            made is not None
            and _same(made.params, params)
            and made.devices == list(map(_device, params))
            and all(batch.has_its_state() for batch in made.batches)
        ):
            return made.batches
        self._make_state(group, [param for param in params if not self.state[param]])
        kinds: dict[tuple[Any, ...], list[Tensor]] = {}
        for param in params:
            state = self.state[param]
            stored = state["m"].dtype, state["h"].dtype
            kind = param.device, computing_dtype(param.dtype), *stored
            kinds.setdefault(kind, []).append(param)
        batches = [
            _Batch(alike, [self.state[p] for p in alike], self._constants_of(alike))
            for alike in kinds.values()
        ]
        self._batches[id(group)] = _Made(params, list(map(_device, params)), batches)
        self._entries = list(self.state.values())
        return batches

    def _constants_of(self, params: list[Tensor]) -> ContextConstants | None:
        """What the student is told of parameters that stays, kept as long as the optimizer.

        A CUDA graph that captured a step of theirs reads it.
        """
        if not params:
            return None
        like = self._weights_for(params[0].device, computing_dtype(params[0].dtype)).own[0]
        shapes = tuple(map(_shape, params))
        key = shapes, like.device, like.dtype
        if key not in self._constants:
            if isinstance(self._student, NominalStudent):
                check_before_capture()
            self._constants[key] = self._student.constants_of(shapes, like)
        return self._constants[key]

    def _make_state(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if params:
            check_before_capture()
        for param in params:
            dtype = computing_dtype(param.dtype)
            weights = self._weights_for(param.device, dtype)
            narrow = (self.cells_dtype, self.moments_dtype) if dtype == torch.float32 else ()
            state = self.state[param]
            state["step"] = torch.zeros((), device="cpu")
            state.update(ops.initial_state(param, weights.own, *narrow)._asdict())
        self._count_together(group, params)

    def _count_all_together(self) -> None:
        for group in self.param_groups:
            self._count_together(group, [p for p in group["params"] if p in self.state])

    def _count_together(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Make the parameters' counts of steps views of one tensor a device.

        One operation then counts a step of them all. It is done when counts are made, loaded or
        copied, and never later: a CUDA graph reads them where they are.
        """
        homes: dict[torch.device, list[dict[str, Any]]] = {}
        for param in params:
            home = _home_of_steps(group, param)
            homes.setdefault(home, []).append(self.state[param])
        for home, entries in homes.items():
            counts = torch.stack([entry["step"].to(home, torch.float32) for entry in entries])
            for entry, count in zip(entries, counts.unbind(), strict=True):
                entry["step"] = count

    def _weights_for(self, device: torch.device, dtype: torch.dtype) -> _Weights:
        if (device, dtype) not in self._weights:
            first = next(iter(self._weights.values()))
            own = [w.to(device, dtype) for w in first.own]
            self._weights[device, dtype] = _weights_of(self._student, own)
        return self._weights[device, dtype]


def student_of(student: FusedStudent | str | os.PathLike[str]) -> FusedStudent:
    """A student, or the one of that name or in that file.

    Raises:
        FileNotFoundError: It is neither a student, nor a shipped one's name, nor a file.
        ValueError: The file holds no student, or is not usable.
    """
    found = student if isinstance(student, FusedStudent) else load_policy(student)
    if not isinstance(found, FusedStudent):
        raise ValueError(
            f"student must be a Student or a NominalStudent, but {str(student)!r} holds a "
            f"{found.kind}; PolicyOptimizer takes any policy"
        )
    return found


def check_stored(name: str, dtype: torch.dtype | None) -> None:
    """Raise ValueError unless state can be stored in this dtype beside float32."""
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"{name} must be float32, bfloat16 or None, not {dtype}")


def _home_of_steps(group: dict[str, Any], param: Tensor) -> torch.device:
    """Where a parameter's steps are counted: where they are read."""
    on_device = group["capturable"] or group["rounding"] == "stochastic"
    return param.device if on_device else torch.device("cpu")


class _Weights(NamedTuple):
    """The student's weights, and as the operation takes them."""

    own: list[Tensor]
    operation: list[Tensor]


def _weights_of(student: FusedStudent, own: list[Tensor]) -> _Weights:
    return _Weights(own, list(student.operation_weights(own)))


class _Batch:
    """Parameters that one call steps, and how many steps they have taken.

    Args:
        params: The parameters.
        entries: The optimizer's state of each.
        constants: What the student is told of them that stays.
    """

    def __init__(
        self,
        params: list[Tensor],
        entries: list[dict[str, Any]],
        constants: ContextConstants | None,
    ) -> None:
        self._entries = entries
        self.constants = constants
        states = [StudentState(*(entry[name] for name in _STATE)) for entry in entries]
        self.tensors = StudentTensors(params, states)
        self.steps = [entry["step"] for entry in entries]
        base = self.steps[0]._base if self.steps else None
        together = base is not None and base.shape == (len(entries),)
        for index, step in enumerate(self.steps):
            together = together and step._base is base and step.storage_offset() == index
        self._together = base if together else None

    def has_its_state(self) -> bool:
        """Whether the tensors of the batch are still those of the optimizer's state."""
        if not all(self._entries):
            return False
        tensors = self.tensors
        columns = zip(*map(_stored, self._entries), strict=True)
        ours = (tensors.m, tensors.v, tensors.h, tensors.c, self.steps)
        return all(map(_same, ours, columns))

    def below(self, steps: int) -> list[int]:
        """Which parameters, by index, have taken fewer steps."""
        if not steps:
            return []
        taken = (torch.stack(self.steps) if self._together is None else self._together).tolist()
        return [index for index, count in enumerate(taken) if count < steps]

    def count(self, steps: int | Tensor) -> None:
        """Count so many steps more of each."""
        if self._together is not None:
            self._together += steps
        elif isinstance(steps, Tensor):
            # A list, as PyTorch would read one tensor back as a number, and wait for it.
            torch._foreach_add_(self.steps, [steps] * len(self.steps))
        else:
            torch._foreach_add_(self.steps, steps)

    def without(self, indices: list[int], made: _ConstantsOf) -> _Batch:
        """The other parameters, with constants that are made by this."""
        others = sorted(set(range(len(self.steps))) - set(indices))
        params = [self.tensors.params[i] for i in others]
        return _Batch(params, [self._entries[i] for i in others], made(params))

    def context(self, student: FusedStudent, like: Tensor) -> TensorContext | None:
        """What a student is told of the parameters in their next step.

        Args:
            student: The student.
            like: A tensor of the dtype and device to say it in.
        """
        if self.constants is None:
            return None
        taken = torch.stack(self.steps) if self._together is None else self._together
        return student.context_of(self.constants, taken.to(like), self.tensors.params)


class _Made(NamedTuple):
    """A group's batches, the parameters that they were made of, and where these were."""

    params: list[Tensor]
    devices: list[torch.device]
    batches: list[_Batch]


_stored = itemgetter(*_STATE, "step")
_shape = attrgetter("shape")
_ConstantsOf = Callable[[list[Tensor]], ContextConstants | None]
_grad, _device = attrgetter("grad"), attrgetter("device")


def _same(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(ours) == len(theirs) and all(map(is_, ours, theirs))


def _seed_of(seed: int, number: int) -> int:
    """A parameter's own seed; of neighbours, far apart."""
    return (seed + number * ROW) % 2**32
