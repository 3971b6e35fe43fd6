"""Tables of results, and how they are shown: on a terminal, as Markdown, as CSV, as HTML."""

from __future__ import annotations

import csv
import html
import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from amalgam.evaluation.contenders import baseline
from amalgam.evaluation.intervals import Interval, log_ratios, over_tasks
from amalgam.evaluation.protocol import (
    ORACLE,
    TUNING_SEED,
    Evaluation,
    Result,
    leader,
    oracle_of,
    reference_of,
)

_ASCII = str.maketrans({"±": "+-", "×": "x", "–": "-", "“": '"', "”": '"', "…": "..."})


@dataclass(frozen=True)
class Table:
    """A table, ready to be shown; rich prints it, as wide as the terminal is.

    Attributes:
        title: What it is of.
        headings: The columns', the first of which names the row.
        rows: The cells.
        best: The indices of the rows that stand out.
        notes: Sentences below it.
        words: The indices of the columns of words, which stand to the left, as the first one does.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()
    words: frozenset[int] = frozenset()

    def text(self, width: int = 100, *, ascii_only: bool = False) -> str:
        """As plain text: in columns, or a block of lines for each row where they do not fit.

        Args:
            width: How many characters a line may have.
            ascii_only: Whether to use no others.
        """
        return "\n".join(line for line, _ in self._lines(width, ascii_only))

    def markdown(self) -> str:
        """As a Markdown table under its title."""
        lines = [
            f"**{self.title}**",
            "",
            "| " + " | ".join(map(_escaped, self.headings)) + " |",
            "|---|" + "---:|" * (len(self.headings) - 1),
        ]
        for index, row in enumerate(self.rows):
            mark = "**" if index in self.best else ""
            cells = (f"{mark}{_escaped(cell)}{mark}" if cell else "" for cell in row)
            lines.append("| " + " | ".join(cells) + " |")
        for note in self.notes:
            lines += ["", _escaped(note)]
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        """As an HTML table whose columns a script may sort by."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.headings)
        body = "".join(
            f"<tr{' class=best' if index in self.best else ''}>"
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
            + "</tr>"
            for index, row in enumerate(self.rows)
        )
        notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in self.notes)
        return (
            f"<p class=title>{html.escape(self.title)}</p><div class=wide><table>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{notes}"
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lines as wide as the console."""
        for line, style in self._lines(options.max_width, options.ascii_only):
            yield Text(line, style=style)
        yield Text("")

    def _lines(self, width: int, ascii_only: bool) -> Iterator[tuple[str, str]]:
        def plain(text: str) -> str:
            if not ascii_only:
                return text
            return text.translate(_ASCII).encode("ascii", "replace").decode()

        yield from ((line, "bold") for line in _wrapped(plain(self.title), width))
        headings = [plain(name) for name in self.headings]
        rows = [[plain(cell) for cell in row] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
        if sum(widths) + 2 * (len(widths) - 1) <= width:
            for index, row in enumerate([headings, *rows]):
                cells = (
                    cell.rjust(size) if column and column not in self.words else cell.ljust(size)
                    for column, (cell, size) in enumerate(zip(row, widths, strict=True))
                )
                yield "  ".join(cells).rstrip(), "bold" if index - 1 in self.best else ""
                if index == 0:
                    yield "  ".join("-" * size for size in widths), ""
        else:
            for index, row in enumerate(rows):
                yield from ((line, "bold") for line in _wrapped(row[0], width))
                for name, cell in zip(headings[1:], row[1:], strict=True):
                    if cell:
                        style = "bold" if index in self.best else ""
                        lines = _wrapped(f"{name}: {cell}", width - 2)
                        yield from (("  " + line, style) for line in lines)
        for note in self.notes:
            yield from ((line, "") for line in _wrapped(plain(note), width))


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 10), subsequent_indent="  ") or [""]


def number(value: float) -> str:
    """Four digits, with a power of ten where the number is very large or small."""
    return _formatted(value, value)


def _formatted(value: float, like: float) -> str:
    """A number with as many decimals as another takes for four digits."""
    if not math.isfinite(like) or like == 0:
        return f"{value:.4f}"
    exponent = math.floor(math.log10(abs(like)))
    if not -5 < exponent < 6:
        return f"{value:.3e}"
    return f"{value:.{max(3 - exponent, 0)}f}"


def _spread(mean: float, deviation: float) -> str:
    if not math.isfinite(mean):
        return ""
    if not math.isfinite(deviation):
        return number(mean)
    return f"{number(mean)} ± {_formatted(deviation, mean)}"


def _ratio(interval: Interval) -> str:
    value, low, high = interval
    if math.isnan(value):
        return ""
    shown = "diverged" if math.isinf(value) else f"{value:.3f}"
    if math.isnan(low) or math.isnan(high):
        return shown
    return f"{shown} [{low:.3f}, {high:.3f}]"


def diverged(result: Result) -> str:
    """``"diverged 2 of 5"``, or nothing where no run did."""
    if not result.diverged:
        return ""
    return f"diverged {result.diverged} of {len(result.curves)}"


def _final(result: Result, deviation: bool) -> str:
    """The final loss, and how many runs diverged."""
    mean, deviates = result.summary("final")
    shown = _spread(mean, deviates if deviation else math.nan)
    return ", ".join(filter(None, (shown, diverged(result))))


def of_task(
    of_budgets: Sequence[Sequence[Result]],
    horizon: int = 0,
    *,
    wide: bool = True,
    parameters: int | None = None,
) -> Table:
    """One task's table: losses are mean ± standard deviation over seeds.

    Args:
        of_budgets: For each budget, the contenders' results in one order, at least one.
        horizon: The index of the budget that the columns without a budget are of.
        wide: Whether to add the columns that a narrow terminal has no room for.
        parameters: How many the network has, for the optimizers' states beside.
    """
    at = of_budgets[horizon]
    reference = reference_of(at)
    deviation = wide or len(of_budgets) == 1
    columns: list[tuple[str, list[str]]] = [("optimizer", [result.name for result in at])]
    for results in of_budgets:
        heading = f"loss after {results[0].steps}"
        columns.append((heading, [_final(result, deviation) for result in results]))
    if wide:
        columns.append(("best loss", [_spread(*result.summary("best")) for result in at]))
        columns.append(("training loss", [_spread(*result.summary("training")) for result in at]))
    accuracies = [result.summary("accuracy")[0] for result in at]
    if not all(map(math.isnan, accuracies)):
        shown = ["" if math.isnan(accuracy) else f"{accuracy:.1%}" for accuracy in accuracies]
        columns.append(("accuracy", shown))
    if reference is not None:
        target = fmean(curve.losses[-1] for curve in reference.curves)
        within = list(zip(*of_budgets, strict=True))
        columns.append(("steps to Adam's", [steps_to(target, results) for results in within]))
    if wide:
        if any(math.isfinite(curve.seconds) for result in at for curve in result.curves):
            columns.append(("ms a step", [_milliseconds(result) for result in at]))
        if parameters is not None:
            bytes_each = [result.curves[0].state_bytes / parameters for result in at]
            columns.append(("bytes a parameter", [f"{each:.1f}" for each in bytes_each]))
        columns.append(("settings", [result.settings for result in at]))
    headings, cells = zip(*columns, strict=True)
    seeds = len(at[0].curves)
    title = f"{at[0].task}: validation after {at[0].steps} steps, {seeds} seed{'s' * (seeds > 1)}"
    first = leader(at)
    best = frozenset(() if first.diverged else {at.index(first)})
    notes = []
    oracle = oracle_of(at)
    if oracle is not None:
        notes.append(f"Oracle, the best tuned baseline after {at[0].steps} steps: {oracle.label}.")
    if reference is not None:
        notes.append(f"Tuned Adam: {reference.label}.")
    return Table(title, headings, tuple(zip(*cells, strict=True)), best, tuple(notes))


def steps_to(loss: float, within: Sequence[Result]) -> str:
    """The fewest steps after which a contender's curves were at a loss or below, mean over seeds.

    Args:
        loss: A validation loss, read as the curves' are.
        within: The contender's results within each budget. Of each seed the run that is the first
            to get there counts.

    Returns:
        The mean; with how many of the seeds got there, if not all did; ``"never"`` if none did.
    """
    reached = []
    for curves in zip(*(result.curves for result in within), strict=True):
        found = [
            step for step in (curve.first_at_most(loss) for curve in curves) if step is not None
        ]
        reached += [min(found)] if found else []
    seeds = len(within[0].curves)
    if not reached:
        return "never"
    return f"{fmean(reached):.0f}" + (
        f" ({len(reached)} of {seeds})" if len(reached) < seeds else ""
    )


def _milliseconds(result: Result) -> str:
    seconds = [curve.seconds for curve in result.curves if math.isfinite(curve.seconds)]
    return f"{1000 * median(seconds):.2f}" if seconds else ""


def over_all_tasks(evaluation: Evaluation, *, wide: bool = True) -> Table:
    """The contenders over all tasks, by their losses over tuned Adam's.

    Args:
        evaluation: The evaluation; its protocol tunes Adam.
        wide: Whether to give the intervals at other budgets than the horizon.
    """
    horizon = evaluation.horizon
    names = [result.name for result in evaluation.results[0][horizon]]
    headings = [
        "optimizer",
        *(f"after {steps}" for steps in evaluation.protocol.steps),
        "best on",
        "diverged",
    ]
    tasks = len(evaluation.tasks)
    rows = []
    ratios: dict[str, float] = {}
    left_out: dict[str, None] = {}
    foremost = [leader(results) for results in evaluation.at(horizon)]
    leaders = [result.name for result in foremost if not result.diverged]
    for name in [*names, ORACLE]:
        row = [name]
        for budget in range(len(evaluation.protocol.budgets)):
            scores = []
            for results in evaluation.at(budget):
                result = oracle_of(results) if name == ORACLE else _named(results, name)
                reference = reference_of(results)
                if result is None or reference is None:
                    continue
                logs = log_ratios(result.scores, reference.scores)
                if logs is None:
                    left_out[result.task] = None
                else:
                    scores.append(logs)
            ratio = over_tasks(scores).exp()
            narrow = Interval(ratio.value, math.nan, math.nan)
            row.append(_ratio(ratio if wide or budget == horizon else narrow))
            if budget == horizon and name != ORACLE:
                ratios[name] = math.inf if math.isnan(ratio.value) else ratio.value
        if name == ORACLE:
            rows.append((*row, "", ""))
            continue
        at = [_named(results, name) for results in evaluation.at(horizon)]
        lost = sum(result.diverged for result in at)
        runs = sum(len(result.curves) for result in at)
        rows.append((*row, f"{leaders.count(name)} of {tasks}", f"{lost} of {runs}"))
    best = names.index(min(ratios, key=ratios.__getitem__))
    notes = [
        "Validation losses over tuned Adam's, seed by seed: the interquartile mean of "
        "the ratios' logarithms over tasks and seeds, and its 95% interval by a bootstrap that "
        "draws seeds anew within each task. Below 1 is better than Adam.",
        "A run diverged if a loss is not finite at its end, or its training loss is above that at "
        "its beginning.",
    ]
    if left_out:
        notes.append(
            f"Left out of the ratios, as a loss of theirs is zero or negative and has no "
            f"logarithm: {', '.join(left_out)}."
        )
    seeds = evaluation.protocol.seeds
    title = (
        f"{tasks} task{'s' * (tasks > 1)}, {seeds} seed{'s' * (seeds > 1)}, "
        f"protocol {evaluation.protocol.name}: losses over tuned Adam's"
    )
    return Table(title, tuple(headings), tuple(rows), frozenset({best}), tuple(notes))


def _named(results: Sequence[Result], name: str) -> Result:
    return next(result for result in results if result.name == name)


def of_tunings(evaluation: Evaluation) -> Table:
    """What was tuned, over which grid, at what expense, and what came of it."""
    rows = []
    for tuned in evaluation.tunings:
        edge = f", {' and '.join(tuned.edge)} at the grid's edge" if tuned.edge else ""
        rows.append(
            (
                f"{tuned.task}: {tuned.optimizer}, {tuned.decay}",
                f"{tuned.settings[tuned.chosen]}{edge}",
                number(tuned.losses[tuned.chosen]),
                f"{sum(map(math.isinf, tuned.losses))} of {len(tuned.losses)}",
                f"{tuned.runs} × {tuned.steps}",
            )
        )
    runs = sum(tuned.runs for tuned in evaluation.tunings)
    steps = sum(tuned.runs * tuned.steps for tuned in evaluation.tunings)
    grids = [
        f"{name}: "
        + "; ".join(baseline(name, setting, "constant").settings for setting in settings)
        for name, settings in evaluation.protocol.grids.items()
    ]
    seeds = evaluation.protocol.tuning_seeds
    which = "Every point of a grid was"
    if evaluation.protocol.falling_rates:
        which = "Points of grids (with a decay, but for AdamW, from the best constant rate on) were"
    notes = (
        f"{which} run whole, with {seeds} seed{'s' * (seeds > 1)} from "
        f"{TUNING_SEED} on: {runs:,} runs, {steps:,} steps in all.",
        *(f"{one}." for one in grids),
    )
    return Table(
        "Tuning",
        ("task and optimizer", "chosen", "loss", "points that diverged", "runs × steps"),
        tuple(rows),
        notes=notes,
    )


def comma_separated(evaluation: Evaluation) -> str:
    """Every reading at a budget, one a line, as CSV."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        (
            *("task", "parameters", "optimizer", "kind", "decay", "settings", "budget"),
            *("steps", "seed", "validation_loss", "validation_accuracy", "training_loss"),
            *("training_accuracy", "diverged", "seconds_a_step", "state_bytes"),
        )
    )
    for task, of_budgets in zip(evaluation.tasks, evaluation.results, strict=True):
        for budget, results in zip(evaluation.protocol.budgets, of_budgets, strict=True):
            for result in results:
                for seed, curve in enumerate(result.curves):
                    writer.writerow(
                        (
                            *(task.name, task.parameters, result.name, result.kind),
                            *(result.decay, result.settings, f"{budget:g}", result.steps, seed),
                            *curve.full[-1][1:],
                            *(int(curve.diverged), curve.seconds, curve.state_bytes),
                        )
                    )
    return file.getvalue()
