"""``student_step_``: the student's step in place over many tensors, as it trains models.

The formulas are those of :mod:`amalgam.operations.student_step`, but that no coordinate moves whose
gradients were all zero so far, by which v is 0, but for weight decay: of the nominal form by its
formula; of RNNProp, whose head has a bias, in this operation alone, for meta-training is as the
paper has it.

Parameters and states stay where they are from step to step, so :class:`StudentTensors` holds them:
they are checked once, and backends keep what they make of their addresses, until one of them moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam.operations import registry
from amalgam.operations.cell_codes import numbers_of, units_of
from amalgam.operations.checks import (
    check_all_floating,
    check_distinct,
    check_floating,
    check_like,
)
from amalgam.operations.rounding import as_stored, key_of
from amalgam.operations.student_forms import RNNPROP, StepSettings, check_tensors
from amalgam.operations.student_step import (
    DEFAULTS,
    SETTINGS_SCHEMA,
    StudentState,
    check_state,
    check_weights,
)

_NAME = "student_step_"
CHUNK = 16384
_dtype, _device = attrgetter("dtype"), attrgetter("device")
_shape, _layout, _is_cpu = attrgetter("shape"), attrgetter("layout"), attrgetter("is_cpu")


class StudentTensors:
    """Parameters and their states, which steps in place write to.

    Args:
        params: Parameters of any shape S and floating-point dtype.
        states: Their states, with m, v of the parameter's shape S and h, c of shape
            (layers, hidden, *S), or as codes (layers, hidden + 1, *S), contiguous.

    Attributes:
        params: The parameters.
        m: Their first moments; and ``v``, ``h``, ``c`` likewise.
        shapes: The parameters' shapes when last checked.
        made: What backends keep with these tensors, by a key of theirs; emptied when one moves.
    """

    def __init__(self, params: Sequence[Tensor], states: Sequence[StudentState]) -> None:
        if len(params) != len(states):
            raise ValueError(
                f"params and states must be equally many, not {len(params)} and {len(states)}"
            )
        self.params = list(params)
        self.m, self.v, self.h, self.c = (
            [list(column) for column in zip(*states, strict=True)] if states else ([], [], [], [])
        )
        self.made: dict[Any, Any] = {}
        self.shapes: list[torch.Size] = []
        self._checked: list[Any] = []
        self._plain = all(map(registry.plain, (self.m, self.v, self.h, self.c)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are checked, and have made for them, what their own addresses are."""
        return StudentTensors, (self.params, list(map(StudentState, *self._columns())))

    @property
    def plain(self) -> bool:
        """Whether the states are plain tensors, with memory of their own."""
        return self._plain

    def _columns(self) -> tuple[list[Tensor], ...]:
        return self.m, self.v, self.h, self.c

    def written(self) -> list[Tensor]:
        """All tensors that a step writes to."""
        return [*self.params, *self.m, *self.v, *self.h, *self.c]

    def check(self, weights: Sequence[Tensor], settings: StepSettings) -> None:
        """Hold the tensors against each other and the weights, unless they are as last time.

        Raises:
            TypeError: One is not a floating-point tensor.
            ValueError: Shapes, dtypes or devices do not fit, a state is not contiguous, or two
                tensors share memory.
        """
        self.check_weights(weights, settings)
        if self._checked and self._checked == self._stamp():
            return
        self._checked = []
        self.check_shapes(weights)
        check_distinct("params and states", self.written(), self._name_of)
        self.shapes = list(map(_shape, self.params))
        self.made.clear()
        self._checked = self._stamp()

    def _name_of(self, place: int) -> str:
        """What errors call one of :meth:`written`."""
        column, index = divmod(place, len(self.params))
        return (
            f"states[{index}].{StudentState._fields[column - 1]}" if column else f"params[{index}]"
        )

    def check_weights(self, weights: Sequence[Tensor], settings: StepSettings) -> None:
        """Raise ValueError unless the weights fit the states, and what is given of tensors, these.

        It is not kept that they do: they may be others in every step.
        """
        like = self.computed_like(weights)
        h = self.h[0]
        check_weights(weights, units_of(h) if h.dim() > 1 else h, like, settings, ())
        check_tensors(settings, weights[2], None, like)
        if settings.corrections is not None and len(settings.corrections) != len(self.params):
            raise ValueError(
                f"corrections must be those of {len(self.params)} tensors, "
                f"not of {len(settings.corrections)}"
            )

    def _stamp(self) -> list[Any]:
        # Other shapes of the same states are not looked for: they would lie elsewhere, or be parts.
        return [
            list(map(Tensor.data_ptr, self.written())),
            list(map(Tensor.numel, self.params)),
            list(map(_dtype, self.params)),
            list(map(Tensor.is_contiguous, self.params)),
        ]

    def computed_like(self, weights: Sequence[Tensor]) -> Tensor:
        """A tensor of the dtype that steps are computed in: the moments', or where narrower, 32."""
        m = self.m[0]
        narrow = m.dtype == torch.bfloat16 and weights and weights[0].dtype == torch.float32
        return weights[0] if narrow else m

    def check_shapes(self, weights: Sequence[Tensor]) -> None:
        """Raise as :meth:`check` does, but for shared memory: fake tensors have no addresses."""
        like = self.computed_like(weights)
        m, h = self.m[0], self.h[0]
        check_floating("state.m", m)
        moments_like = _narrow_or(like, m, (torch.bfloat16,))
        cells_like = _narrow_or(like, h, (torch.bfloat16, torch.int8))
        check_all_floating("params", self.params)
        for strange in set(map(_device, self.params)) - {m.device}:
            raise ValueError(f"params must be on {m.device}, not on {strange}")
        for strange in set(map(_layout, self.params)) - {torch.strided}:
            raise ValueError(f"params must be dense tensors, not {strange}")
        states = map(StudentState, *self._columns())
        for param, state in zip(self.params, states, strict=True):
            check_state(state, param.shape, h.shape[:2], moments_like, cells_like)
            if not all(map(Tensor.is_contiguous, state)):
                fields = state._asdict().items()
                name = next(name for name, tensor in fields if not tensor.is_contiguous())
                raise ValueError(f"state.{name} must be contiguous")


