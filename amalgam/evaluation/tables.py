"""Results as tables: for a terminal, and as Markdown to paste."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from amalgam.evaluation.protocol import Result

HEADINGS = ("optimizer", "final loss", "best loss", "accuracy", "training loss")


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """One row for each contender, under :data:`HEADINGS`; losses are mean ± deviation over seeds.

    Final loss, best loss and accuracy are on validation data.
    """
    return [
        (
            r.name,
            _spread(*r.summary("final")),
            _spread(*r.summary("best")),
            f"{r.accuracy:.1%}",
            _spread(*r.summary("training")),
        )
        for r in results
    ]


def terminal(title: str, results: Sequence[Result]) -> Table:
    """A table for a terminal, the smallest final loss in bold."""
    table = Table(title=title, title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
    for result, row in zip(results, rows(results), strict=True):
        table.add_row(*row, style="bold" if result is _leader(results) else None)
    return table


def markdown(title: str, results: Sequence[Result]) -> str:
    """A Markdown table under its title, the smallest final loss in bold."""
    lines = [
        f"**{title}**",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---|" + "---:|" * (len(HEADINGS) - 1),
    ]
    for result, row in zip(results, rows(results), strict=True):
        mark = "**" if result is _leader(results) else ""
        lines.append("| " + " | ".join(f"{mark}{cell}{mark}" for cell in row) + " |")
    return "\n".join(lines) + "\n"


def _leader(results: Sequence[Result]) -> Result:
    def key(result: Result) -> tuple[bool, float]:
        mean, _ = result.summary("final")
        return mean != mean, mean

    return min(results, key=key)


def _spread(mean: float, deviation: float) -> str:
    return f"{mean:.4f} ± {deviation:.4f}" if deviation == deviation else f"{mean:.4f}"
