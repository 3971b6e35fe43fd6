"""The settings of meta-training that hold for any strategy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from amalgam.lr_decays import LR_DECAYS, LRDecay
from amalgam.meta.objective import MODES
from amalgam.ranges import check_fields


@dataclass(frozen=True)
class Training:
    """Settings of meta-training that hold for any strategy.

    There are two meta-validations (:mod:`amalgam.meta.validation`), and lower is better in both.
    *By final loss*: for strategies that do not go back to earlier weights; every ``validate_every``
    meta-steps, with ``validation_steps`` and ``validation_seeds``. *By meta-loss*: at the end of
    each period for which the strategy gives validation unrolls, with ``validation_data``.

    Attributes:
        optimizees: The number of optimizees that a student trains side by side, in each process.
        il_mode: The loss of a window. ``"sum"``: the meta-loss plus the period's imitation weight
            times the imitation loss. ``"switch"``: the imitation loss alone, with that weight as
            its probability, or else the meta-loss alone. ``"imitation"`` or ``"meta"``: always that
            one alone.
        input_noise: Standard deviation of the noise on the gradients that students see in training.
        meta_lr: Learning rate of the meta-optimizer, which is Adam.
        meta_betas: Its decays of the first and the second moment.
        meta_schedule: How ``meta_lr`` goes on after ``meta_warmup``: it stays (``"constant"``), or
            falls as half a cosine to ``meta_lr_end`` times itself (``"cosine"``).
        meta_warmup: Meta-steps in which the meta-optimizer's rate grows linearly to ``meta_lr``.
        meta_lr_end: Where the cosine ends, as a multiple of ``meta_lr``.
        meta_schedule_steps: The meta-step at which the cosine ends; later ones stay there. Where
            absent, the strategy's last meta-step; strategies whose length depends on their results
            need it.
        average: The decay of an exponential moving average of the student's weights over the
            meta-steps, with bias correction. Meta-training goes on with the weights themselves;
            meta-validations look at the averaged ones, and the run keeps these. 0 means none.
        clip_ratio: The meta-gradient of each tensor of weights is shortened to at most this times
            the tensor's norm (adaptive gradient clipping). Infinity means no clipping.
        clip_floor: A tensor whose norm is smaller counts as having this norm, for ``clip_ratio``.
        checkpoint_every: Meta-steps between checkpoints.
        validate_every: Meta-steps between validations by final loss; the last meta-step has one in
            any case. The run keeps the weights of the best one. 0 means none, and the run keeps
            the last weights. It has no effect with strategies that go back to earlier weights.
        validation_steps: Steps of each optimizee in a validation by final loss, after the warm-up.
        validation_seeds: How many optimizees a validation by final loss trains per task.
        validation_decays: How the learning rate goes on in them, to zero over the steps: each is
            trained with each of these, of :data:`amalgam.lr_decays.LR_DECAYS`.
        validation_data: The data that a validation by meta-loss trains its optimizees on: the
            tasks' ``"validation"`` data, or ``"train"``, as in the authors' code.
    """

    optimizees: int = 1
    il_mode: Literal["sum", "switch", "imitation", "meta"] = "sum"
    input_noise: float = 0.0
    meta_lr: float = 1e-3
    meta_betas: tuple[float, float] = (0.9, 0.999)
    meta_schedule: Literal["constant", "cosine"] = "constant"
    meta_warmup: int = 0
    meta_lr_end: float = 0.0
    meta_schedule_steps: int | None = None
    average: float = 0.0
    clip_ratio: float = 0.1
    clip_floor: float = 1e-3
    checkpoint_every: int = 10
    validate_every: int = 20
    validation_steps: int = 400
    validation_seeds: int = 2
    validation_decays: tuple[LRDecay, ...] = ("constant",)
    validation_data: Literal["validation", "train"] = "validation"

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        object.__setattr__(self, "meta_betas", tuple(self.meta_betas))
        if len(self.meta_betas) != 2:
            raise ValueError(f"meta_betas must be two numbers in [0, 1), not {self.meta_betas}")
        check_fields(
            self,
            counts=(
                *("optimizees", "checkpoint_every", "validation_steps", "validation_seeds"),
                "meta_schedule_steps",
            ),
            whole=("validate_every", "meta_warmup"),
            decays=("meta_betas", "average"),
            positive=("meta_lr", "clip_ratio", "clip_floor"),
            not_negative=("input_noise", "meta_lr_end"),
            or_infinite=("clip_ratio",),
        )
        for name, known in (
            ("il_mode", MODES),
            ("validation_data", ("validation", "train")),
            ("meta_schedule", ("constant", "cosine")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, not {getattr(self, name)!r}")
        object.__setattr__(self, "validation_decays", tuple(self.validation_decays))
        if not self.validation_decays or not set(self.validation_decays) <= set(LR_DECAYS):
            raise ValueError(
                f"validation_decays must be one or more of {list(LR_DECAYS)}, not "
                f"{list(self.validation_decays)}"
            )

    def check_schedule(self, meta_steps: int | None) -> None:
        """Refuse a schedule that has no end.

        Args:
            meta_steps: The strategy's meta-steps; ``None`` where they depend on its results.

        Raises:
            ValueError: The schedule is a cosine, and nothing says where it ends.
        """
        if self.meta_schedule == "cosine" and not (self.meta_schedule_steps or meta_steps):
            raise ValueError(
                "meta_schedule_steps must be given for the schedule 'cosine' with a strategy whose "
                "meta-steps depend on its results, not None"
            )

    def rate(self, meta_step: int, meta_steps: int | None) -> float:
        """The meta-optimizer's learning rate.

        Args:
            meta_step: How many meta-steps the run has taken before.
            meta_steps: The strategy's meta-steps; ``None`` where they depend on its results.
        """
        if meta_step < self.meta_warmup:
            return self.meta_lr * (meta_step + 1) / self.meta_warmup
        if self.meta_schedule == "constant":
            return self.meta_lr
        end = self.meta_schedule_steps or meta_steps or 0
        gone = (meta_step - self.meta_warmup) / max(end - self.meta_warmup, 1)
        share = (1 + math.cos(math.pi * min(gone, 1.0))) / 2
        return self.meta_lr * (self.meta_lr_end + (1 - self.meta_lr_end) * share)
