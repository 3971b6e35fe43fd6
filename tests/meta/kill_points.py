"""Kills runs of recipes at every file operation, and holds what is resumed to the whole run's bits.

``python kill_points.py FOLDER RECIPE FIRST STRIDE`` kills before the operations FIRST, FIRST +
STRIDE, and so on, of a run in FOLDER, and resumes each. Every other time the power fails, too: what
was written after a file's last fsync is cut at any length. What is killed and resumed are forks of
this process, which has imported everything; it has one thread.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runs import linear_task

from amalgam import experiment, recipes
from amalgam.evaluation import plots
from amalgam.tasks import Task

DIED = 77
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "fcntl.flock")

ONE_WINDOW = {"unroll": 2, "windows": 1, "episodes": 1, "warmup_windows": 0, "warmup_lr": 0.0}
SMALL = {"layers": 1, "hidden": 2, "warmup_steps": 1}
COMMON: dict[str, Any] = {
    "task": {"name": "kill_points.make_task", "batch_size": 8},
    "policy": {"kind": "student", **SMALL},
    "training": {
        **{"checkpoint_every": 2, "validate_every": 2, "validation_steps": 1},
        "validation_seeds": 1,
    },
    "amalgamation": {"backend": "reference"},
    "evaluation": {"tasks": ["kill_points.make_task"], "steps": 1, "seeds": 1, "every": 1},
    **{"threads": 1, "device": "cpu"},
}
TEACHERS = [{"kind": "adam"}, {"kind": "sgd"}]
RECIPES: dict[str, dict[str, Any]] = {
    "stages": {
        **COMMON,
        "teachers": TEACHERS,
        "strategy": {"kind": "stages", "unroll": 2, "stages": [{"episodes": 2, "windows": 2}]},
    },
    "replicates": {
        **COMMON,
        "teachers": TEACHERS,
        "replicates": 2,
        "strategy": {
            **{"kind": "meta-batch", "meta_steps": 3, "slots": 2, "unroll": 1},
            **{"shortest": 1, "longest": 3},
        },
    },
    "choice-then-periods": {
        **COMMON,
        "choice": {
            "policy": {"teachers": "small", **SMALL},
            "strategy": {
                **{"kind": "choice", "num_periods": 1, "unroll": 2, "windows": 1, "episodes": 2},
                "validation": ONE_WINDOW,
            },
        },
        "strategy": {
            **{"kind": "simple", "num_periods": 2, "unroll": 2, "windows": 1, "episodes": 1},
            "validation": ONE_WINDOW,
        },
    },
}


def make_task(batch_size: int) -> Task:
    """A linear optimizee on a few random points."""
    made = linear_task(2)
    return Task("linear", made.build, made.train, made.validation, batch_size=batch_size)


def blank(metrics: Any, path: Any) -> None:
    """In the place of a plot, which takes longer than all else."""
    with experiment.files.whole(path) as beside:
        beside.write_text("plot")


def run(recipe: str, folder: Path) -> None:
    """Run, or resume, to the end."""
    plots.training = plots.curves = blank  # type: ignore[assignment]
    experiment.RATES = experiment.RATES[:1]
    warnings.simplefilter("error")
    made = experiment.Experiment(recipes.from_dict(RECIPES[recipe]), folder, resume=True)
    made.train()
    made.evaluate()


def heeding_operations(folder: Path, at: Callable[[int], None]) -> None:
    """Call ``at`` before every file operation in the folder, with its number."""
    count = 0

    def before(path: object) -> None:
        nonlocal count
        if Path(os.fsdecode(path)).is_relative_to(folder):  # type: ignore[arg-type]
            count += 1
            at(count)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS:
            named = arguments[0]
            if isinstance(named, int):
                named = f"/proc/self/fd/{named}"
                named = os.readlink(named) if os.path.islink(named) else named  # noqa: PTH114, PTH115
            if isinstance(named, str | bytes | os.PathLike):
                before(named)
            # Another file may get the inode of one that is removed or replaced.
            gone = {"os.remove": arguments[:1], "os.rename": arguments[1:2]}.get(event, ())
            for path in map(Path, gone):
                if path.exists():
                    safe.pop(path.stat().st_ino, None)

    def synced(descriptor: int) -> None:
        before(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115
        found = os.fstat(descriptor)
        safe[found.st_ino] = found.st_size

    os.fsync = synced
    sys.addaudithook(hook)


safe: dict[int, int] = {}  # how many bytes of a file the disk has, by its inode


def power_fails(folder: Path, seed: int) -> None:
    """Cut every file at any length after its last fsync."""
    chance = random.Random(seed)
    for path in folder.rglob("*"):
        if path.is_file():
            found = path.stat()
            least = min(safe.get(found.st_ino, 0), found.st_size)
            os.truncate(path, chance.randint(least, found.st_size))


def forked(do: Callable[[], None]) -> int:
    """The exit status of a fork that does this."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            do()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def results(folder: Path) -> dict[str, Any]:
    """What a run leaves, by file: bytes, and of metrics all but the time that they took."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{**row, "seconds": 0} for row in rows]
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def main(folder: Path, recipe: str, first: int, stride: int) -> None:
    folder = folder.resolve()
    whole = folder / "whole"
    total = folder / "total"

    def counted() -> None:
        last = [0]
        heeding_operations(whole, lambda number: last.__setitem__(0, number))
        run(recipe, whole)
        total.write_text(str(last[0]))

    run(recipe, folder / "imports")
    os.fsync = lambda descriptor: None  # Of the disk that fails, `safe` keeps what it has.
    if forked(counted):
        sys.exit(f"{recipe} does not run")
    wanted, operations = results(whole), int(total.read_text())
    points = range(first, operations + 1, stride)
    for point in points:
        cut = folder / f"cut-{point}"

        def killed(point: int = point, cut: Path = cut) -> None:
            def die(number: int) -> None:
                if number == point:
                    if point // stride % 2:
                        power_fails(cut, point)
                    os._exit(DIED)

            heeding_operations(cut, die)
            run(recipe, cut)

        if forked(killed) != DIED:
            sys.exit(f"{recipe} was not killed before operation {point} of {operations}")
        if forked(lambda cut=cut: run(recipe, cut)):  # type: ignore[misc]
            sys.exit(f"{recipe} does not go on from operation {point} of {operations}")
        found = results(cut)
        if found.keys() != wanted.keys():
            sys.exit(f"{recipe}, operation {point}: files {found.keys() ^ wanted.keys()}")
        for name, content in wanted.items():
            if found[name] != content:
                sys.exit(f"{recipe}, operation {point} of {operations}: another {name}")
    print(f"{recipe}: killed at {len(points)} of {operations} operations", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.modules["kill_points"] = sys.modules["__main__"]
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
