"""The paper's two claims, each by eight replicates an arm.

python bench/claims.py run FOLDER [ARM...]    # meta-trains and tests the arms; resumable
python bench/claims.py gather FOLDER FILE.json
python bench/claims.py table FILE.json        # Markdown, from the rows

The first: a student that follows teachers, beside the same student trained by the meta-loss alone,
and by imitation alone. The second: noise on the student's weights makes replicates alike. The arms
differ in nothing else: the student, the task, episodes and meta-steps are those of the recipe
``min-max-perturbed``, and replicate i begins and draws alike in all of them.

Each replicate is meta-validated as the recipe does, more often, and with the weights that this kept
it trains digits-mlp, which it was meta-trained on, and digits-cnn, which it never saw, 500 steps
from each of five seeds. Source: Optimizer Amalgamation (ICLR 2022), sections 3, 4 and 5.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import tomllib
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from amalgam import recipes, tasks
from amalgam.evaluation.paper import meta_stability
from amalgam.evaluation.runs import Readings, train
from amalgam.experiment import Experiment
from amalgam.files import whole
from amalgam.optimizers import optimizer_of
from amalgam.policies import Policy
from amalgam.version import describe

BASE = "min-max-perturbed"
EVERY = 10
TESTED, SEEDS, STEPS = ("digits-mlp", "digits-cnn"), range(5), 500
NONE: dict[str, Any] = {"perturbation": None}
ARMS: dict[str, dict[str, Any]] = {
    "min-max": NONE,
    "meta-loss alone": {**NONE, "training": {"il_mode": "meta"}},
    "imitation alone": {**NONE, "training": {"il_mode": "imitation"}},
    "mean": {**NONE, "amalgamation": {"mechanism": "mean"}},
    "min-max, noise 0.1%": {"perturbation": {"kind": "gaussian_rel", "std": 1e-3}},
    "min-max, noise 1%": {"perturbation": {"kind": "gaussian_rel", "std": 1e-2}},
    "min-max, adversarial": {
        "perturbation": {"kind": "adaptive_pgd", "steps": 1, "magnitude": 1e-3}
    },
}
_WORST = 3.0  # what counts for a run whose loss is larger, or not finite


def recipe_of(arm: str) -> recipes.Recipe:
    content = tomllib.loads((recipes.reading.SHIPPED / f"{BASE}.toml").read_text())
    for key, change in ARMS[arm].items():
        if change is None:
            content.pop(key)
        elif key == "perturbation":
            content[key] = copy.deepcopy(change)
        else:
            content.setdefault(key, {}).update(change)
    content["training"]["validate_every"] = EVERY
    return recipes.from_dict(content, arm)


def tested(student: Policy) -> dict[str, list[float]]:
    """The validation loss at the end of each run, by task; a run a seed."""
    found = {}
    for name in TESTED:
        task = tasks.load(name)
        curves = [
            train(task, lambda params: optimizer_of(params, student), steps=STEPS, seed=seed,
                  readings=Readings())
            for seed in SEEDS
        ]  # fmt: skip
        found[name] = [curve.final for curve in curves]
    return found


def run(folder: Path, arms: list[str]) -> None:
    for arm in arms or ARMS:
        out = folder / arm.replace(" ", "-").replace(",", "").replace("%", "")
        done = out / "row.json"
        if done.is_file():
            continue
        experiment = Experiment(
            recipe_of(arm), out, name=arm, resume=(out / "recipe.json").exists()
        )
        experiment.train(lambda row, arm=arm: print(arm, row["meta_step"], flush=True))
        entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        validation: dict[int, dict[int, float]] = {}
        for entry in entries:
            if "validation" in entry:
                scores = validation.setdefault(entry["meta_step"], {})
                scores[entry["replicate"]] = entry["validation"]
        row = {
            "arm": arm,
            "validation": [[step, list(by.values())] for step, by in validation.items()],
            "kept": [one.provenance["kept_meta_step"] for one in experiment.trainer.students],
            "tested": [tested(student) for student in experiment.trainer.students],
            "seconds": sum(entry["seconds"] for entry in entries if entry["replicate"] == 7),
        }
        with whole(done) as partial:
            partial.write_text(json.dumps(row) + "\n")


def gather(folder: Path, file: Path) -> None:
    machine = {
        **describe(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    rows = [json.loads(path.read_text()) for path in folder.glob("*/row.json")]
    rows.sort(key=lambda row: list(ARMS).index(row["arm"]))
    with whole(file) as partial:
        partial.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def _logs(losses: list[float]) -> list[float]:
    return [math.log(loss) if loss <= _WORST else math.log(_WORST) for loss in losses]


def _means(validation: list[list[Any]]) -> dict[int, float]:
    """The mean over replicates of the scores so far the best, by meta-step."""
    best = [math.inf] * len(validation[0][1])
    found = {}
    for step, scores in validation:
        best = [min(a, math.inf if b is None else b) for a, b in zip(best, scores, strict=True)]
        found[step] = fmean(best)
    return found


def table(file: Path) -> str:
    """Losses are geometric means over replicates and seeds, spreads standard deviations of logs.

    The spread between replicates is that of a random intercept for each, beside which the runs of
    one replicate differ by their seeds; a bootstrap over the replicates gives its 95% interval.
    """
    rows = json.loads(file.read_text())["rows"]
    alone = _means(next(row for row in rows if row["arm"] == "meta-loss alone")["validation"])
    goal = list(alone.values())[-1]
    titles = [f"{task}: loss | spread between replicates" for task in TESTED]
    lines = [
        f"| arm | {' | '.join(titles)} | meta-steps to where the meta-loss alone ends |",
        "|---|" + "---:|" * (2 * len(TESTED) + 1),
    ]
    generator = np.random.default_rng(0)
    for row in rows:
        cells = []
        for task in TESTED:
            logs = [_logs(one[task]) for one in row["tested"]]
            drawn = generator.integers(len(logs), size=(2000, len(logs)))
            spreads = [meta_stability([logs[i] for i in draw])[0] for draw in drawn]
            low, high = np.quantile(spreads, (0.025, 0.975))
            mean = math.exp(fmean(map(fmean, logs)))
            cells += [f"{mean:.4f}", f"{meta_stability(logs)[0]:.3f} [{low:.3f}, {high:.3f}]"]
        means = _means(row["validation"])
        reached = next((str(step) for step, mean in means.items() if mean <= goal), "never")
        lines.append(f"| {row['arm']} | {' | '.join(cells)} | {reached} of {max(means)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "gather", "table"):
        command = commands.add_parser(name)
        command.add_argument("file" if name == "table" else "folder", type=Path)
        if name == "run":
            command.add_argument("arms", nargs="*", metavar="ARM", choices=[[], *ARMS])
        if name == "gather":
            command.add_argument("file", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.folder, arguments.arms)
    elif arguments.command == "gather":
        gather(arguments.folder, arguments.file)
    else:
        print(table(arguments.file))


if __name__ == "__main__":
    main()
