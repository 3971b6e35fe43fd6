"""Draws the committed rows: time per coordinate over N, a picture a machine.

python bench/plot.py [--rows bench/results] [--out bench/results]
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
STYLES = {1: "--", 2: "-"}
COLUMNS = 3

Lines = dict[tuple[str, int], dict[int, float]]  # (backend, threads) -> N -> ns per coordinate


def machine_of(info: dict[str, Any]) -> str:
    cpu = info["cpu"]
    name = f"{cpu.get('brand_raw') or info['machine']}, {cpu['count']} cores"
    return f"{name}, huge pages" if info["huge_pages"] else name


def read(folder: Path) -> dict[str, dict[str, Lines]]:
    """Lines by machine and operation, of operations that were timed at several N."""
    machines: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for path in sorted(folder.glob("*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows["benchmarks"]:
            facts = row["extra_info"]
            machine = machine_of(rows["machine_info"])
            line = machines[machine][facts["operation"]][facts["backend"], facts["threads"]]
            line[facts["n"]] = 1e9 * row["stats"]["median"] / facts["n"]
    return {
        machine: {
            operation: lines
            for operation, lines in operations.items()
            if any(len(points) > 1 for points in lines.values())
        }
        for machine, operations in machines.items()
    }


def draw(ax: Axes, operation: str, lines: Lines, colors: dict[str, str]) -> None:
    for (backend, threads), points in sorted(lines.items()):
        sizes = sorted(points)
        ax.plot(
            sizes,
            [points[n] for n in sizes],
            STYLES.get(threads, ":"),
            marker=".",
            color=colors[backend],
            label=f"{backend}, {threads} thread{'s' if threads > 1 else ''}",
        )
    ax.set(xscale="log", yscale="log", title=operation)
    ax.set(xlabel="coordinates", ylabel="ns per coordinate")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def picture(machine: str, operations: dict[str, Lines], path: Path) -> None:
    height = -(-len(operations) // COLUMNS)
    width = min(COLUMNS, len(operations))
    figure = Figure(figsize=(4.6 * width, 3.7 * height + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(machine)
    backends = sorted({backend for lines in operations.values() for backend, _ in lines})
    colors = {backend: f"C{index}" for index, backend in enumerate(backends)}
    axes = figure.subplots(height, width, squeeze=False).flatten()
    for ax, (operation, lines) in zip(axes, sorted(operations.items()), strict=False):
        draw(ax, operation, lines, colors)
    for ax in axes[len(operations) :]:
        ax.remove()
    handles = {
        label: handle
        for ax in axes[: len(operations)]
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    labels = sorted(handles)
    figure.legend(
        [handles[label] for label in labels], labels, loc="outside lower center", ncols=4,
        frameon=False,
    )  # fmt: skip
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=RESULTS, help="folder of JSON files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the PNGs go")
    options = parser.parse_args()
    machines = read(options.rows)
    if not machines:
        raise SystemExit(f"no benchmark rows in {options.rows}/*.json")
    options.out.mkdir(parents=True, exist_ok=True)
    for machine, operations in machines.items():
        if not operations:
            continue
        path = options.out / f"{re.sub(r'[^a-z0-9]+', '-', machine.lower()).strip('-')}.png"
        picture(machine, operations, path)
        print(path)


if __name__ == "__main__":
    main()
