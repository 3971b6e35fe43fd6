"""Draws the committed rows: time per coordinate over N, an operation and machine a picture.

python bench/plot.py [--rows bench/results] [--out bench/results]
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
STYLES = {1: "-", 2: "--"}
MARKERS = {1: "o", 2: "s"}


def machine_of(info: dict[str, Any], device: str) -> str:
    if device == "cuda":
        return str(info.get("gpu", "unknown GPU"))
    name = str(info["cpu"].get("brand_raw") or info["machine"])
    return f"{name}, huge pages" if info["huge_pages"] else name


def read(folder: Path) -> dict[tuple[str, str], dict[tuple[str, int], dict[int, float]]]:
    """(operation, machine) -> (backend, threads) -> N -> nanoseconds per coordinate."""
    pictures: dict[Any, dict[Any, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted(folder.glob("*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows["benchmarks"]:
            facts = row["extra_info"]
            machine = machine_of(rows["machine_info"], facts["device"])
            picture = facts["operation"], machine
            line = facts["backend"], facts["threads"]
            pictures[picture][line][facts["n"]] = 1e9 * row["stats"]["median"] / facts["n"]
    return pictures


def draw(
    operation: str, machine: str, lines: dict[tuple[str, int], dict[int, float]], path: Path
) -> None:
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    backends = sorted({backend for backend, _ in lines})
    for (backend, threads), points in sorted(lines.items()):
        sizes = sorted(points)
        ax.plot(
            sizes,
            [points[n] for n in sizes],
            STYLES.get(threads, ":"),
            marker=MARKERS.get(threads, "^"),
            color=f"C{backends.index(backend)}",
            label=f"{backend}, {threads} thread{'s' if threads > 1 else ''}",
        )
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="coordinates",
        ylabel="ns per coordinate",
        title=f"{operation}\n{machine}",
    )
    ax.grid(alpha=0.25, which="both")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=RESULTS, help="folder of JSON files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the PNGs go")
    options = parser.parse_args()
    pictures = read(options.rows)
    if not pictures:
        raise SystemExit(f"no benchmark rows in {options.rows}/*.json")
    options.out.mkdir(parents=True, exist_ok=True)
    for (operation, machine), lines in pictures.items():
        stem = re.sub(r"[^a-z0-9]+", "-", f"{operation} on {machine}".lower()).strip("-")
        path = options.out / f"{stem}.png"
        draw(operation, machine, lines, path)
        print(path)


if __name__ == "__main__":
    main()
