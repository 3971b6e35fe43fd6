"""Periods, of which meta-training consists, and the strategies that choose them.

A *period* is a few episodes, then perhaps a meta-validation. A *strategy* is a pure function of how
the periods so far came out: it says what to train next and from which weights, or that training is
over. A run that keeps its records (:meth:`Record.to_json`) can stop between any two periods and go
on. The strategies themselves are in :mod:`amalgam.meta.curriculum`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

INITIAL = "initial"
"""Name of the checkpoint of the weights that training begins with."""


@dataclass(frozen=True)
class Unrolls:
    """How optimizees are unrolled.

    Attributes:
        unroll: Steps of a window.
        windows: Windows of an episode.
        episodes: Episodes.
        warmup_windows: Windows of SGD before an episode's first.
        warmup_lr: The learning rate of that SGD.
    """

    unroll: int
    windows: int
    episodes: int
    warmup_windows: int
    warmup_lr: float

    @property
    def meta_steps(self) -> int:
        """Meta-steps of all episodes: one follows every window."""
        return self.windows * self.episodes


@dataclass(frozen=True)
class Period:
    """A period to train.

    Attributes:
        stage: Its stage, from 0; 0 where a strategy has none.
        period: Its number in the stage, from 0.
        repeat: How often it was done before.
        begin_from: The checkpoint to begin from: :data:`INITIAL`, or another period's ``name``.
            It holds the meta-optimizer's state, too.
        training: What to train.
        imitation_weight: Weight of the imitation loss.
        validation: What to validate on afterwards, without teachers and with the same seed in every
            period; ``None`` for no validation of the period.
        own_warmup: Whether episodes warm up for as many steps, and at the rate, that the student's
            configuration says, and not as ``training`` says.
    """

    stage: int
    period: int
    repeat: int
    begin_from: str
    training: Unrolls
    imitation_weight: float
    validation: Unrolls | None
    own_warmup: bool = False

    @property
    def name(self) -> str:
        """The name of its checkpoint."""
        return _name(self)


@dataclass(frozen=True)
class Finish:
    """Training is over.

    Attributes:
        checkpoint: The checkpoint to keep.
    """

    checkpoint: str


@dataclass(frozen=True)
class Record:
    """How a period came out.

    Attributes:
        stage: Its stage.
        period: Its number.
        repeat: How often it was done before.
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
        """As JSON can hold it: numbers that are not finite become strings."""
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


class Strategy(Protocol):
    """What comes next, given all that came before."""

    @property
    def goes_back(self) -> bool:
        """Whether a period may begin from, or training end with, earlier weights than the last.

        Then every period leaves a checkpoint, and :attr:`Finish.checkpoint` says which weights the
        run keeps. Otherwise weights are trained straight on, and the run keeps those of the best
        meta-validation (:attr:`amalgam.meta.Training.validate_every`), or the last.
        """
        ...

    @property
    def meta_steps(self) -> int | None:
        """Meta-steps of the whole run; ``None`` where they depend on how periods come out."""
        ...

    def next(self, records: Sequence[Record]) -> Period | Finish:
        """What to do after these periods, which were done in this order.

        Raises:
            ValueError: They are not the periods that this strategy would have done.
        """
        ...
