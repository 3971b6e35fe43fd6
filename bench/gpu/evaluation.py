"""Seconds of an evaluation's runs on a GPU: one by one, and side by side as rows of one.

The digits MLP and CNN, by Adam at eight rates from two seeds each, as tuning has them, and by
"standard" from sixteen seeds.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

from gpu.place import Case, Place, Row, start

from amalgam import load_policy
from amalgam.evaluation import Readings, train
from amalgam.evaluation.contenders import baseline, student_contender
from amalgam.evaluation.rows import Row as Run
from amalgam.evaluation.rows import train_rows
from amalgam.tasks import load

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
READINGS = Readings(curve_samples=100)


def runs_of(name: str) -> list[Run]:
    if name == "Adam":
        contenders = [baseline(name, (("lr", rate),), "constant") for rate in RATES]
    else:
        contenders = [student_contender(name, load_policy(name))]
    seeds = 16 // len(contenders)
    return [Run(one.make, seed) for one in contenders for seed in range(seeds)]


def evaluation_case(place: Place, task: str, name: str) -> Row:
    made, runs = load(task).to(place.device), runs_of(name)
    steps = 50 if place.real else 2
    runs = runs if place.real else runs[:2]

    def alone(runs: list[Run]) -> list[float]:
        return [
            train(made, run.make, steps=steps, seed=run.seed, readings=READINGS).final
            for run in runs
        ]

    def together(runs: list[Run]) -> list[float]:
        curves = train_rows(made, runs, steps=steps, readings=READINGS)
        return [curve.final for curve in curves]

    seconds, losses = {}, {}
    for way, call in (("one by one", alone), ("side by side", together)):
        call(runs[:1])  # loads what is loaded once
        place.wait()
        begin = time.perf_counter()
        losses[way] = call(runs)
        place.wait()
        seconds[way] = round(time.perf_counter() - begin, 4)
    pairs = zip(*losses.values(), strict=True)
    return {
        "operation": "runs of an evaluation",
        "task": task,
        "optimizer": name,
        "runs": len(runs),
        "steps": steps,
        "seconds": seconds,
        "largest_difference": max(abs(a - b) for a, b in pairs),
    }


def cases(place: Place) -> Iterator[tuple[str, Case]]:
    for task in ("digits-mlp", "digits-cnn"):
        for name in ("Adam", "standard"):
            yield f"{task} {name}", functools.partial(evaluation_case, place, task, name)


def main() -> None:
    place = start("evaluation")
    place.run_cases(cases(place))


if __name__ == "__main__":
    main()
