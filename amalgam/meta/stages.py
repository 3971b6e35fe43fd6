"""The strategy that trains in fixed stages, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from amalgam.meta.periods import Finish, Period, Record, UnrollSettings
from amalgam.meta.rule import Place, RuleByRecords
from amalgam.ranges import check_fields, several_of


@dataclass(frozen=True)
class Stage:
    """One stage of :class:`Stages`.

    Attributes:
        episodes: Number of episodes, each with new optimizees.
        windows: Number of windows per episode; a meta-step follows each window. In the place of an
            episode that fails (see :class:`amalgam.meta.MetaBatch`) another one takes the windows
            that are left of it.
        imitation_weight: Weight of the imitation loss beside the meta-loss.
    """

    episodes: int = 10
    windows: int = 1
    imitation_weight: float = 0.2

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        check_fields(self, counts=("episodes", "windows"), not_negative=("imitation_weight",))


@dataclass(frozen=True)
class Stages(RuleByRecords):
    """Fixed stages of one period each, one after another, with no return to earlier weights.

    Episodes warm up as the student's configuration says. The run validates the student every
    :attr:`amalgam.meta.Training.validate_every` meta-steps and keeps the best one.

    Attributes:
        stages: The stages, in order. Each may also be a mapping of :class:`Stage`'s fields, as
            recipes give them.
        unroll: Steps per window.
    """

    stages: tuple[Stage, ...] = (Stage(),)
    unroll: int = 100

    def __post_init__(self) -> None:
        """Make stages of tables, and refuse what can't be run."""
        given = several_of("stages", self.stages, Stage | Mapping, "a stage, such as Stage(10, 2)")
        stages = (Stage(**s) if isinstance(s, Mapping) else s for s in given)
        object.__setattr__(self, "stages", tuple(stages))
        if not self.stages:
            raise ValueError("stages must hold at least one stage, not none")
        check_fields(self, counts=("unroll",))

    @property
    def goes_back(self) -> bool:
        """See :class:`amalgam.meta.periods.Strategy`."""
        return False

    @property
    def meta_steps(self) -> int:
        """See :class:`amalgam.meta.periods.Strategy`."""
        return sum(stage.episodes * stage.windows for stage in self.stages)

    def _period(self, place: Place) -> Period:
        stage = self.stages[place.stage]
        return Period(
            **asdict(place),
            training=UnrollSettings(self.unroll, stage.windows, stage.episodes, 0, 0.0),
            imitation_weight=stage.imitation_weight,
            validation=None,
            own_warmup=True,
        )

    def _after(self, records: Sequence[Record]) -> Place | Finish:
        last = records[-1]
        if last.stage + 1 == len(self.stages):
            return Finish(last.name)
        return Place(last.stage + 1, 0, 0, last.name)