def _narrow_or(like: Tensor, stored: Tensor, narrow: Sequence[torch.dtype]) -> Tensor:
    """What states are to be like: these narrow dtypes may stand beside float32."""
    return stored if stored.dtype in narrow and like.dtype == torch.float32 else like


class InPlaceStep(NamedTuple):
    """A step in place, checked, as backends are given it.

    Attributes:
        tensors: What it writes to.
        grads: A gradient a parameter.
        weights: The student's weights.
        settings: Its constants.
        lr: Factor on every update.
        weight_decay: A parameter becomes ``p (1 - lr weight_decay) - lr update``.
        control: Float64 (4,), on the device: what stands for 1 - lr weight_decay and for lr, the
            learning rate of warm-up, and whether to skip the step; ``None`` for none of that.
        steps: How many steps each parameter has taken, float32 of shape (), or none.
        warmup_steps: How many of them are of warm-up.
        seeds: In [0, 2^32), one a parameter, to round what is narrow at random; or none.
    """

    tensors: StudentTensors
    grads: list[Tensor]
    weights: list[Tensor]
    settings: StepSettings
    lr: float
    weight_decay: float
    control: Tensor | None
    steps: list[Tensor]
    warmup_steps: int
    seeds: list[int]


def student_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[StudentState],
    weights: Sequence[Tensor],
    settings: StepSettings = DEFAULTS,
    **how: Any,
) -> None:
    """One step in place over many tensors, without a graph (for training with a fixed student).

    Every parameter becomes ``p (1 - lr weight_decay) - lr update``. What is passed as a tensor
    stays on its device: a step in a CUDA graph goes by what they hold when it is replayed.

    Args:
        params: Parameters of any shape and floating-point dtype.
        grads: Their gradients, same shapes; computed with in the states' dtype.
        states: Their states, with m, v of the parameter's shape S and h, c of shape
            (layers, hidden, *S), contiguous, all in the weights' dtype; beside float32, h and c
            may be bfloat16 (all of them), to which they are rounded after every step, and so may
            m and v. h and c may also be codes, int8 of shape (layers, hidden + 1, *S):
            :mod:`amalgam.operations.cell_codes`.
        weights: As in :func:`amalgam.ops.student_step`, float32 or float64.
        settings: The student's constants, and the form; the nominal form's tensors are the
            parameters, and ``sizes`` is empty.
        **how: As in :func:`step_tensors_`.

    Raises:
        TypeError: A parameter, gradient or state is not a floating-point tensor.
        ValueError: Lists of different lengths; shapes, dtypes or devices that do not fit; a state
            that is not contiguous; parameters and states that share memory; warm-up without
            ``steps``; a seed out of range.
        RuntimeError: The backend asked for can't compute this here.
    """
    if not len(params) == len(grads) == len(states):
        raise ValueError(
            f"params, grads and states must be equally many, "
            f"not {len(params)}, {len(grads)} and {len(states)}"
        )
    check_all_floating("params", params)
    check_all_floating("grads", grads)
    step_tensors_(StudentTensors(params, states), grads, weights, settings, **how)
    torch.autograd.graph.increment_version([tensor for state in states for tensor in state])


