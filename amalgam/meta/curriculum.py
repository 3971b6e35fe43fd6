"""The strategies by name; the paper's curriculum, and a fixed number of periods.

A recipe's table ``[strategy]`` chooses one by its ``kind``: a name of :data:`STRATEGIES`, or
``"simple"`` or ``"choice"``, which are :class:`Repeat` with the settings of :func:`simple` and
:func:`choice_strategy`.

:mod:`amalgam.meta.periods` says what a strategy is. Source of :class:`Curriculum` and
:class:`Repeat`: the code of the authors of Optimizer Amalgamation (ICLR 2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from amalgam.hints import did_you_mean
from amalgam.meta.meta_batch import MetaBatch
from amalgam.meta.periods import INITIAL, Finish, Period, Record, UnrollSettings
from amalgam.meta.rule import Place, RuleByRecords
from amalgam.meta.stages import Stages
from amalgam.ranges import check_fields, check_kind

IMITATION_WEIGHTS: dict[str, tuple[float, ...]] = {
    "il_more": (0.2, 0.1, 0.05, 0.02),
    "il_adjusted": (0.2, 0.04, 0.02, 0.01),
    "il_staged": (1.0, 0.0, 0.0, 0.0),
}
"""Named schedules of the imitation loss's weight, one number per stage (or period).

``imitation_weight`` of :class:`Curriculum` and :class:`Repeat` takes such a name in place of
numbers. The last number holds for all later stages, too. ``il_more`` is the paper's schedule.
"""

# UnrollSettings(unroll, windows, episodes, warmup_windows, warmup_lr)
_REPEAT_VALIDATION = UnrollSettings(100, 5, 2, 0, 0.01)
_SIMPLE_VALIDATION = UnrollSettings(20, 25, 2, 0, 0.01)

Schedule = float | tuple[float, ...]
"""One number for all stages (or periods), or one for each; the last one holds for the rest."""

Counts = int | tuple[int, ...]
"""A schedule of whole numbers."""


def value_at(schedule: Schedule, index: int) -> float:
    """A schedule's number at a stage or period."""
    if isinstance(schedule, tuple):
        return schedule[min(index, len(schedule) - 1)]
    return schedule


def _exploded(loss: float, reference: float, threshold: float) -> bool:
    """Whether a loss exceeds its reference by more than a share of it; NaN never does."""
    return loss > reference + threshold * abs(reference)


def _best(records: Sequence[Record]) -> Record | None:
    """The record with the lowest validation, the first of equals; only finite ones count."""
    known = [record for record in records if math.isfinite(record.validation)]
    return min(known, key=lambda record: record.validation) if known else None


def _records_of(records: Sequence[Record], stage: int, period: int | None = None) -> list[Record]:
    return [r for r in records if r.stage == stage and period in (None, r.period)]


def _check(strategy: Curriculum | Repeat, *counts: str) -> None:
    check_fields(
        strategy,
        counts=(*counts, "unroll", "windows", "episodes"),
        whole=("warmup_windows", "max_repeat"),
        not_negative=("imitation_weight", "warmup_lr", "repeat_threshold"),
        or_infinite=("repeat_threshold",),
    )


def _unrolls(strategy: Curriculum | Repeat, index: int) -> UnrollSettings:
    return UnrollSettings(
        unroll=int(value_at(strategy.unroll, index)),
        windows=int(value_at(strategy.windows, index)),
        episodes=int(value_at(strategy.episodes, index)),
        warmup_windows=int(value_at(strategy.warmup_windows, index)),
        warmup_lr=value_at(strategy.warmup_lr, index),
    )


