"""``student_step``: one step of the RNNProp student over every coordinate.

Per coordinate, with m, v the moments and (h, c) the cells' state (RNNProp, Lv et al. 2017, as the
authors of Optimizer Amalgamation, ICLR 2022, use it; no bias correction that depends on time)::

    m <- beta1 m + (1 - beta1) g             v <- beta2 v + (1 - beta2) g^2
    scale = 1 / sqrt(v / (1 - beta2) + eps)
    x = [ m / (1 - beta1) * scale,  g * scale ]
    for each layer: i, f, a, o = W_ih x + W_hh h + b      (a: the candidate)
                    c <- sigmoid(f) c + sigmoid(i) tanh(a);  x = h <- sigmoid(o) tanh(c)
    update = alpha tanh(head . x + head_bias)

Coordinates are the last, fastest dimension of every array: eager PyTorch runs that order 1.2 to 3
times as fast as the transposed one, and it is the order that fills whole vectors and sectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam.operations import lstm, registry
from amalgam.operations.rounding import key_of, random_bits, rounded_stochastically

_NAME = "student_step"
FEATURES = 2
OUTPUTS = 1
CHUNK = 16384


class StudentState(NamedTuple):
    """What the student carries from step to step, for N coordinates.

    Attributes:
        m: First moment of the gradient, shape (N,).
        v: Second moment, shape (N,).
        h: Outputs of the LSTM layers, shape (layers, hidden, N).
        c: Their cells, shape (layers, hidden, N).
    """

    m: Tensor
    v: Tensor
    h: Tensor
    c: Tensor


class StepSettings(NamedTuple):
    """The student's constants.

    Attributes:
        alpha: Largest update of a coordinate in one step.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the second moment inside the root.
    """

    alpha: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-10


DEFAULTS = StepSettings()


def student_step(
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings = DEFAULTS,
    *,
    backend: str = "auto",
) -> tuple[Tensor, StudentState]:
    """One step, differentiable in the gradient, the state and the weights (for meta-training).

    Args:
        grad: The optimizee's gradient, shape (N,), float32 or float64.
        state: The carried state, same dtype and device.
        weights: For each layer W_ih (4 hidden, inputs), W_hh (4 hidden, hidden), b (4 hidden,)
            with gates in the order input, forget, candidate, output; then the head (1, hidden)
            and its bias (1,). Same dtype and device.
        settings: The student's constants.
        backend: ``"auto"``, or a backend's name. All but ``"reference"`` are once differentiable.

    Returns:
        The update (N,), to be subtracted from the parameters, and the new state.

    Raises:
        TypeError: ``grad`` is not a floating-point tensor.
        ValueError: Shapes, dtypes or devices do not fit together.
        RuntimeError: The backend asked for can't compute this here.
    """
    check_floating("grad", grad)
    lstm.check_weights(weights, state.h, grad, FEATURES, OUTPUTS)
    if grad.dim() != 1:
        raise ValueError(f"grad must have shape (N,), not {tuple(grad.shape)}")
    check_state(state, grad, grad.shape, state.h.shape[:2], grad)
    chosen = registry.resolve(_NAME, backend, grad)
    if chosen == registry.REFERENCE:
        out = _reference(grad, *state, weights, *settings)
    else:
        out = torch.ops.amalgam.student_step(grad, *state, list(weights), *settings, chosen)
    return out[0], StudentState(*out[1:])


def student_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[StudentState],
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
    """One step in place over many tensors, without a graph (for training with a fixed student).

    Every parameter becomes ``p (1 - lr weight_decay) - lr update``. What is passed as a tensor
    stays on its device: a step in a CUDA graph goes by what they hold when it is replayed.

    Args:
        params: Parameters of any shape and floating-point dtype.
        grads: Their gradients, same shapes; computed with in the states' dtype.
        states: Their states, with m, v of the parameter's shape S and h, c of shape
            (layers, hidden, *S), contiguous, all in the weights' dtype; beside float32, h and c
            may be bfloat16 (all of them), to which they are rounded after every step.
        weights: As in :func:`student_step`, float32 or float64.
        settings: The student's constants.
        lr: Factor on every update; a number, or a tensor without dimensions.
        weight_decay: Decoupled weight decay, multiplied by ``lr`` as in AdamW; likewise.
        steps: How many steps each parameter has taken, float32 tensors without dimensions on the
            parameters' device; not changed.
        warmup_steps: Parameters that have taken fewer ``steps`` take one of SGD, during which
            moments follow and h, c wait.
        warmup_lr: Its learning rate, multiplied by ``lr``.
        skip: A tensor without dimensions; where it holds anything but zero, nothing changes.
        seeds: A number in [0, 2^32) a parameter has h, c and the parameter, where they are
            bfloat16, rounded up or down at random, right on average and by the same bits in every
            backend: a function of seed, of ``steps`` where given, and of the place.
        backend: ``"auto"``, or a backend's name.

    Raises:
        TypeError: A parameter, gradient or state is not a floating-point tensor.
        ValueError: Lists of different lengths; shapes, dtypes or devices that do not fit; a state
            that is not contiguous; warm-up without ``steps``; a seed out of range.
        RuntimeError: The backend asked for can't compute this here.
    """
    if not len(params) == len(grads) == len(states):
        raise ValueError(
            f"params, grads and states must be equally many, "
            f"not {len(params)}, {len(grads)} and {len(states)}"
        )
    if not params:
        return
    first = states[0]
    check_floating("state.m", first.m)
    lstm.check_weights(weights, first.h, first.m, FEATURES, OUTPUTS)
    narrow = first.h.dtype == torch.bfloat16 and first.m.dtype == torch.float32
    for param, grad, state in zip(params, grads, states, strict=True):
        if grad.shape != param.shape:
            raise ValueError(
                f"grads must have their parameters' shapes: {tuple(grad.shape)} "
                f"stands against {tuple(param.shape)}"
            )
        for name, tensor in (("params", param), ("grads", grad)):
            check_floating(name, tensor)
        cells_like = first.h if narrow else first.m
        check_state(state, first.m, param.shape, first.h.shape[:2], cells_like)
        for name, tensor in zip(StudentState._fields, state, strict=True):
            if not tensor.is_contiguous():
                raise ValueError(f"state.{name} must be contiguous")
        for name, tensor in (("grads", grad), ("states", state.m)):
            if tensor.device != param.device:
                raise ValueError(f"{name} must be on {param.device}, not on {tensor.device}")
    _check_steps_and_seeds(steps, warmup_steps, seeds, first.m.device, len(params))
    m, v, h, c = (list(column) for column in zip(*states, strict=True))
    tensors = (list(params), list(grads), m, v, h, c, list(weights))
    chosen = registry.resolve(f"{_NAME}_", backend, m[0], *tensors)
    control, number, decay = None, 0.0, 0.0
    given = (lr, weight_decay, skip)
    if steps or seeds or any(isinstance(value, Tensor) for value in given):
        control = _control(lr, weight_decay, warmup_lr, skip, first.m.device)
    else:
        number, decay = float(lr), float(weight_decay)
    torch.ops.amalgam.student_step_(
        *(*tensors, *settings, number, decay),
        *(control, list(steps or ()), warmup_steps, list(seeds or ()), chosen),
    )


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
    for seed in seeds or ():
        if not 0 <= seed < 2**32:
            raise ValueError(f"seeds must lie in [0, 2^32), not {seed}")


def _control(
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


def initial_state(
    like: Tensor, weights: Sequence[Tensor], cells_dtype: torch.dtype | None = None
) -> StudentState:
    """The zero state for a tensor of coordinates.

    Args:
        like: A tensor of the coordinates' shape S and device.
        weights: The student's weights; the state takes their dtype.
        cells_dtype: Dtype of h and c where it is to be another: bfloat16 beside float32 halves
            the state, in the in-place form.

    Returns:
        m, v of shape S and h, c of shape (layers, hidden, *S), contiguous zeros.
    """
    layers, hidden = lstm.architecture(weights, OUTPUTS)

    def zeros(*shape: int, dtype: torch.dtype = weights[0].dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=like.device)

    cells = cells_dtype or weights[0].dtype
    return StudentState(
        zeros(*like.shape),
        zeros(*like.shape),
        zeros(layers, hidden, *like.shape, dtype=cells),
        zeros(layers, hidden, *like.shape, dtype=cells),
    )


def update_moments(
    grad: Tensor, m: Tensor, v: Tensor, settings: StepSettings
) -> tuple[Tensor, Tensor]:
    """The moments after ``grad``, of any one shape; all that warm-up changes of the state."""
    new_m = settings.beta1 * m + (1 - settings.beta1) * grad
    new_v = settings.beta2 * v + (1 - settings.beta2) * grad.square()
    return new_m, new_v


def warm_up_(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    settings: StepSettings,
    keep: float,
    rate: float,
    key: Tensor | None = None,
    row: int = 0,
) -> None:
    """A step of SGD in place, during which the moments follow.

    Args:
        param: Becomes ``keep param - rate grad``; of any floating-point dtype.
        grad: Of its shape.
        m: Of its shape, in the dtype to compute in.
        v: Like ``m``.
        settings: The student's constants.
        keep: 1 without weight decay.
        rate: The learning rate.
        key: Of the bits that a bfloat16 parameter is rounded with; ``None`` rounds to nearest.
        row: Which row of bits are its own.
    """
    grad = grad.to(m.dtype)
    new_m, new_v = update_moments(grad, m, v, settings)
    m.copy_(new_m)
    v.copy_(new_v)
    moved = param.to(m.dtype) * keep - rate * grad
    if key is not None:
        moved = _stored(moved, param.dtype, key, row, range(param.numel()))
    param.copy_(moved)


def _stored(
    values: Tensor, dtype: torch.dtype, key: Tensor, row: int, places: range, shift: int = 16
) -> Tensor:
    """Values as they are stored with random bits: rounded to bfloat16, for others as they are."""
    if dtype != torch.bfloat16:
        return values
    rows = values.numel() // max(1, len(places))
    bits = (random_bits(key, range(row, row + rows), places) >> shift) & 0xFFFF
    return rounded_stochastically(values.float(), bits.view(values.shape))


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless this is a tensor of a floating-point dtype."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = getattr(tensor, "dtype", type(tensor).__name__)
        raise TypeError(f"{name} must be a floating-point tensor, not {kind}")


def check_state(
    state: StudentState,
    like: Tensor,
    shape: Sequence[int],
    architecture: Sequence[int],
    cells_like: Tensor,
) -> None:
    """Raise ValueError unless m, v have this shape and h, c these two dimensions before it.

    In dtype and device m, v must be like ``like``, and h, c like ``cells_like``.
    """
    cells = (*architecture, *shape)
    for name, tensor, want, example in (
        ("m", state.m, shape, like),
        ("v", state.v, shape, like),
        ("h", state.h, cells, cells_like),
        ("c", state.c, cells, cells_like),
    ):
        if tuple(tensor.shape) != tuple(want):
            raise ValueError(
                f"state.{name} must have shape {tuple(want)}, not {tuple(tensor.shape)}"
            )
        if tensor.dtype != example.dtype or tensor.device != example.device:
            raise ValueError(
                f"state.{name} must be {example.dtype} on {example.device}, "
                f"not {tensor.dtype} on {tensor.device}"
            )


@registry.reference.kernel(_NAME, dtypes=None)
def _reference(
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    alpha: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad, m, v (N,) and h, c (layers, hidden, N) -> update, m, v, h, c."""
    m, v = update_moments(grad, m, v, StepSettings(alpha, beta1, beta2, eps))
    scale = (v / (1 - beta2) + eps).rsqrt()
    x = torch.stack((m / (1 - beta1) * scale, grad * scale))
    x, h, c = lstm.step(x, h, c, weights)
    head, head_bias = weights[-2:]
    update = alpha * (head @ x + head_bias[:, None]).tanh().squeeze(0)
    return update, m, v, h, c