def step_tensors_(
    tensors: StudentTensors,
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    settings: StepSettings = DEFAULTS,
    *,
    lr: float | Tensor = 1.0,
    weight_decay: float | Tensor = 0.0,
    steps: Sequence[Tensor] | None = None,
    warmup_steps: int = 0,
    warmup_lr: float = 0.0,
    skip: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    backend: str = "auto",
) -> None:
    """:func:`student_step_` over tensors that are stepped again and again.

    Args:
        tensors: The parameters and their states. A graph that holds a state's earlier value does
            not notice that it is written to, as one that holds a parameter's does.
        grads: A gradient for each parameter.
        weights: The student's weights.
        settings: The student's constants.
        lr: Factor on every update; a number, or a tensor without dimensions.
        weight_decay: Decoupled weight decay, multiplied by ``lr`` as in AdamW; likewise.
        steps: How many steps each parameter has taken, float32 tensors without dimensions on the
            parameters' device; not changed.
        warmup_steps: Parameters that have taken fewer ``steps`` take one of SGD, during which
            moments follow and h, c wait.
        warmup_lr: Its learning rate, multiplied by ``lr``.
        skip: A tensor without dimensions; where it holds anything but zero, nothing changes.
        seeds: One a parameter, in [0, 2^32). With seeds, states and parameters that are bfloat16,
            and codes, are rounded up or down at random, right on average. Every backend takes the
            same random bits: a function of the seed, of ``steps`` where given, and of the place.
            Results of two backends differ where the last bits of their float32 did.
        backend: ``"auto"``, or a backend's name.

    Raises:
        TypeError, ValueError, RuntimeError: As :func:`student_step_`.
    """
    if len(grads) != len(tensors.params):
        raise ValueError(
            f"grads must be as many as params, {len(tensors.params)}, not {len(grads)}"
        )
    if not tensors.params:
        return
    device = tensors.m[0].device
    _check_steps_and_seeds(steps, warmup_steps, seeds, device, len(tensors.params))
    control, number, decay = None, 0.0, 0.0
    given = (lr, weight_decay, skip)
    if steps or seeds or any(isinstance(value, Tensor) for value in given):
        control = control_of(lr, weight_decay, warmup_lr, skip, device)
    else:
        number, decay = float(lr), float(weight_decay)
    step = InPlaceStep(
        *(tensors, list(grads), list(weights), settings, number, decay, control),
        *(list(steps or ()), warmup_steps, list(seeds or ())),
    )
    # On the meta device there is nothing to compute: its operator checks, and that is all.
    if (
        device.type != "meta"
        and tensors.plain
        and registry.unobserved(tensors.params, step.grads, step.weights)
    ):
        _compute(step, backend)
        torch.autograd.graph.increment_version(tensors.params)
        return
    t = tensors
    torch.ops.amalgam.student_step_(
        *(t.params, step.grads, t.m, t.v, t.h, t.c, step.weights, *settings, *step[4:], backend)
    )


def _compute(step: InPlaceStep, backend: str) -> None:
    step.tensors.check(step.weights, step.settings)
    _check_grads(step.tensors, step.grads)
    registry.compute(_NAME, backend, step.tensors.computed_like(step.weights), step)


def _check_grads(tensors: StudentTensors, grads: Sequence[Tensor]) -> None:
    if not all(dtype.is_floating_point for dtype in set(map(_dtype, grads))):
        for grad in grads:
            check_floating("grads", grad)
    if list(map(_shape, grads)) != tensors.shapes:
        for param, grad in zip(tensors.params, grads, strict=True):
            if grad.shape != param.shape:
                raise ValueError(
                    f"grads must have their parameters' shapes: {tuple(grad.shape)} "
                    f"stands against {tuple(param.shape)}"
                )
    device = tensors.m[0].device
    if device.type != "cpu" or not all(map(_is_cpu, grads)):
        for strange in set(map(_device, grads)) - {device}:
            raise ValueError(f"grads must be on {device}, not on {strange}")
    for strange in set(map(_layout, grads)) - {torch.strided}:
        raise ValueError(f"grads must be dense tensors, not {strange}")