@dataclass(frozen=True)
class Curriculum(RuleByRecords):
    """The paper's strategy: unrolls get longer from stage to stage; a stage lasts while it helps.

    Every period is validated on the unrolls of the *next* stage. Lower is better. The rules:

    1. A period is repeated if its loss exploded and it was repeated fewer than ``max_repeat``
       times. The loss exploded if it is greater than ``r + repeat_threshold * |r|``, for a
       reference r. In a stage's first period the loss is the mean meta-loss of its *training*, and
       r is the best validation of the stage before. In all other periods the loss is the
       validation, and r is the best validation of the period before, its repeats included. The
       repeat begins from the checkpoint that r belongs to. The first period of all is never
       repeated.
    2. Otherwise the stage goes on with a new period, from the checkpoint of the last one, until
       both of these hold: it has ``num_periods + 1`` periods, and the last ``num_chances`` periods
       in a row were no better than the stage's best. A period and its repeats count as one.
    3. The next stage begins from the checkpoint of the stage's best validation. After the last
       stage the run keeps that checkpoint.

    A validation that is not finite is never best and never r. Infinity, which says that an episode
    failed, counts as exploded, NaN never does. Without any r nothing is repeated. If no validation
    of a stage is finite, the stage ends after ``num_periods + 1`` periods, and the best checkpoint
    of the stage before (or the initial weights) stands for its best.

    Attributes:
        num_stages: Number of stages.
        num_periods: A stage has at least one period more than this; the authors count so.
        num_chances: How many periods in a row without a new best end a stage.
        unroll: Steps per window, by stage.
        windows: Windows per episode, by stage.
        episodes: Episodes per period, by stage.
        imitation_weight: Weight of the imitation loss, by stage; or a name of
            :data:`IMITATION_WEIGHTS`.
        warmup_windows: Length of the SGD before an episode's first window, in windows, by stage.
        warmup_lr: The learning rate of that SGD, by stage.
        max_repeat: How often one period is repeated at most; 0 means without limit.
        repeat_threshold: By which share of the reference's absolute value a loss must exceed the
            reference to count as exploded.
    """

    num_stages: int = 4
    num_periods: int = 5
    num_chances: int = 5
    unroll: Counts = 100
    windows: Counts = (1, 2, 5, 10, 20)
    episodes: Counts = 10
    imitation_weight: Schedule | str = 0.0
    warmup_windows: Counts = 1
    warmup_lr: Schedule = 0.05
    max_repeat: int = 4
    repeat_threshold: float = 0.5

    def __post_init__(self) -> None:
        """Fill in a named schedule, and refuse what can't be run."""
        _name_weights(self)
        _check(self, "num_stages", "num_periods", "num_chances")

    def _period(self, place: Place) -> Period:
        assert not isinstance(self.imitation_weight, str)
        return Period(
            **asdict(place),
            training=_unrolls(self, place.stage),
            imitation_weight=value_at(self.imitation_weight, place.stage),
            validation=_unrolls(self, place.stage + 1),
        )

    def _after(self, records: Sequence[Record]) -> Place | Finish:
        last = records[-1]
        if self._must_repeat(records):
            begin_from = self._previous(records)
            return Place(last.stage, last.period, last.repeat + 1, begin_from)
        best = _best(_records_of(records, last.stage))
        if last.period < self.num_periods or (
            best is not None and last.period - best.period < self.num_chances
        ):
            return Place(last.stage, last.period + 1, 0, last.name)
        kept = self._best_until(records, last.stage)
        if last.stage + 1 == self.num_stages:
            return Finish(kept)
        return Place(last.stage + 1, 0, 0, kept)

    def _must_repeat(self, records: Sequence[Record]) -> bool:
        last = records[-1]
        if self.max_repeat and last.repeat >= self.max_repeat:
            return False
        if last.period:
            reference = _best(_records_of(records, last.stage, last.period - 1))
            loss = last.validation
        else:
            reference = _best(_records_of(records, last.stage - 1))
            loss = last.meta_loss
        if reference is None:
            return False
        return _exploded(loss, reference.validation, self.repeat_threshold)

    def _previous(self, records: Sequence[Record]) -> str:
        """The best checkpoint of the period before the last one, its repeats included."""
        last = records[-1]
        if not last.period:
            return self._best_until(records, last.stage - 1)
        best = _best(_records_of(records, last.stage, last.period - 1))
        assert best is not None  # Without one nothing is repeated.
        return best.name

    def _best_until(self, records: Sequence[Record], stage: int) -> str:
        """The best checkpoint of a stage, or of the stage before if all of it is NaN."""
        for number in range(stage, -1, -1):
            best = _best(_records_of(records, number))
            if best is not None:
                return best.name
        return INITIAL


