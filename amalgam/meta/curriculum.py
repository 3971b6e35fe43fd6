"""The strategies: fixed stages, the paper's curriculum, and a fixed number of periods.

:mod:`amalgam.meta.periods` says what a strategy is. Source of :class:`Curriculum` and
:class:`Repeat`: the code of the authors of Optimizer Amalgamation (ICLR 2022).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from amalgam.hints import did_you_mean
from amalgam.meta.periods import INITIAL, Finish, Period, Record, Unrolls

IMITATION_WEIGHTS: dict[str, tuple[float, ...]] = {
    "il_more": (0.2, 0.1, 0.05, 0.02),
    "il_adjusted": (0.2, 0.04, 0.02, 0.01),
    "il_staged": (1.0, 0.0, 0.0, 0.0),
}
"""Weights of the imitation loss by stage; ``il_more`` is the paper's."""

# Unrolls(unroll, windows, episodes, warmup_windows, warmup_lr)
_REPEAT_VALIDATION = Unrolls(100, 5, 2, 0, 0.01)
_SIMPLE_VALIDATION = Unrolls(20, 25, 2, 0, 0.01)

Schedule = float | tuple[float, ...]
"""A number for all stages (or periods), or one for each, of which the last stands for the rest."""


def value_at(schedule: Schedule, index: int) -> float:
    """A schedule's number at a stage or period."""
    if isinstance(schedule, tuple):
        return schedule[min(index, len(schedule) - 1)]
    return schedule


@dataclass(frozen=True)
class _Place:
    """Which period a strategy does next, and from which checkpoint."""

    stage: int = 0
    period: int = 0
    repeat: int = 0
    begin_from: str = INITIAL


class _RuleByRecords(ABC):
    """A strategy as a rule that says where to go from the last of some records."""

    @property
    def goes_back(self) -> bool:
        """See :class:`amalgam.meta.periods.Strategy`."""
        return True

    @property
    def meta_steps(self) -> int | None:
        """See :class:`amalgam.meta.periods.Strategy`."""
        return None

    def next(self, records: Sequence[Record]) -> Period | Finish:
        """See :class:`amalgam.meta.periods.Strategy`."""
        place: _Place | Finish = _Place()
        for index, record in enumerate(records):
            if isinstance(place, Finish):
                raise ValueError(
                    f"records must end with the last period, not go on with {record.name}"
                )
            expected = (place.stage, place.period, place.repeat)
            if (record.stage, record.period, record.repeat) != expected:
                wanted = self._period(place).name
                raise ValueError(
                    f"records must be of this strategy: {record.name} stands where it does {wanted}"
                )
            place = self._after(records[: index + 1])
        return place if isinstance(place, Finish) else self._period(place)

    @abstractmethod
    def _after(self, records: Sequence[Record]) -> _Place | Finish:
        """Where to go from the last of one or more records."""

    @abstractmethod
    def _period(self, place: _Place) -> Period:
        """What to train there."""


