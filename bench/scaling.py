"""What longer meta-training, more units and other seeds make of the recipe ``standard``.

python bench/scaling.py run FOLDER [ARM...]      # meta-trains the arms; resumable
python bench/scaling.py test FOLDER              # by the short protocol; resumable
python bench/scaling.py gather FOLDER FILE.json  # times the students' steps, too
python bench/scaling.py table FILE.json          # Markdown, from the rows

An arm changes one thing of the recipe. Of another number of meta-steps the schedule of the
meta-learning rate is as much shorter or longer. Each keeps the weights that do best in
meta-validation, as the recipe has it. The first is a student before any meta-training.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from amalgam import AmalgamatedOptimizer, recipes, tasks
from amalgam.evaluation import Evaluation, Runner, evaluate, report
from amalgam.evaluation.cache import RunCache, default_folder
from amalgam.evaluation.contenders import student_contender
from amalgam.evaluation.protocol import short_protocol
from amalgam.evaluation.runner import NamedTask
from amalgam.experiment import Experiment
from amalgam.files import whole
from amalgam.policies import NominalStudent, load_policy
from amalgam.seeding import generator_for
from amalgam.version import describe

BASE, WHOLE = "standard", "as it is"
UNTRAINED = "meta_steps=0"
META_STEPS, HIDDEN, SEEDS = (15, 30, 120, 240), (2, 4, 16, 20), (1, 2, 3)
ARMS: dict[str, tuple[str, int]] = {
    UNTRAINED: ("meta_steps", 0),
    **{f"meta_steps={count}": ("meta_steps", count) for count in META_STEPS},
    WHOLE: ("seed", 0),
    **{f"seed={seed}": ("seed", seed) for seed in SEEDS},
    **{f"hidden={units}": ("hidden", units) for units in HIDDEN},
}
TESTED_SEEDS = 3
COORDINATES, ROUNDS = 2**20, 20


def recipe_of(arm: str) -> recipes.Recipe:
    content = tomllib.loads((recipes.reading.SHIPPED / f"{BASE}.toml").read_text())
    what, value = ARMS[arm]
    if what == "hidden":
        content["policy"]["hidden"] = value
    elif what == "meta_steps" and value:
        strategy, training = content["strategy"], content["training"]
        ratio = training["meta_schedule_steps"] / strategy["meta_steps"]
        strategy["meta_steps"] = value
        training["meta_schedule_steps"] = round(ratio * value)
    return recipes.from_dict(content, arm)


def told(arm: str, row: dict[str, Any]) -> None:
    print(arm, row["meta_step"], flush=True)


def run(folder: Path, arms: list[str]) -> None:
    for arm in arms or ARMS:
        out = folder / arm
        if arm == UNTRAINED or (out / "student.safetensors").exists():
            continue
        seed = ARMS[arm][1] if ARMS[arm][0] == "seed" else 0
        resume = (out / "recipe.json").exists()
        experiment = Experiment(recipe_of(arm), out, name=BASE, seed=seed, resume=resume)
        experiment.train(partial(told, arm))


def student_of(folder: Path, arm: str) -> NominalStudent:
    if arm == UNTRAINED:
        settings = recipe_of(arm).policy.settings
        return NominalStudent(settings, generator=generator_for(0, "student"))
    student = load_policy(folder / arm / "student.safetensors")
    assert isinstance(student, NominalStudent)
    return student


def done(folder: Path) -> list[str]:
    """The arms that are trained."""
    return [a for a in ARMS if a == UNTRAINED or (folder / a / "student.safetensors").exists()]


def test(folder: Path, cache: Path) -> None:
    protocol = replace(short_protocol(), seeds=TESTED_SEEDS)
    contenders = [student_contender(arm, student_of(folder, arm)) for arm in done(folder)]
    with Runner([NamedTask(t) for t in tasks.GROUPS["short"]], cache=RunCache(cache)) as runner:
        found = evaluate(runner, contenders, protocol)
    report.record(found, folder / "tested", {"arms": done(folder)})


def costs(students: list[NominalStudent]) -> list[dict[str, float]]:
    """Of a coordinate, each student's step in place in one thread, and bytes of state.

    Times are the least of rounds in which all take turns.
    """
    torch.set_num_threads(1)
    optimizers = []
    for student in students:
        param = nn.Parameter(torch.randn(COORDINATES))  # a vector: products of matrices cost extra
        param.grad = torch.randn(COORDINATES)
        optimizers.append(AmalgamatedOptimizer([param], student=student))
    least = [math.inf] * len(optimizers)
    for _ in range(ROUNDS):
        for index, optimizer in enumerate(optimizers):
            begin = time.perf_counter()
            optimizer.step()
            least[index] = min(least[index], time.perf_counter() - begin)
    found = []
    for optimizer, seconds in zip(optimizers, least, strict=True):
        (state,) = optimizer.state.values()
        kept = sum(t.nbytes for t in state.values() if isinstance(t, torch.Tensor))
        found.append(
            {
                "ns_per_coordinate": round(1e9 * seconds / COORDINATES, 3),
                "state_bytes_per_coordinate": round(kept / COORDINATES, 1),
            }
        )
    return found


def losses_of(found: Evaluation) -> dict[str, dict[str, list[float]]]:
    """Every contender's final losses by task, one a seed."""
    losses: dict[str, dict[str, list[float]]] = {}
    for results in found.at(found.horizon):
        for result in results:
            losses.setdefault(result.name, {})[result.task] = result.values("final")
    return losses