@dataclass(frozen=True)
class Repeat(RuleByRecords):
    """A fixed number of periods, each repeated if its loss exploded.

    The loss of a period exploded if its validation is greater than ``r + repeat_threshold * |r|``,
    where r is the validation of the period before (of its last repeat). Then the period is
    repeated, from that one's checkpoint. The first period is never repeated, and a NaN never counts
    as exploded. The run keeps the checkpoint of the last period.

    Attributes:
        num_periods: Number of periods.
        unroll: Steps per window, by period.
        windows: Windows per episode, by period.
        episodes: Number of episodes, by period.
        imitation_weight: Weight of the imitation loss, by period; or a name of
            :data:`IMITATION_WEIGHTS`.
        warmup_windows: Length of the SGD before an episode's first window, in windows, by period.
        warmup_lr: The learning rate of that SGD, by period.
        validation: The unrolls that each period is validated on. It may also be a mapping of
            :class:`amalgam.meta.periods.UnrollSettings`'s fields, as recipes give it.
        max_repeat: How often one period is repeated at most; 0 means without limit.
        repeat_threshold: By which share of the reference's absolute value a validation must exceed
            the reference to count as exploded. Infinity means no repeats.
    """

    num_periods: int = 20
    unroll: Counts = 100
    windows: Counts = (1, 2, 5)
    episodes: Counts = 10
    imitation_weight: Schedule | str = 0.0
    warmup_windows: Counts = 0
    warmup_lr: Schedule = 0.0
    validation: UnrollSettings = _REPEAT_VALIDATION
    max_repeat: int = 4
    repeat_threshold: float = 0.8

    def __post_init__(self) -> None:
        """Fill in a named schedule and a mapping, and refuse what can't be run."""
        _name_weights(self)
        if isinstance(self.validation, Mapping):
            object.__setattr__(self, "validation", UnrollSettings(**self.validation))
        check_kind("validation", self.validation, UnrollSettings, "UnrollSettings")
        _check(self, "num_periods")

    def _period(self, place: Place) -> Period:
        assert not isinstance(self.imitation_weight, str)
        return Period(
            **asdict(place),
            training=_unrolls(self, place.period),
            imitation_weight=value_at(self.imitation_weight, place.period),
            validation=self.validation,
        )

    def _after(self, records: Sequence[Record]) -> Place | Finish:
        last = records[-1]
        if last.period and not (self.max_repeat and last.repeat >= self.max_repeat):
            before = _records_of(records, 0, last.period - 1)[-1]
            if _exploded(last.validation, before.validation, self.repeat_threshold):
                return Place(0, last.period, last.repeat + 1, before.name)
        if last.period + 1 == self.num_periods:
            return Finish(last.name)
        return Place(0, last.period + 1, 0, last.name)


def _name_weights(strategy: Curriculum | Repeat) -> None:
    name = strategy.imitation_weight
    if isinstance(name, str):
        if name not in IMITATION_WEIGHTS:
            raise ValueError(
                f"imitation_weight must be numbers or one of {list(IMITATION_WEIGHTS)}, "
                f"not {name!r}{did_you_mean(name, IMITATION_WEIGHTS)}"
            )
        object.__setattr__(strategy, "imitation_weight", IMITATION_WEIGHTS[name])


def simple(
    num_periods: int = 25,
    unroll: Counts = 20,
    windows: Counts = 25,
    episodes: Counts = 10,
    validation: UnrollSettings = _SIMPLE_VALIDATION,
    **more: Any,
) -> Repeat:
    """A fixed number of periods, none of them repeated (``kind = "simple"`` in recipes).

    The arguments are :class:`Repeat`'s.
    """
    return Repeat(
        num_periods,
        unroll,
        windows,
        episodes,
        validation=validation,
        repeat_threshold=math.inf,
        **more,
    )


def choice_strategy() -> Repeat:
    """How the authors train the optimal choice: 180 windows of 100 steps.

    Recipes choose it with ``kind = "choice"``; the authors' code calls it ``cl_fixed``.
    """
    return Repeat(
        num_periods=5,
        warmup_windows=(0, 1),
        warmup_lr=(0.0, 0.05),
        validation=UnrollSettings(100, 10, 1, 1, 0.05),
        repeat_threshold=0.9,
    )


STRATEGIES: dict[str, type] = {
    "stages": Stages,
    "curriculum": Curriculum,
    "repeat": Repeat,
    "meta-batch": MetaBatch,
}
"""The strategies by ``kind`` in recipes; each is a :class:`amalgam.meta.periods.Strategy`."""
