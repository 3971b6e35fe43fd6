"""The state of a run: progress, weights and meta-optimizers, and the trajectories' tensors.

It is all that a checkpoint has to hold. Everything random derives from the seed and from the
numbers here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from amalgam import nests
from amalgam.meta.episode import Episodes, Trajectories
from amalgam.meta.periods import INITIAL, Record
from amalgam.meta.replicate import Replicate
from amalgam.policies import state_from_tensors, state_tensors


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
    """

    meta_step: int = 0
    done: int = 0
    episodes: int = 0
    checkpoint: str = INITIAL
    meta_losses: list[float] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)

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
        fields["meta_losses"] = [float(loss) for loss in stored["meta_losses"]]
        return cls(**fields)


class RunState:
    """All that changes in the course of a run.

    Args:
        replicates: The students, with their meta-optimizers.

    Attributes:
        replicates: The students, with their meta-optimizers.
        progress: How far the run is.
        trajectories: Parameters and states of this process's students and teachers after the last
            window; ``None`` before the first episode.
        carried: What the estimator carries from window to window of the episode.
    """

    def __init__(self, replicates: Sequence[Replicate]) -> None:
        self.replicates = tuple(replicates)
        self.progress = Progress()
        self.trajectories: Trajectories | None = None
        self.carried: list[Tensor] = []

    def learned(self) -> dict[str, Tensor]:
        """Weights, best weights and meta-optimizers of all replicates, by name."""
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
        """The tensors of ``trajectories`` and ``carried``, by name, on the CPU."""
        assert self.trajectories is not None
        where = self.trajectories
        named = {
            "scale": where.scale,
            "params": where.params,
            "teacher_params": where.teacher_params,
        }
        states = nests.to_named(where.states, named_tuples=True)
        named |= nests.prefixed("states", {name: t.contiguous() for name, t in states.items()})
        for index, state in enumerate(where.teacher_state):
            named |= nests.prefixed(f"teacher_state.{index}", state_tensors(state))
        named |= nests.prefixed("carried", nests.to_named(self.carried))
        return {name: tensor.cpu() for name, tensor in named.items()}

    def load_trajectory_tensors(
        self, named: Mapping[str, Tensor], unrolls: Sequence[Episodes], device: torch.device
    ) -> None:
        """Take over what :meth:`trajectory_tensors` gave.

        Args:
            named: What it gave.
            unrolls: The run's engines, one per task.
            device: The device to put the tensors on.
        """
        there = {name: tensor.to(device) for name, tensor in named.items()}
        params = there["params"]
        # States depend on a task by its size alone, so any task of that size will do.
        unroll = next(one for one in unrolls if one.task.layout.numel == params.shape[1])
        like = tuple(unroll.steps.initial(ours) for ours in unroll.by_student(params))
        # Not from `there`: teachers of torch.optim know themselves where each of their tensors is.
        pools = nests.by_number(nests.under("teacher_state", named))
        self.trajectories = Trajectories(
            there["scale"],
            params,
            nests.from_named(nests.under("states", there), like),
            there["teacher_params"],
            tuple(state_from_tensors(pools[index], device) for index in range(len(pools))),
        )
        self.carried = nests.from_named(nests.under("carried", there))