@dataclass(frozen=True)
class Stage:
    """A stretch of meta-training.

    Attributes:
        episodes: Episodes, each with a new optimizee.
        windows: Windows of each; a meta-step follows every one.
        imitation_weight: Weight of the imitation loss beside the meta-loss.
    """

    episodes: int = 10
    windows: int = 1
    imitation_weight: float = 0.2

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        for name in ("episodes", "windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if not self.imitation_weight >= 0:
            raise ValueError(f"imitation_weight must be 0 or more, not {self.imitation_weight}")


@dataclass(frozen=True)
class Stages(_RuleByRecords):
    """Fixed stages, one period each, trained straight on.

    Their episodes warm up as the student's configuration says. The run validates every
    :attr:`amalgam.meta.Training.validate_every` meta-steps, and keeps the best student.

    Attributes:
        stages: The stages, in order; a recipe may give tables.
        unroll: Steps of a window.
    """

    stages: tuple[Stage, ...] = (Stage(),)
    unroll: int = 100

    def __post_init__(self) -> None:
        """Make stages of tables, and refuse what can't be run."""
        stages = (Stage(**s) if isinstance(s, Mapping) else s for s in self.stages)
        object.__setattr__(self, "stages", tuple(stages))
        if not self.stages:
            raise ValueError("stages must hold at least one stage, not none")
        for stage in self.stages:
            if not isinstance(stage, Stage):
                raise TypeError(f"stages must hold stages, as in (Stage(10, 2),), not {stage!r}")
        if self.unroll < 1:
            raise ValueError(f"unroll must be 1 or more, not {self.unroll}")

    @property
    def goes_back(self) -> bool:
        """See :class:`amalgam.meta.periods.Strategy`."""
        return False

    @property
    def meta_steps(self) -> int:
        """See :class:`amalgam.meta.periods.Strategy`."""
        return sum(stage.episodes * stage.windows for stage in self.stages)

    def _period(self, place: _Place) -> Period:
        stage = self.stages[place.stage]
        return Period(
            **asdict(place),
            training=Unrolls(self.unroll, stage.windows, stage.episodes, 0, 0.0),
            imitation_weight=stage.imitation_weight,
            validation=None,
            own_warmup=True,
        )

    def _after(self, records: Sequence[Record]) -> _Place | Finish:
        last = records[-1]
        if last.stage + 1 == len(self.stages):
            return Finish(last.name)
        return _Place(last.stage + 1, 0, 0, last.name)


def _exploded(loss: float, reference: float, threshold: float) -> bool:
    """Whether a loss exceeds its reference by more than a share of it; NaN never does."""
    return loss > reference + threshold * abs(reference)


def _best(records: Sequence[Record]) -> Record | None:
    """The record with the lowest validation, the first of equals; NaN does not count."""
    known = [record for record in records if not math.isnan(record.validation)]
    return min(known, key=lambda record: record.validation) if known else None


def _records_of(records: Sequence[Record], stage: int, period: int | None = None) -> list[Record]:
    return [r for r in records if r.stage == stage and period in (None, r.period)]


def _check(strategy: Any, counts: Sequence[str], schedules: Sequence[str]) -> None:
    for name in schedules:
        value = getattr(strategy, name)
        if isinstance(value, list):
            object.__setattr__(strategy, name, value := tuple(value))
        if value == ():
            raise ValueError(f"{name} must be a number, or one or more, not none")
        least = 1 if name in ("unroll", "windows", "episodes") else 0
        for number in value if isinstance(value, tuple) else (value,):
            if not least <= number < math.inf:
                raise ValueError(f"{name} must be {least} or more and finite, not {number}")
    for name in counts:
        if getattr(strategy, name) < 1:
            raise ValueError(f"{name} must be 1 or more, not {getattr(strategy, name)}")
    for name in ("max_repeat", "repeat_threshold"):
        if hasattr(strategy, name) and not getattr(strategy, name) >= 0:
            raise ValueError(f"{name} must be 0 or more, not {getattr(strategy, name)}")


_SCHEDULES = (
    "unroll",
    "windows",
    "episodes",
    "imitation_weight",
    "warmup_windows",
    "warmup_lr",
)


def _unrolls(strategy: Curriculum | Repeat, index: int) -> Unrolls:
    return Unrolls(
        unroll=int(value_at(strategy.unroll, index)),
        windows=int(value_at(strategy.windows, index)),
        episodes=int(value_at(strategy.episodes, index)),
        warmup_windows=int(value_at(strategy.warmup_windows, index)),
        warmup_lr=value_at(strategy.warmup_lr, index),
    )


@dataclass(frozen=True)
class Curriculum(_RuleByRecords):
    """Longer and longer unrolls, stage by stage, each as long as it helps (the paper's strategy).

    A stage has at least ``num_periods + 1`` periods, and goes on until ``num_chances`` of them were
    no better on validation than the best; the next begins from the best one's checkpoint. A
    period validates on the *next* stage's unrolls.

    A period whose loss exploded is done again from where it began: if its validation exceeds the
    one of the period before, or for a stage's first period its *training* loss exceeds the best
    validation of the stage before, by more than ``repeat_threshold`` of that. The first period of
    all is never repeated; what is NaN never counts as exploded, nor as best.

    Attributes:
        num_stages: Stages.
        num_periods: See above.
        num_chances: See above.
        unroll: Steps of a window, by stage.
        windows: Windows of an episode, by stage.
        episodes: Episodes of a period, by stage.
        imitation_weight: Weight of the imitation loss, by stage; or a name of
            :data:`IMITATION_WEIGHTS`.
        warmup_windows: Windows of SGD before an episode's first, by stage.
        warmup_lr: Its learning rate, by stage.
        max_repeat: How often a period is repeated at most; 0 for no limit.
        repeat_threshold: See above.
    """

    num_stages: int = 4
    num_periods: int = 5
    num_chances: int = 5
    unroll: Schedule = 100
    windows: Schedule = (1, 2, 5, 10, 20)
    episodes: Schedule = 10
    imitation_weight: Schedule | str = 0.0
    warmup_windows: Schedule = 1
    warmup_lr: Schedule = 0.05
    max_repeat: int = 4
    repeat_threshold: float = 0.5

    def __post_init__(self) -> None:
        """Fill in a named schedule, and refuse what can't be run."""
        _name_weights(self)
        _check(self, ("num_stages", "num_periods", "num_chances"), _SCHEDULES)

    def _period(self, place: _Place) -> Period:
        assert not isinstance(self.imitation_weight, str)
        return Period(
            **asdict(place),
            training=_unrolls(self, place.stage),
            imitation_weight=value_at(self.imitation_weight, place.stage),
            validation=_unrolls(self, place.stage + 1),
        )

    def _after(self, records: Sequence[Record]) -> _Place | Finish:
        last = records[-1]
        if self._must_repeat(records):
            begin_from = self._previous(records)
            return _Place(last.stage, last.period, last.repeat + 1, begin_from)
        best = _best(_records_of(records, last.stage))
        if last.period < self.num_periods or (
            best is not None and last.period - best.period < self.num_chances
        ):
            return _Place(last.stage, last.period + 1, 0, last.name)
        kept = self._best_until(records, last.stage)
        if last.stage + 1 == self.num_stages:
            return Finish(kept)
        return _Place(last.stage + 1, 0, 0, kept)

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
        """What the last period began from, or the best of its repeats."""
        last = records[-1]
        if not last.period:
            return self._best_until(records, last.stage - 1)
        best = _best(_records_of(records, last.stage, last.period - 1))
        assert best is not None  # Without one nothing is repeated.
        return best.name

    def _best_until(self, records: Sequence[Record], stage: int) -> str:
        """The best of a stage, or of the one before where all of it is NaN."""
        for number in range(stage, -1, -1):
            best = _best(_records_of(records, number))
            if best is not None:
                return best.name
        return INITIAL


@dataclass(frozen=True)
class Repeat(_RuleByRecords):
    """A fixed number of periods, each done again if its loss exploded (the choice's strategy).

    A period that is not the first is done again, from the checkpoint of the one before, if its
    validation exceeds that one's by more than ``repeat_threshold`` of it. What is NaN never counts
    as exploded. The last period's checkpoint is kept.

    Attributes:
        num_periods: Periods.
        unroll: Steps of a window, by period.
        windows: Windows of an episode, by period.
        episodes: Episodes, by period.
        imitation_weight: Weight of the imitation loss, by period; or a name of
            :data:`IMITATION_WEIGHTS`.
        warmup_windows: Windows of SGD before an episode's first, by period.
        warmup_lr: Its learning rate, by period.
        validation: What to validate on.
        max_repeat: How often a period is repeated at most; 0 for no limit.
        repeat_threshold: See above; infinite for no repeats.
    """

    num_periods: int = 20
    unroll: Schedule = 100
    windows: Schedule = (1, 2, 5)
    episodes: Schedule = 10
    imitation_weight: Schedule | str = 0.0
    warmup_windows: Schedule = 0
    warmup_lr: Schedule = 0.0
    validation: Unrolls = _REPEAT_VALIDATION
    max_repeat: int = 4
    repeat_threshold: float = 0.8

    def __post_init__(self) -> None:
        """Fill in what has a name, and refuse what can't be run."""
        _name_weights(self)
        if isinstance(self.validation, Mapping):
            object.__setattr__(self, "validation", Unrolls(**self.validation))
        _check(self, ("num_periods",), _SCHEDULES)

    def _period(self, place: _Place) -> Period:
        assert not isinstance(self.imitation_weight, str)
        return Period(
            **asdict(place),
            training=_unrolls(self, place.period),
            imitation_weight=value_at(self.imitation_weight, place.period),
            validation=self.validation,
        )

    def _after(self, records: Sequence[Record]) -> _Place | Finish:
        last = records[-1]
        if last.period and not (self.max_repeat and last.repeat >= self.max_repeat):
            before = _records_of(records, 0, last.period - 1)[-1]
            if _exploded(last.validation, before.validation, self.repeat_threshold):
                return _Place(0, last.period, last.repeat + 1, before.name)
        if last.period + 1 == self.num_periods:
            return Finish(last.name)
        return _Place(0, last.period + 1, 0, last.name)


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
    unroll: Schedule = 20,
    windows: Schedule = 25,
    episodes: Schedule = 10,
    validation: Unrolls = _SIMPLE_VALIDATION,
    **more: Any,
) -> Repeat:
    """A fixed number of periods, none of them repeated; arguments as :class:`Repeat`'s."""
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
    """How the authors train the optimal choice (``cl_fixed``): 180 windows of 100 steps."""
    return Repeat(
        num_periods=5,
        warmup_windows=(0, 1),
        warmup_lr=(0.0, 0.05),
        validation=Unrolls(100, 10, 1, 1, 0.05),
        repeat_threshold=0.9,
    )


STRATEGIES: dict[str, type] = {"stages": Stages, "curriculum": Curriculum, "repeat": Repeat}
"""The strategies by their names in recipes; each is a :class:`amalgam.meta.periods.Strategy`."""