def _check_steps_and_seeds(
    steps: Sequence[Tensor] | None,
    warmup_steps: int,
    seeds: Sequence[int] | None,
    device: torch.device,
    count: int,
) -> None:
    if warmup_steps and steps is None:
        raise ValueError(f"warmup_steps={warmup_steps} needs steps, to know who has taken as many")
    for name, values in (("steps", steps), ("seeds", seeds)):
        if values is not None and len(values) != count:
            raise ValueError(f"{name} must be one a parameter, {count}, not {len(values)}")
    for step in steps or ():
        if step.dtype != torch.float32 or step.dim() or step.device != device:
            raise ValueError(
                f"steps must be float32 tensors of shape () on {device}, "
                f"not {step.dtype} of {tuple(step.shape)} on {step.device}"
            )
        if step.layout != torch.strided:
            raise ValueError(f"steps must be dense tensors, not {step.layout}")
    for seed in seeds or ():
        if not 0 <= seed < 2**32:
            raise ValueError(f"seeds must lie in [0, 2^32), not {seed}")


def control_of(
    lr: float | Tensor,
    weight_decay: float | Tensor,
    warmup_lr: float,
    skip: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Float64 (4,) on the device: 1 - lr weight_decay, lr, warm-up's rate, and the skip flag.

    In float64 as the numbers are that the host computes, so that both round to the same.
    """

    def on_device(name: str, value: float | Tensor) -> Tensor:
        if not isinstance(value, Tensor):
            # Filled and not copied: a captured graph can't copy what the host holds.
            return torch.full((), value, dtype=torch.float64, device=device)
        if value.numel() != 1:
            raise ValueError(f"{name} must hold one number, not {tuple(value.shape)}")
        return value.reshape(()).to(device, torch.float64, non_blocking=True)

    rate, decay = on_device("lr", lr), on_device("weight_decay", weight_decay)
    flag = on_device("skip", 0.0 if skip is None else skip)
    return torch.stack((1 - rate * decay, rate, rate * warmup_lr, flag))


def _check_how(step: InPlaceStep) -> None:
    """Raise ValueError unless the operator was given what :func:`step_tensors_` would give it."""
    device, count = step.tensors.m[0].device, len(step.tensors.params)
    steps, seeds, control = step.steps or None, step.seeds or None, step.control
    if step.warmup_steps < 0:
        raise ValueError(f"warmup_steps must be 0 or more, not {step.warmup_steps}")
    _check_steps_and_seeds(steps, step.warmup_steps, seeds, device, count)
    if control is None:
        if steps or seeds:
            raise ValueError("control must be given where there are steps or seeds, not None")
    else:
        check_like("control", control, (4,), torch.empty(0, dtype=torch.float64, device=device))


@registry.reference.kernel(_NAME, dtypes=None)
def _reference(step: InPlaceStep) -> None:
    """Runs of at most CHUNK coordinates: the step's temporaries stay in cache, and small."""
    tensors, weights, steps, seeds = step.tensors, step.weights, step.steps, step.seeds
    functional = registry.reference.kernels["student_step"].function
    params, m, v = tensors.params, tensors.m, tensors.v
    flat_m, flat_v = ([t.view(-1) for t in ts] for ts in (m, v))
    flat_h, flat_c = ([t.view(*t.shape[:2], -1) for t in ts] for ts in (tensors.h, tensors.c))
    flat_p = [p.reshape(-1) for p in params]
    flat_g = [g.reshape(-1) for g in step.grads]
    dtype = weights[0].dtype
    keep: float | Tensor = 1 - step.lr * step.weight_decay
    rate: float | Tensor = step.lr
    skip = None
    if step.control is not None:
        skip = step.control[3] != 0
        keep, rate, warm_rate, _ = step.control.to(dtype).unbind()
    no_step = weights[0].new_zeros(())
    keys = [key_of(seed, steps[i] if steps else no_step) for i, seed in enumerate(seeds)]
    layers, hidden = units_of(tensors.h[0]).shape[:2]
    for run in _runs([p.numel() for p in params], CHUNK):

        def gather(sources: Sequence[Tensor], run: list[tuple[int, slice]] = run) -> Tensor:
            return torch.cat([numbers_of(sources[i][..., part]).to(dtype) for i, part in run], -1)

        param, grad = gather(flat_p), gather(flat_g)
        old = StudentState(gather(flat_m), gather(flat_v), gather(flat_h), gather(flat_c))
        of_run = _of_run(step, [i for i, _ in run], [part.stop - part.start for _, part in run])
        update, computed = functional(grad, old, *of_run)
        new = list(computed)
        if step.settings.form is RNNPROP:
            update = torch.where(computed.v == 0, 0, update)
        moved = param * keep - rate * update
        sizes = [part.stop - part.start for _, part in run]
        if steps:
            flags = [steps[i] < step.warmup_steps for i, _ in run]
            warm = torch.cat([f.expand(n) for f, n in zip(flags, sizes, strict=True)])
            moved = torch.where(warm, param * keep - warm_rate * grad, moved)
            new[2:] = [torch.where(warm, *both) for both in zip(old[2:], new[2:], strict=True)]
        if skip is not None:
            moved = torch.where(skip, param, moved)
            new = [torch.where(skip, *both) for both in zip(old, new, strict=True)]
        rows = layers * hidden
        targets = [(flat_p, rows, 16), (flat_m, rows + 1, 16), (flat_v, rows + 1, 0)]
        targets += [(flat_h, 0, 16), (flat_c, 0, 0)]
        for (written, row, shift), values in zip(targets, (moved, *new), strict=True):
            for (i, part), value in zip(run, values.split(sizes, -1), strict=True):
                key, places = keys[i] if seeds else None, range(part.start, part.stop)
                value = as_stored(value, written[i].dtype, key, row, places, shift)
                written[i][..., part].copy_(value)
    for param, flat in zip(params, flat_p, strict=True):
        if not param.is_contiguous():
            param.copy_(flat.view(param.shape))


def _of_run(
    step: InPlaceStep, tensors: Sequence[int], sizes: Sequence[int]
) -> tuple[Sequence[Tensor], StepSettings]:
    """Weights and settings for parts, of these sizes, of these tensors."""
    weights, settings = step.weights, step.settings
    if settings.corrections is None:
        return weights, settings
    own = torch.tensor(tensors, device="cpu").to(weights[0].device)
    corrections, bias = settings.corrections[own], weights[2][own]
    settings = settings._replace(corrections=corrections, sizes=sizes)
    return [*weights[:2], bias, *weights[3:]], settings


def _runs(sizes: Sequence[int], limit: int) -> Iterator[list[tuple[int, slice]]]:
    """Cut tensors of these sizes into runs of at most ``limit`` coordinates in all."""
    run: list[tuple[int, slice]] = []
    room = limit
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + room)
            run.append((index, slice(start, stop)))
            room -= stop - start
            start = stop
            if not room:
                yield run
                run, room = [], limit
    if run:
        yield run