def gather(folder: Path, file: Path) -> None:
    found = report.read(folder / "tested")
    losses = losses_of(found)
    arms = [arm for arm in ARMS if arm in losses]
    students = [student_of(folder, arm) for arm in arms]
    rows = []
    for arm, student, cost in zip(arms, students, costs(students), strict=True):
        row: dict[str, Any] = {
            "arm": arm,
            "units": student.config.hidden,
            "weights": sum(w.numel() for w in student.weights()),
            **cost,
        }
        if arm != UNTRAINED:
            lines = (folder / arm / "metrics.jsonl").read_text().splitlines()
            entries = [json.loads(line) for line in lines]
            row |= {
                "meta_steps": entries[-1]["meta_step"],
                "kept_meta_step": student.provenance["kept_meta_step"],
                "validation": {
                    e["meta_step"]: e["validation"] for e in entries if "validation" in e
                },
                "seconds": round(sum(entry["seconds"] for entry in entries), 1),
                "commit": student.provenance["commit"],
            }
        rows.append(row)
    machine = {**describe(), "torch": torch.__version__, "threads": 1}
    machine["machine"] = platform.processor() or platform.machine()
    content = {
        "machine": machine,
        "protocol": found.protocol.about(),
        "rows": rows,
        "losses": losses,
    }
    with whole(file) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n")


def _ratio(ours: dict[str, list[float]], others: dict[str, list[float]]) -> float:
    """The geometric mean of losses over others' of the same task and seed."""
    logs = [math.log(a / b) for name in ours for a, b in zip(ours[name], others[name], strict=True)]
    return math.exp(fmean(logs))


def table(file: Path) -> str:
    """Geometric means over tasks and seeds of losses at constant rates over Adam's at its best one.

    And of losses at falling rates over the best baseline's at such rates.
    """
    content = json.loads(file.read_text())
    losses = content["losses"]
    arms = {row["arm"] for row in content["rows"]}
    falling = {
        name: of
        for name, of in losses.items()
        if name.endswith(", linear") and name.removesuffix(", linear") not in arms
    }
    best = {name: min((of[name] for of in falling.values()), key=fmean) for name in losses["Adam"]}
    titles = (
        "units, weights",
        "bytes of state, ns a parameter",
        "meta-steps, minutes",
        "meta-validation",
        "constant",
        "linear",
    )
    lines = [f"| arm | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    for row in content["rows"]:
        arm, scores = row["arm"], row.get("validation")
        cells = [
            f"{row['units']}, {row['weights']:,}",
            f"{row['state_bytes_per_coordinate']:g}, {row['ns_per_coordinate']:.1f}",
            f"{row['meta_steps']}, {row['seconds'] / 60:.0f}" if scores else "0",
            f"{scores[str(row['kept_meta_step'])]:.3f}" if scores else "",
            f"{_ratio(losses[arm], losses['Adam']):.3f}",
            f"{_ratio(losses[f'{arm}, linear'], best):.3f}",
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "test", "gather", "table"):
        command = commands.add_parser(name)
        command.add_argument("file" if name == "table" else "folder", type=Path)
        if name == "run":
            command.add_argument("arms", nargs="*", metavar="ARM", choices=[[], *ARMS])
        if name == "test":
            command.add_argument("--cache", type=Path, default=default_folder())
        if name == "gather":
            command.add_argument("file", type=Path)
    asked = parser.parse_args()
    if asked.command == "run":
        run(asked.folder, asked.arms)
    elif asked.command == "test":
        test(asked.folder, asked.cache)
    elif asked.command == "gather":
        gather(asked.folder, asked.file)
    else:
        print(table(asked.file))


if __name__ == "__main__":
    main()
