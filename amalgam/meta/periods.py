"""Periods, of which meta-training consists, and the protocol of strategies, which choose them.

A *period* is a number of episodes with the same settings, then perhaps a meta-validation. A
*strategy* is a pure function of the records of the periods so far: it says what to train next and
from which weights, or that training is over. A run that keeps its records (:meth:`Record.to_json`)
can stop between any two periods and go on. The strategies themselves are in
:mod:`amalgam.meta.curriculum`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from amalgam.ranges import check_fields

INITIAL = "initial"
"""The name of the weights that training begins with, where a period's name is expected."""


@dataclass(frozen=True)
class UnrollSettings:
    """How many episodes a period or its validation has, and how long they are.

    Attributes:
        unroll: Steps per window.
        windows: Windows per episode. In the place of an episode that fails (see
            :class:`amalgam.meta.MetaBatch`) another one takes the windows that are left of it.
        episodes: Number of episodes.
        warmup_windows: Length of the SGD before an episode's first window, in windows: it takes
            ``warmup_windows * unroll`` steps.
        warmup_lr: The learning rate of that SGD.
    """

    unroll: int
    windows: int
    episodes: int
    warmup_windows: int
    warmup_lr: float

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        check_fields(
            self,
            counts=("unroll", "windows", "episodes"),
            whole=("warmup_windows",),
            not_negative=("warmup_lr",),
        )

    @property
    def meta_steps(self) -> int:
        """Meta-steps in all episodes: one follows each window."""
        return self.windows * self.episodes


@dataclass(frozen=True)
class Slots:
    """Episodes that run side by side; see :class:`amalgam.meta.MetaBatch`.

    Attributes:
        count: How many.
        shortest: The shortest horizon, in steps.
        longest: The longest horizon, in steps.
        clip: The largest norm of one slot's meta-gradient.
    """

    count: int
    shortest: int
    longest: int
    clip: float


@dataclass(frozen=True)
class Period:
    """A period that is to be trained: a number of episodes with the same settings.

    Attributes:
        stage: Its stage, from 0. It is 0 in strategies that have no stages.
        period: Its number in the stage, from 0.
        repeat: How often this period was trained before.
        begin_from: The checkpoint to begin from: :data:`INITIAL`, or an earlier period's ``name``.
            It holds the weights and the meta-optimizer's state.
        training: The unrolls to train.
        imitation_weight: Weight of the imitation loss.
        validation: The unrolls to validate on afterwards, without teachers, and with the same seed
            in every period. ``None`` for no validation of the period.
        own_warmup: Where true, episodes warm up by the student's own ``warmup_steps`` and
            ``warmup_lr``, and those of ``training`` have no effect.
        slots: Where given, every meta-step takes a window of each of several episodes, whose
            lengths are drawn. Of ``training``, only ``unroll`` and ``meta_steps`` count then.
    """

    stage: int
    period: int
    repeat: int
    begin_from: str
    training: UnrollSettings
    imitation_weight: float
    validation: UnrollSettings | None
    own_warmup: bool = False
    slots: Slots | None = None

    @property
    def name(self) -> str:
        """The name of its checkpoint."""
        return _name(self)


@dataclass(frozen=True)
class Finish:
    """What a strategy answers when training is over.

    Attributes:
        checkpoint: The name of the period whose weights the run keeps, if the strategy goes back;
            see :attr:`Strategy.goes_back`.
    """

    checkpoint: str


@dataclass(frozen=True)
class Record:
    """The results of a period that has been trained.

    Attributes:
        stage: Its stage, as in :class:`Period`.
        period: Its number in the stage.
        repeat: How often it was trained before.
        meta_loss: Mean meta-loss of its training.
        validation: Mean meta-loss of its validation; NaN where there was none.
    """

    stage: int
    period: int
    repeat: int
    meta_loss: float
    validation: float

    @classmethod
    def of(cls, period: Period, *, meta_loss: float, validation: float) -> Record:
        """The record of a period with these results."""
        return cls(period.stage, period.period, period.repeat, meta_loss, validation)

    @property
    def name(self) -> str:
        """The name of its checkpoint."""
        return _name(self)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON can hold it: numbers that are not finite become strings.

        Strings, because :meth:`from_json` has to tell NaN from infinity, as strategies do.
        """
        return {
            key: value if math.isfinite(value) else str(value)
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Record:
        """The record that :meth:`to_json` gave."""
        return cls(
            stage=int(stored["stage"]),
            period=int(stored["period"]),
            repeat=int(stored["repeat"]),
            meta_loss=float(stored["meta_loss"]),
            validation=float(stored["validation"]),
        )


def _name(period: Period | Record) -> str:
    return f"stage_{period.stage}.{period.period}.{period.repeat}"


@runtime_checkable
class Strategy(Protocol):
    """Chooses the next period by the records of all periods before.

    Its ``repr`` says all that decides what it does: a run resumes only with the same one.
    """

    @property
    def goes_back(self) -> bool:
        """Whether the strategy may return to the weights of an earlier period.

        If it may, every period leaves a checkpoint, a period begins from the one that
        :attr:`Period.begin_from` names, and the run keeps the weights of the one that
        :attr:`Finish.checkpoint` names. If not, each period goes on from the weights of the last
        one, and the run keeps those of the best meta-validation
        (:attr:`amalgam.meta.Training.validate_every`), or the last ones if there was none.
        """
        ...

    @property
    def meta_steps(self) -> int | None:
        """Meta-steps of the whole run; ``None`` where they depend on the periods' results."""
        ...

    def next(self, records: Sequence[Record]) -> Period | Finish:
        """The period that follows, or that training is over.

        Args:
            records: All periods so far, in the order in which they were trained.

        Raises:
            ValueError: The records are not of the periods that this strategy would have chosen.
        """
        ...
