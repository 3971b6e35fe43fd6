"""What a step does to a parameter, in numbers that can be held against another optimizer's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class StepStats(NamedTuple):
    """What a parameter's next step is.

    Attributes:
        update_over_parameter: The step's root mean square over the parameter's; NaN for a parameter
            of zeros.
        adam_lr: The learning rate with which a step of Adam's, bias-corrected and of the student's
            betas, has the same root mean square; NaN where that has none.
        agreement: The cosine of the angle between the two steps; NaN where one is none.
    """

    update_over_parameter: float
    adam_lr: float
    agreement: float


def stats_of(
    param: Tensor,
    step: Tensor,
    m: Tensor,
    v: Tensor,
    taken: float,
    betas: tuple[float, float],
    total: Callable[[Sequence[Tensor]], Sequence[Tensor]] = tuple,
) -> StepStats:
    """What a step is, beside Adam's.

    Args:
        param: The parameter before the step, shape (N,).
        step: What is subtracted from it, without weight decay, shape (N,).
        m: The first moment after the step, shape (N,).
        v: The second moment after the step, shape (N,).
        taken: How many steps that makes.
        betas: Decays of the moments.
        total: Adds up sums over parts of the parameter, where these are parts.
    """
    beta1, beta2 = betas
    root = (v.double() / (1 - beta2**taken)).sqrt()
    adam = (m.double() / (1 - beta1**taken) / root).nan_to_num(0.0)
    own, before = step.double(), param.double()
    *squares, product = map(float, total([own @ own, adam @ adam, before @ before, own @ adam]))
    size, of_adam, of_param = map(math.sqrt, squares)
    return StepStats(
        _ratio(size, of_param),
        _ratio(size, of_adam),
        _ratio(product, size * of_adam),
    )


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan
