"""The strategy that trains several episodes side by side, at different places of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from amalgam.meta.periods import Finish, Period, Record, Slots, UnrollSettings
from amalgam.meta.rule import Place, RuleByRecords
from amalgam.ranges import check_fields


@dataclass(frozen=True)
class MetaBatch(RuleByRecords):
    """One period, in which every meta-step takes a window of several episodes.

    Each of ``slots`` slots runs an episode of its own. When an episode ends, a new one begins in
    its slot. An episode ends early, and is counted, when it fails: a row of the student took no
    step of a window, or had no finite loss in it, or a window's loss or meta-gradient was not
    finite. It ends for all replicates then. What failed adds nothing to the meta-gradient.

    A new episode draws its task by the tasks' weights, among those that no other slot runs; among
    all of them if there are more slots than tasks. It draws its length, its *horizon*, log-uniform
    between ``shortest`` and ``longest`` steps, in whole windows. A slot's first episode has been
    trained for a part of its horizon when the first meta-step begins, by the initial student: slot
    k of K for k / K of it. So late windows are seen as often as early ones from the beginning on.

    Each slot's meta-gradient is clipped to ``slot_clip``, then the slots' mean is taken. Episodes
    warm up as the student's configuration says; the warm-up does not count in the horizon. The run
    validates the student every :attr:`amalgam.meta.Training.validate_every` meta-steps and keeps
    the best one. Under ``torchrun``, process r of W runs the slots k with k % W == r.

    Attributes:
        meta_steps: Meta-steps of the run.
        slots: How many episodes run side by side.
        unroll: Steps per window.
        shortest: The shortest horizon, in steps.
        longest: The longest horizon, in steps.
        imitation_weight: Weight of the imitation loss beside the meta-loss.
        slot_clip: The largest norm of a slot's meta-gradient, over all weights; a longer one is
            scaled down to it. Infinity clips none.
    """

    meta_steps: int = 200
    slots: int = 4
    unroll: int = 50
    shortest: int = 100
    longest: int = 2000
    imitation_weight: float = 0.0
    slot_clip: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        check_fields(
            self,
            counts=("meta_steps", "slots", "unroll", "shortest", "longest"),
            positive=("slot_clip",),
            not_negative=("imitation_weight",),
            or_infinite=("slot_clip",),
        )
        if self.shortest < self.unroll:
            raise ValueError(
                f"shortest must be {self.unroll} or more, one window (unroll), not {self.shortest}"
            )
        if self.longest < self.shortest:
            raise ValueError(
                f"longest must be {self.shortest} or more, as shortest is, not {self.longest}"
            )
        if self.longest // self.unroll * self.unroll < self.shortest:
            raise ValueError(
                f"longest must leave a whole number of windows of {self.unroll} steps between "
                f"shortest, {self.shortest}, and itself, not {self.longest}"
            )

    @property
    def goes_back(self) -> bool:
        """See :class:`amalgam.meta.periods.Strategy`."""
        return False

    def _period(self, place: Place) -> Period:
        return Period(
            **asdict(place),
            training=UnrollSettings(self.unroll, 1, self.meta_steps, 0, 0.0),
            imitation_weight=self.imitation_weight,
            validation=None,
            own_warmup=True,
            slots=Slots(self.slots, self.shortest, self.longest, self.slot_clip),
        )

    def _after(self, records: Sequence[Record]) -> Finish:
        return Finish(records[-1].name)