@torch.library.custom_op(
    "amalgam::student_step_",
    mutates_args=("params", "m", "v", "h", "c"),
    schema="(Tensor(a0!)[] params, Tensor[] grads, Tensor(a2!)[] m, Tensor(a3!)[] v, "
    f"Tensor(a4!)[] h, Tensor(a5!)[] c, Tensor[] weights, {SETTINGS_SCHEMA}, float lr, "
    "float weight_decay, Tensor? control, Tensor[] steps, SymInt warmup_steps, SymInt[] seeds, "
    "str backend) -> ()",
)
def _op(*flat: Any) -> None:
    step, backend = _structured(*flat)
    _check_how(step)
    _compute(step, backend)


@_op.register_fake
def _(*flat: Any) -> None:
    step, _ = _structured(*flat)
    _check_how(step)
    step.tensors.check_weights(step.weights, step.settings)
    step.tensors.check_shapes(step.weights)
    _check_grads(step.tensors, step.grads)


def _structured(
    params: list[Tensor],
    grads: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    h: list[Tensor],
    c: list[Tensor],
    weights: list[Tensor],
    *rest: Any,
) -> tuple[InPlaceStep, str]:
    fields = len(StepSettings._fields)
    settings, (*how, backend) = StepSettings(*rest[:fields]), rest[fields:]
    lists = {"params": params, "grads": grads, "m": m, "v": v, "h": h, "c": c}
    if not params or len({len(tensors) for tensors in lists.values()}) > 1:
        lengths = ", ".join(f"{len(tensors)} {name}" for name, tensors in lists.items())
        raise ValueError(f"params, grads, m, v, h and c must be equally many, not {lengths}")
    tensors = StudentTensors(params, list(map(StudentState, m, v, h, c)))
    return InPlaceStep(tensors, grads, weights, settings, *how), backend
