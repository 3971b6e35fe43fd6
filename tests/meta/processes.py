"""Run by torchrun: runs of several kinds, and one that is cut short and resumed."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from runs import Killed, killer, trainer

from amalgam.meta import Curriculum, Stage, Stages, Training, distributed
from amalgam.meta.perturbation import AdaptivePGD, Gaussian


def plain(folder: Path, optimizees: int) -> None:
    training = Training(
        optimizees=optimizees, input_noise=0.05, validate_every=2, validation_steps=3
    )
    strategy = Stages((Stage(2, 2, 0.1),), 3)
    trainer(folder, training=training, strategy=strategy, perturbation=Gaussian(0.01)).run()


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


if __name__ == "__main__":
    distributed.join()
    out = Path(sys.argv[1])
    plain(out / "plain", 1)
    adversarial(out / "adversarial", 1)
    curriculum(out / "curriculum", 1)
    curriculum(out / "cut", 1, cut=3)
    distributed.leave()