@registry.reference.kernel(f"{_NAME}_backward", dtypes=None)
def _reference_backward(
    grads_out: Sequence[Tensor],
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    alpha: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The step's vector-Jacobian product; only its inputs were kept, the gates come again."""
    d_update, d_m, d_v, d_h, d_c = grads_out
    m, v = update_moments(grad, m, v, StepSettings(alpha, beta1, beta2, eps))
    scale = (v / (1 - beta2) + eps).rsqrt()
    m_hat = m / (1 - beta1)

    traced = lstm.trace(torch.stack((m_hat * scale, grad * scale)), h, c, weights)
    out = traced.inputs[-1]
    head, head_bias = weights[-2:]
    top = (head @ out + head_bias[:, None]).tanh()
    d_top = d_update * alpha * (1 - top.square())
    d_x, in_h, in_c, d_weights = lstm.backward(traced, head.T @ d_top, d_h, d_c, h, c, weights)
    d_weights += [d_top @ out.T, d_top.sum(1)]

    d_scale = d_x[0] * m_hat + d_x[1] * grad
    d_m = d_m + d_x[0] * scale / (1 - beta1)
    d_v = d_v - 0.5 * d_scale * scale.pow(3) / (1 - beta2)
    d_grad = d_x[1] * scale + (1 - beta1) * d_m + 2 * (1 - beta2) * grad * d_v
    return d_grad, beta1 * d_m, beta2 * d_v, in_h, in_c, d_weights


def step_into(
    out: Sequence[Tensor],
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
    backend: str,
) -> None:
    """:func:`student_step` without checks or graph, into memory that the caller has.

    Args:
        out: Gets the update and the new m, v, h, c; the last four may be the old ones.
        grad: As in :func:`student_step`, like all that follows.
        state: The carried state.
        weights: The weights.
        settings: The student's constants.
        backend: A backend's name, or ``"auto"``.
    """
    registry.compute(f"{_NAME}_into", backend, grad, out, grad, *state, weights, *settings)


def backward_into(
    d_update: Tensor,
    d_state: StudentState,
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    """The step's vector-Jacobian product without checks or graph, from and into ``d_state``.

    Args:
        d_update: Gradient in the update, shape (N,).
        d_state: Gradient in the new state; gets that in the old one.
        grad: What the step was taken with, like all that follows.
        state: The state it began with.
        weights: The weights.
        settings: The student's constants.
        backend: A backend's name, or ``"auto"``.

    Returns:
        Gradients in ``grad`` and in the weights.
    """
    d_grad, d_weights = registry.compute(
        f"{_NAME}_backward_into", backend, grad, d_update, d_state, grad, *state, weights, *settings
    )
    return d_grad, d_weights


def register_into(backend: registry.Backend, **how: Any) -> None:
    """Register ``student_step_into`` and its backward for a backend whose kernels allocate.

    Args:
        backend: One that has ``student_step`` and its backward.
        **how: As :meth:`amalgam.operations.registry.Backend.kernel` takes it.
    """
    step, back = (backend.kernels[name].function for name in (_NAME, f"{_NAME}_backward"))

    def into(out: Sequence[Tensor], *arguments: Any, **numerics: Any) -> None:
        for to, value in zip(out, step(*arguments, **numerics), strict=True):
            to.copy_(value)

    def back_into(
        d_update: Tensor, d_state: Sequence[Tensor], *arguments: Any, **numerics: Any
    ) -> tuple[Tensor, list[Tensor]]:
        d_grad, *d_old, d_weights = back((d_update, *d_state), *arguments, **numerics)
        for to, value in zip(d_state, d_old, strict=True):
            to.copy_(value)
        return d_grad, d_weights

    backend.kernel(f"{_NAME}_into", **how)(into)
    backend.kernel(f"{_NAME}_backward_into", **how)(back_into)


@registry.reference.kernel(f"{_NAME}_", dtypes=None)
def _reference_in_place(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    h: Sequence[Tensor],
    c: Sequence[Tensor],
    weights: Sequence[Tensor],
    alpha: float,
    beta1: float,
    beta2: float,
    eps: float,
    lr: float,
    weight_decay: float,
    control: Tensor | None = None,
    steps: Sequence[Tensor] = (),
    warmup_steps: int = 0,
    seeds: Sequence[int] = (),
) -> None:
    """Runs of at most CHUNK coordinates: the step's temporaries stay in cache, and small."""
    flat_m, flat_v = ([t.view(-1) for t in ts] for ts in (m, v))
    flat_h, flat_c = ([t.view(*t.shape[:2], -1) for t in ts] for ts in (h, c))
    flat_p = [p.reshape(-1) for p in params]
    flat_g = [g.reshape(-1) for g in grads]
    dtype = weights[0].dtype
    keep: float | Tensor = 1 - lr * weight_decay
    rate: float | Tensor = lr
    skip = None
    if control is not None:
        skip = control[3] != 0
        keep, rate, warm_rate, _ = control.to(dtype).unbind()
    no_step = weights[0].new_zeros(())
    keys = [key_of(seed, steps[i] if steps else no_step) for i, seed in enumerate(seeds)]
    cell_rows = h[0].shape[0] * h[0].shape[1]
    for run in _runs([p.numel() for p in params], CHUNK):

        def gather(tensors: Sequence[Tensor], run: list[tuple[int, slice]] = run) -> Tensor:
            return torch.cat([tensors[i][..., part].to(dtype) for i, part in run], -1)

        param, grad = gather(flat_p), gather(flat_g)
        old = gather(flat_m), gather(flat_v), gather(flat_h), gather(flat_c)
        update, *new = _reference(grad, *old, weights, alpha, beta1, beta2, eps)
        moved = param * keep - rate * update
        sizes = [part.stop - part.start for _, part in run]
        if steps:
            flags = [steps[i] < warmup_steps for i, _ in run]
            warm = torch.cat([f.expand(n) for f, n in zip(flags, sizes, strict=True)])
            moved = torch.where(warm, param * keep - warm_rate * grad, moved)
            new[2:] = [torch.where(warm, *both) for both in zip(old[2:], new[2:], strict=True)]
        if skip is not None:
            moved = torch.where(skip, param, moved)
            new = [torch.where(skip, *both) for both in zip(old, new, strict=True)]
        places = [(flat_p, cell_rows, 16), (flat_m, 0, 0), (flat_v, 0, 0)]
        places += [(flat_h, 0, 16), (flat_c, 0, 0)]
        for (tensors, row, shift), values in zip(places, (moved, *new), strict=True):
            for (i, part), value in zip(run, values.split(sizes, -1), strict=True):
                if seeds:
                    of = range(part.start, part.stop)
                    value = _stored(value, tensors[i].dtype, keys[i], row, of, shift)
                tensors[i][..., part].copy_(value)
    for param, flat in zip(params, flat_p, strict=True):
        if not param.is_contiguous():
            param.copy_(flat.view(param.shape))


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


register_into(registry.reference, dtypes=None)


@torch.library.custom_op("amalgam::student_step", mutates_args=())
def _op(
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    alpha: float,
    beta1: float,
    beta2: float,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    update, m, v, h, c = registry.compute(
        _NAME, backend, grad, grad, m, v, h, c, weights, alpha, beta1, beta2, eps
    )
    return update, m, v, h, c


@torch.library.custom_op("amalgam::student_step_backward", mutates_args=())
def _backward_op(
    grads_out: Sequence[Tensor],
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    alpha: float,
    beta1: float,
    beta2: float,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    in_grad, in_m, in_v, in_h, in_c, in_weights = registry.compute(
        f"{_NAME}_backward",
        backend,
        grad,
        *(grads_out, grad, m, v, h, c, weights, alpha, beta1, beta2, eps),
    )
    return in_grad, in_m, in_v, in_h, in_c, in_weights


@torch.library.custom_op("amalgam::student_step_", mutates_args=("params", "m", "v", "h", "c"))
def _in_place_op(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    h: Sequence[Tensor],
    c: Sequence[Tensor],
    weights: Sequence[Tensor],
    alpha: float,
    beta1: float,
    beta2: float,
    eps: float,
    lr: float,
    weight_decay: float,
    control: Tensor | None,
    steps: Sequence[Tensor],
    warmup_steps: int,
    seeds: Sequence[int],
    backend: str,
) -> None:
    registry.compute(
        f"{_NAME}_",
        backend,
        m[0],
        *(params, grads, m, v, h, c, weights, alpha, beta1, beta2, eps, lr, weight_decay),
        *(control, steps, warmup_steps, seeds),
    )


@_op.register_fake
def _(grad, m, v, h, c, weights, alpha, beta1, beta2, eps, backend):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (grad, m, v, h, c))


@_backward_op.register_fake
def _(grads_out, grad, m, v, h, c, weights, alpha, beta1, beta2, eps, backend):  # type: ignore[no-untyped-def]
    state = tuple(t.new_empty(t.shape) for t in (grad, m, v, h, c))
    return *state, [w.new_empty(w.shape) for w in weights]


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    grad, m, v, h, c, weights, *ctx.constants = inputs
    ctx.save_for_backward(grad, m, v, h, c, *weights)


def _autograd(ctx, *grads_out):  # type: ignore[no-untyped-def]
    grad, m, v, h, c, *weights = ctx.saved_tensors
    *found, in_weights = torch.ops.amalgam.student_step_backward(
        list(grads_out), grad, m, v, h, c, weights, *ctx.constants
    )
    return *found, in_weights, *(None for _ in ctx.constants)


_op.register_autograd(_autograd, setup_context=_setup_context)
registry.once_differentiable(_backward_op, _NAME)
