"""The state of a run: progress, weights and meta-optimizers, and its slots' trajectories.

It is all that a checkpoint has to hold. Everything random derives from the seed and from the
numbers here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam import distributed, nests
from amalgam.meta.episode import Episodes, Trajectories
from amalgam.meta.periods import INITIAL, Record
from amalgam.meta.replicate import Replicate
from amalgam.policies import state_from_tensors, state_tensors


@dataclass(frozen=True)
class EpisodeAt:
    """An episode, and which of its windows comes next.

    Attributes:
        number: The episode's number in the run, from 0.
        task: The index of its task, or of the family that its task is drawn from.
        windows: How many windows it has.
        window: The next window's number, from 0.
    """

    number: int
    task: int
    windows: int
    window: int


class Slot(NamedTuple):
    """Where the episode in one slot stands.

    Attributes:
        trajectories: Parameters and states of its students and teachers after the last window.
        carried: What the estimator carries from window to window of the episode.
    """

    trajectories: Trajectories
    carried: list[Tensor]


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        meta_step: Meta-steps taken in the whole run.
        done: Meta-steps taken in the current period.
        episodes: Episodes of all periods before the current one.
        checkpoint: The name of the period (``INITIAL`` or ``Record.name``) whose weights the
            current period began with. It does not refer to ``checkpoint.safetensors``.
        meta_losses: The mean meta-loss of each meta-step of the current period, for its record.
        records: The records of the periods that are over.
        running: The episode in each slot; in a period without slots, the one that all processes
            run. Empty before a period's first meta-step.
        failed_episodes: How many episodes failed, in the whole run; see
            :class:`amalgam.meta.MetaBatch`.
    """

    meta_step: int = 0
    done: int = 0
    episodes: int = 0
    checkpoint: str = INITIAL
    meta_losses: list[float] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    running: list[EpisodeAt] = field(default_factory=list)
    failed_episodes: int = 0

    def to_json(self) -> dict[str, Any]:
        """The progress as JSON can hold it."""
        stored = asdict(self)
        stored["records"] = [record.to_json() for record in self.records]
        stored["meta_losses"] = [repr(loss) for loss in self.meta_losses]
        return stored

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Progress:
        """The progress that :meth:`to_json` gave."""
        fields = dict(stored)
        fields["records"] = [Record.from_json(record) for record in stored["records"]]
        fields["running"] = [EpisodeAt(**episode) for episode in stored["running"]]
        fields["meta_losses"] = [float(loss) for loss in stored["meta_losses"]]
        return cls(**fields)


class RunState:
    """All that changes in the course of a run.

    Args:
        replicates: The students, with their meta-optimizers.

    Attributes:
        replicates: The students, with their meta-optimizers.
        progress: How far the run is.
        slots: Where this process's episodes stand, by the slots' numbers; a slot is absent until
            its episode has begun. In periods without slots each process has the one whose number is
            its rank.
    """

    def __init__(self, replicates: Sequence[Replicate]) -> None:
        self.replicates = tuple(replicates)
        self.progress = Progress()
        self.slots: dict[int, Slot] = {}

    def learned(self) -> dict[str, Tensor]:
        """Weights, best and averaged ones, and meta-optimizers of all replicates, by name."""
        first, *others = self.replicates
        named = first.tensors()
        for index, replicate in enumerate(others, 1):
            named |= nests.prefixed(f"replicate.{index}", replicate.tensors())
        return named

    def load_learned(self, named: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`learned` gave."""
        first, *others = self.replicates
        first.load_tensors(named)
        for index, replicate in enumerate(others, 1):
            replicate.load_tensors(nests.under(f"replicate.{index}", named))

    def trajectory_tensors(self) -> dict[str, Tensor]:
        """The tensors of ``slots``, by name, on the CPU."""
        named: dict[str, Tensor] = {}
        for number, slot in self.slots.items():
            named |= nests.prefixed(str(number), _tensors_of(slot))
        return {name: tensor.cpu() for name, tensor in named.items()}

    def load_trajectory_tensors(
        self,
        named: Mapping[str, Tensor],
        engine_of: Callable[[int], Episodes | None],
        device: torch.device,
    ) -> None:
        """Take over this process's part of what :meth:`trajectory_tensors` gave.

        Args:
            named: What it gave, in all processes together.
            engine_of: Returns the engine of the episode that a slot is in the middle of, or
                ``None`` where a new one is to begin there.
            device: The device to put the tensors on.
        """
        own = {
            number: (engine_of(number), tensors)
            for number, tensors in nests.by_number(named).items()
            if number % distributed.world() == distributed.rank()
        }
        self.slots = {
            number: _slot_of(tensors, engine, device)
            for number, (engine, tensors) in own.items()
            if engine is not None
        }


def _tensors_of(slot: Slot) -> dict[str, Tensor]:
    """A slot's tensors, by name."""
    where = slot.trajectories
    named = {
        "scale": where.scale,
        "params": where.params,
        "teacher_params": where.teacher_params,
    }
    state = nests.to_named(where.state, named_tuples=True)
    named |= nests.prefixed("state", {name: t.contiguous() for name, t in state.items()})
    for index, state in enumerate(where.teacher_state):
        named |= nests.prefixed(f"teacher_state.{index}", state_tensors(state))
    return named | nests.prefixed("carried", nests.to_named(slot.carried))


def _slot_of(named: Mapping[str, Tensor], engine: Episodes, device: torch.device) -> Slot:
    """The slot that :func:`_tensors_of` took apart."""
    there = {name: tensor.to(device) for name, tensor in named.items()}
    params = there["params"]
    like = engine.steps.initial(engine.by_student(params))
    # Not from `there`: teachers of torch.optim know themselves where each of their tensors is.
    pools = nests.by_number(nests.under("teacher_state", named))
    trajectories = Trajectories(
        there["scale"],
        params,
        nests.from_named(nests.under("state", there), like),
        there["teacher_params"],
        tuple(state_from_tensors(pools[index], device) for index in range(len(pools))),
    )
    return Slot(trajectories, nests.from_named(nests.under("carried", there)))
