"""Run by torchrun: runs of several kinds, and one that is cut short and resumed."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

import torch
from runs import Killed, LinearFamily, killer, linear_task, trainer

from amalgam import distributed
from amalgam.meta import (
    Amalgamation,
    Curriculum,
    MetaBatch,
    OnPolicy,
    Stage,
    Stages,
    Training,
)
from amalgam.meta.perturbation import AdaptivePGD, Gaussian


def plain(folder: Path, optimizees: int) -> None:
    training = Training(
        optimizees=optimizees, input_noise=0.05, validate_every=2, validation_steps=3, average=0.8
    )
    trainer(
        folder,
        training=training,
        strategy=Stages((Stage(2, 2, 0.1),), 3),
        perturbation=Gaussian(0.01),
        amalgamation=Amalgamation(held_out=0.3, scale_spread=1.0, backend="reference"),
    ).run()


def adversarial(folder: Path, optimizees: int) -> None:
    training = Training(optimizees=optimizees, validate_every=0)
    strategy = Stages((Stage(2, 2, 0.1),), 3)
    trainer(folder, training=training, strategy=strategy, perturbation=AdaptivePGD(2, 0.05)).run()


def curriculum(folder: Path, optimizees: int, cut: int | None = None) -> None:
    strategy = Curriculum(
        num_stages=2, num_periods=1, num_chances=1, unroll=3, windows=(1, 2), episodes=1,
        imitation_weight=0.1,
    )  # fmt: skip
    training = Training(optimizees=optimizees, checkpoint_every=2)

    def make():
        return trainer(folder, training=training, strategy=strategy)

    if cut is not None:
        with contextlib.suppress(Killed):
            make().run(report=killer(cut))
    make().run(resume=True)


def meta_batch(folder: Path, cut: int | None = None) -> None:
    """Three slots, of which two processes have two and one; the noise is each slot's own."""
    training = Training(
        optimizees=2, input_noise=0.05, validate_every=2, validation_steps=3, checkpoint_every=1,
        average=0.8,
    )  # fmt: skip
    amalgamation = Amalgamation(
        held_out=0.3, objective="final", scale_spread=1.0, backend="reference"
    )
    strategy = MetaBatch(5, slots=3, unroll=2, shortest=2, longest=6, imitation_weight=0.1)
    tasks = [linear_task(3 + index, f"task-{index}") for index in range(4)]

    def make():
        return trainer(
            folder, tasks=tasks, training=training, strategy=strategy, perturbation=Gaussian(0.01),
            amalgamation=amalgamation,
        )  # fmt: skip

    if cut is not None:
        with contextlib.suppress(Killed):
            make().run(report=killer(cut))
    make().run(resume=True)


def fewer_slots_than_processes(folder: Path) -> None:
    """The second process has no slot; the adversary's climbs are the first's alone."""
    strategy = MetaBatch(3, slots=1, unroll=2, shortest=2, longest=4, imitation_weight=0.1)
    training = Training(validate_every=0)
    trainer(folder, training=training, strategy=strategy, perturbation=AdaptivePGD(1, 0.05)).run()


ON_POLICY = Amalgamation(scale_spread=1.0, backend="reference", on_policy=OnPolicy(anneal_steps=3))


def families(folder: Path, optimizees: int) -> None:
    """All processes run the same episode, so of the same task; teachers act on-policy."""
    training = Training(optimizees=optimizees, validate_every=2, validation_steps=3)
    strategy = Stages((Stage(3, 1, 0.1), Stage(1, 2, 0.1)), 3)
    trainer(
        folder, tasks=LinearFamily(), training=training, strategy=strategy, amalgamation=ON_POLICY
    ).run()


def family_slots(folder: Path, cut: int | None = None) -> None:
    """A family and a task; slots draw tasks, and teachers to execute, of their own."""
    training = Training(validate_every=2, validation_steps=3, checkpoint_every=1)
    strategy = MetaBatch(5, slots=3, unroll=2, shortest=2, longest=6, imitation_weight=0.1)
    tasks = [LinearFamily(), linear_task()]

    def make():
        return trainer(
            folder, tasks=tasks, training=training, strategy=strategy, amalgamation=ON_POLICY
        )

    if cut is not None:
        with contextlib.suppress(Killed):
            make().run(report=killer(cut))
    make().run(resume=True)


def late(path: Path) -> None:
    """The second process comes late to a sum; the first writes how long each waited."""
    distributed.waited()
    time.sleep(0.3 * distributed.rank())
    distributed.total([torch.ones(2)])
    waited = distributed.waited()
    if distributed.rank() == 0:
        path.write_text(json.dumps(waited))


if __name__ == "__main__":
    distributed.join()
    out = Path(sys.argv[1])
    late(out / "late.json")
    plain(out / "plain", 1)
    adversarial(out / "adversarial", 1)
    curriculum(out / "curriculum", 1)
    curriculum(out / "cut", 1, cut=3)
    meta_batch(out / "meta_batch")
    meta_batch(out / "meta_batch_cut", cut=3)
    fewer_slots_than_processes(out / "fewer_slots_than_processes")
    families(out / "families", 1)
    family_slots(out / "family_slots")
    family_slots(out / "family_slots_cut", cut=3)
    distributed.leave()
