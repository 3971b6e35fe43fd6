"""Draw meta-validation of several runs over meta-steps and over time.

python bench/plot_estimators.py out.png label=RUN_FOLDER ...
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    out, *runs = sys.argv[1:]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for run in runs:
        label, _, folder = run.partition("=")
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        spent = list(itertools.accumulate(row["seconds"] for row in rows))
        read = [(i, row["validation"]) for i, row in enumerate(rows) if "validation" in row]
        scores = [score for _, score in read]
        axes[0].plot([i + 1 for i, _ in read], scores, marker=".", label=label)
        axes[1].plot([spent[i] for i, _ in read], scores, marker=".", label=label)
    axes[0].set_xlabel("meta-steps")
    axes[1].set_xlabel("seconds of meta-training")
    axes[0].set_ylabel("mean log validation loss")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    main()
