"""Draws docs/house.svg, the package's rooms floor by floor: ``python docs/house.py``.

A room imports, when it is imported itself, only from floors below its own.
"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from amalgam.files import whole

FLOORS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("cli", "the commands"),),
    (("experiment", "runs a recipe"),),
    (("recipes", "reads TOML files"), ("tensorboard", "shows runs and steps")),
    (("meta", "meta-trains students"),),
    (("evaluation", "compares optimizers"),),
    (("optimizers", "step models by policies"), ("convert", "the authors' students")),
    (
        ("policies", "turn gradients into updates"),
        ("tasks", "optimizees, data, families"),
    ),
    (("ops", "the operations, for users"), ("backends", "how each is computed")),
    (("kernels", "Triton"), ("csrc", "C++ and CUDA: amalgam._core")),
    (("operations", "schema, checks, reference, autograd of each; the registry"),),
    (
        (
            "ground",
            "files · weight_files · hub · layout · nests · seeding · ranges · digest · device · …",
        ),
    ),
)
"""From the top floor to the ground: rooms, each with what it does. ``csrc`` is compiled."""

GROUND = frozenset(
    {
        *("device", "digest", "distributed", "dotted", "extras", "files", "heap", "hints", "hub"),
        *("layout", "lr_decays", "nests", "ranges", "seeding", "version", "weight_files"),
    }
)
"""The modules of the ground floor."""

_COLOURS = ("#e8eefb", "#e4f3ef", "#fbf0dd", "#f3e9f7")


def draw() -> str:
    """The picture as SVG, the same in every run."""
    figure = Figure(figsize=(9, 7.2), facecolor="white")
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 90), ylim=(0, 7.2 * len(FLOORS) + 0.6))
    ax.axis("off")
    for floor, rooms in enumerate(FLOORS):
        bottom = 7.2 * (len(FLOORS) - 1 - floor) + 0.9
        width = 88 / len(rooms)
        for place, (name, what) in enumerate(rooms):
            left = 1 + place * width
            ax.add_patch(
                FancyBboxPatch(
                    (left + 0.6, bottom),
                    width - 1.2,
                    5.7,
                    boxstyle="round,pad=0,rounding_size=0.8",
                    facecolor=_COLOURS[floor * len(_COLOURS) // len(FLOORS)],
                    edgecolor="#5d6670",
                    lw=0.8,
                )
            )
            middle = left + width / 2
            ax.text(middle, bottom + 3.7, name, ha="center", va="center", weight="bold", size=11)
            ax.text(middle, bottom + 1.6, what, ha="center", va="center", size=9, color="#3a4047")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "house"}):
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


if __name__ == "__main__":
    with whole(Path(__file__).with_suffix(".svg")) as beside:
        beside.write_text(draw(), encoding="utf-8")
