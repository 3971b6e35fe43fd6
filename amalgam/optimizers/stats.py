"""What a step does to a parameter, in numbers that can be held against another optimizer's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from amalgam.operations.teacher_kinds import TEACHER_KINDS, Coefficients


class StepStats(NamedTuple):
    """What a parameter's next step is.

    Attributes:
        update_over_parameter: The step's root mean square over the parameter's; NaN for a parameter
            of zeros.
        adam_lr: The learning rate with which a step of Adam's, bias-corrected and of the student's
            betas, has the same root mean square; NaN where that has none.
        agreement: For each kind of analytical teacher, from :data:`amalgam.ops.KINDS`, the cosine
            of the angle between the step and the teacher's; NaN where one of them is none.
    """

    update_over_parameter: float
    adam_lr: float
    agreement: dict[str, float]


def stats_of(
    param: Tensor,
    step: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    taken: float,
    betas: tuple[float, float],
    total: Callable[[Sequence[Tensor]], Sequence[Tensor]] = tuple,
) -> StepStats:
    """What a step is, beside the teachers'.

    Their directions are those of :mod:`amalgam.operations.teacher_kinds` with the student's
    moments, and with an eps of 0, so that no cosine depends on the loss's scale.

    Args:
        param: The parameter before the step, shape (N,).
        step: What is subtracted from it, without weight decay, shape (N,).
        grad: The gradient, shape (N,).
        m: The first moment after the step, shape (N,).
        v: The second moment after the step, shape (N,).
        taken: How many steps that makes.
        betas: Decays of the moments.
        total: Adds up sums over parts of the parameter, where these are parts.
    """
    own, before, g, m, v = (part.double() for part in (step, param, grad, m, v))
    by = Coefficients(*betas, eps=0.0)
    # A coordinate whose v is 0 has no gradient, or one too small to be squared: 0 / 0 or m / 0.
    directions = {
        name: kind.direction(g, m, v, by).nan_to_num(0.0, posinf=0.0, neginf=0.0)
        for name, kind in TEACHER_KINDS.items()
    }
    beta1, beta2 = betas
    squares = [own @ own, before @ before, *(theirs @ theirs for theirs in directions.values())]
    products = [own @ theirs for theirs in directions.values()]
    sums = [float(part) for part in total([*squares, *products])]
    size, of_param, *sizes = map(math.sqrt, sums[: len(squares)])
    # No bias is corrected in the teacher's form of Adam, whose direction is the same.
    corrected = (1 - beta1) / (1 - beta1**taken) * math.sqrt((1 - beta2**taken) / (1 - beta2))
    of = dict(zip(directions, sizes, strict=True))
    return StepStats(
        _ratio(size, of_param),
        _ratio(size, corrected * of["adam"]),
        {
            name: _ratio(product, size * of[name])
            for name, product in zip(directions, sums[len(squares) :], strict=True)
        },
    )


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan
