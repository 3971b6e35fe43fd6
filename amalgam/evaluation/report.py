"""What an evaluation writes: tables, all numbers, curves, and a web page.

``evaluation.json`` holds everything, for :func:`read` and other programs; ``evaluation.csv`` every
reading at a budget; ``evaluation.md`` the tables; ``report.html`` tables and curves on one page
that loads nothing from elsewhere; ``plots/`` the curves.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from amalgam import files
from amalgam.evaluation import paper, plots, tables
from amalgam.evaluation.protocol import Evaluation, Protocol, Result, Tuning, spread
from amalgam.evaluation.runner import About
from amalgam.evaluation.runs import to_json
from amalgam.version import describe

JSON = "evaluation.json"
_PAPER = "paper"


def between_replicates(results: Sequence[Result], replicates: int) -> str:
    """A sentence that says how much a task's replicates differ.

    Args:
        results: The task's results, those of the replicates first.
        replicates: How many replicates there are, at least 2.
    """
    deviation = spread(results[:replicates])
    said = (
        "has no deviation, as one diverged or has a loss without a logarithm"
        if math.isnan(deviation)
        else f"deviates by {deviation:.4f}"
    )
    return f"{results[0].task}: between {replicates} replicates the mean log final loss {said}"


def record_closing(evaluation: Evaluation, folder: Path, *, replicates: int = 1) -> None:
    """Write a meta-training run's closing evaluation: JSON, Markdown and a plot for each task.

    Args:
        evaluation: The evaluation, of one budget; of each task the replicates' results come first.
        folder: Where to write; made where missing.
        replicates: How many replicates there are.
    """
    results = evaluation.at(evaluation.horizon)
    content = _content(evaluation)
    shown = [table.markdown() for table in tables_of(evaluation)]
    if replicates > 1:
        spreads = {of_task[0].task: spread(of_task[:replicates]) for of_task in results}
        content["spread"] = {
            task: value if math.isfinite(value) else None for task, value in spreads.items()
        }
        shown += [between_replicates(of_task, replicates) + "\n" for of_task in results]
    _write(folder / JSON, json.dumps(content) + "\n")
    _write(folder / "evaluation.md", "\n".join(shown))
    for of_task in results:
        plots.curves(of_task, folder / "plots" / f"{of_task[0].task}.png")


def tables_of(evaluation: Evaluation, *, wide: bool = True) -> list[tables.Table]:
    """Each task's table.

    Args:
        evaluation: The evaluation.
        wide: Whether to add the columns that a narrow terminal has no room for.
    """
    return [
        tables.of_task(of_budgets, evaluation.horizon, wide=wide, parameters=about.parameters)
        for about, of_budgets in zip(evaluation.tasks, evaluation.results, strict=True)
    ]


def record(evaluation: Evaluation, folder: Path, about: dict[str, Any]) -> None:
    """Write all that the module's first lines name.

    Args:
        evaluation: The evaluation.
        folder: Where to write; made where missing.
        about: What was asked for, JSON-serialisable; a later evaluation in the folder compares it.
    """
    content = {"asked": about, **_content(evaluation)}
    shown = [tables.over_all_tasks(evaluation), *tables_of(evaluation)]
    shown.append(tables.of_tunings(evaluation))
    marked = stand_ins(evaluation)
    _write(folder / JSON, json.dumps(content) + "\n")
    _write(folder / "evaluation.csv", tables.comma_separated(evaluation))
    _write(
        folder / "evaluation.md",
        "\n".join([*(table.markdown() for table in shown), *([marked + "\n"] * bool(marked))]),
    )
    for of_budgets in evaluation.results:
        plots.curves(of_budgets[-1], folder / "plots" / f"{of_budgets[0][0].task}.png")
    _write(folder / "report.html", _page(evaluation))


def record_papers(
    results: Sequence[Sequence[paper.PaperResult]],
    folder: Path,
    about: dict[str, Any],
    epochs: int,
) -> None:
    """Write an evaluation by the paper's protocol: JSON, CSV, Markdown and a plot for each task.

    Args:
        results: For each task, the contenders' results.
        folder: Where to write; made where missing.
        about: As :func:`record` takes it.
        epochs: Epochs of each run.
    """
    content = {
        "asked": about,
        **describe(),
        "protocol": {"name": _PAPER, "epochs": epochs},
        "results": [
            {
                **one.result.as_dict(),
                "best_log_losses": [to_json(x) for x in one.best],
                "optimization_stability": [to_json(x) for x in one.stability],
            }
            for of_task in results
            for one in of_task
        ],
    }
    shown = [paper.table(of_task, epochs).markdown() for of_task in results]
    _write(folder / JSON, json.dumps(content) + "\n")
    _write(folder / "evaluation.csv", paper.comma_separated(results, epochs))
    _write(folder / "evaluation.md", "\n".join(shown))
    for of_task in results:
        plots.curves(
            [one.result for one in of_task],
            folder / "plots" / f"{of_task[0].result.task}.png",
        )


def _content(evaluation: Evaluation) -> dict[str, Any]:
    return {
        **describe(),
        "protocol": evaluation.protocol.about(),
        "tasks": [
            {name: value for name, value in asdict(about).items() if name != "seconds"}
            for about in evaluation.tasks
        ],
        "results": [
            result.as_dict()
            for of_task in evaluation.results
            for of_budget in of_task
            for result in of_budget
        ],
        "tunings": [
            {**asdict(tuned), "losses": [to_json(x) for x in tuned.losses]}
            for tuned in evaluation.tunings
        ],
    }


def read(folder: Path) -> Evaluation:
    """The evaluation that :func:`record` or :func:`record_closing` wrote to a folder.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: There is none.
        ValueError: The file is damaged, an earlier version's, or of the paper's protocol.
    """
    path = folder / JSON
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no {JSON}: it is no evaluation's folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["protocol"]["name"] != _PAPER:
            return _evaluation(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} is no evaluation of this version of amalgam ({error}); evaluate anew"
        ) from error
    raise ValueError(
        f"{str(folder)!r} holds an evaluation by the paper's protocol, and only those by the "
        f"protocol 'tuned' are compared; its tables are in evaluation.md, its runs in "
        f"evaluation.csv"
    )


def _evaluation(content: dict[str, Any]) -> Evaluation:
    """The evaluation that a file's content is of; any of several errors where it is damaged."""
    told = dict(content["protocol"])
    del told["horizon_steps"]
    told["grids"] = {
        name: tuple(tuple(setting.items()) for setting in settings)
        for name, settings in told["grids"].items()
    }
    for name in ("budgets", "decays"):
        told[name] = tuple(told[name])
    protocol = Protocol(**told)
    tasks = tuple(About(**about, seconds=math.nan) for about in content["tasks"])
    results = tuple(
        tuple(
            tuple(
                Result.from_dict(result)
                for result in content["results"]
                if result["task"] == task.name and result["steps"] == steps
            )
            for steps in protocol.steps
        )
        for task in tasks
    )
    tunings = tuple(
        Tuning(
            **{
                **tuned,
                "settings": tuple(tuned["settings"]),
                "losses": tuple(map(float, tuned["losses"])),
                "edge": tuple(tuned["edge"]),
            }
        )
        for tuned in content["tunings"]
    )
    return Evaluation(protocol, tasks, results, tunings)


def stand_ins(evaluation: Evaluation) -> str:
    """A sentence that names the tasks whose data are stand-ins; nothing where none are.

    Args:
        evaluation: The evaluation.
    """
    names = [about.name for about in evaluation.tasks if about.stand_in]
    if not names:
        return ""
    return (
        f"Stand-in data, drawn by this package and not the published sets: {', '.join(names)}. "
        f"Losses on them compare with each other, and with nothing published."
    )


def _write(path: Path, text: str) -> None:
    with files.whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def _page(evaluation: Evaluation) -> str:
    """The report as HTML."""
    protocol = evaluation.protocol
    seeds = protocol.seeds
    marked = stand_ins(evaluation)
    version = describe()
    parts = [
        "<h1>Optimizers compared</h1>",
        f"<p>{len(evaluation.tasks)} tasks, {seeds} seeds each, horizon {protocol.horizon} steps, "
        f"read after {_listed([f'{steps:,}' for steps in protocol.steps])} steps. Baselines are "
        f"tuned at the horizon, on seeds that are not reported. &ldquo;Linear&rdquo; says that the "
        f"rate falls to zero at the last step.</p>",
    ]
    if marked:
        parts.append(f"<p class=mark>{html.escape(marked)}</p>")
    parts.append(tables.over_all_tasks(evaluation).html())
    links = ", ".join(
        f'<a href="#task-{index}">{html.escape(about.name)}</a>'
        for index, about in enumerate(evaluation.tasks)
    )
    parts.append(f"<p>Tasks: {links}.</p>")
    for index, (about, of_budgets) in enumerate(
        zip(evaluation.tasks, evaluation.results, strict=True)
    ):
        mark = ' <span class="mark">stand-in data</span>' if about.stand_in else ""
        parts += [
            f'<section id="task-{index}"><h2>{html.escape(about.name)}{mark}</h2>',
            f"<p>{about.parameters:,} parameters, batches of {about.batch_size}. "
            f"{html.escape(about.data.removeprefix(f'{about.name}: '))}.</p>",
            f"<figure>{plots.curves_svg(of_budgets[-1])}<figcaption>Validation loss of the runs of "
            f"{of_budgets[-1][0].steps:,} steps; dashed where the rate decays. Bands reach from "
            f"the smallest to the largest of the seeds.</figcaption></figure>",
            tables.of_task(of_budgets, evaluation.horizon, parameters=about.parameters).html(),
            "</section>",
        ]
    parts.append(
        f"<details><summary>How the baselines were tuned</summary>"
        f"{tables.of_tunings(evaluation).html()}</details>"
    )
    parts.append(
        f"<footer>amalgam {html.escape(str(version['amalgam_version']))}, commit "
        f"{html.escape(str(version['commit']))}. Click a heading to sort.</footer>"
    )
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Optimizers compared</title><style>{_STYLE}</style></head>"
        f"<body><main>\n{body}\n</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5d6670; --line: #d9dee3;
  --ground: #ffffff; --raised: #f4f6f8; --best: #1f6f54; --mark: #8a5a00; --mark-ground: #fff3d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #9aa4ae; --line: #363d45;
  --ground: #15181c; --raised: #1e2328; --best: #6fd3ad; --mark: #f0c36a;
  --mark-ground: #3a2f17; } }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 84rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem; }
p { max-width: 46rem; margin: .4rem 0; }
a { color: inherit; }
.wide { overflow-x: auto; margin: .2rem 0 .5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; }
.title { font-weight: 600; margin-top: 1.2rem; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { cursor: pointer; white-space: normal; min-width: 3.5rem; color: var(--soft); font-weight: 600;
  vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: .2rem; position: sticky; left: 0;
  background: var(--ground); }
th[aria-sort=ascending]::after { content: " \\2191"; }
th[aria-sort=descending]::after { content: " \\2193"; }
tr.best td { color: var(--best); font-weight: 600; }
figure { margin: 1rem 0; max-width: 46rem; }
figure svg { width: 100%; height: auto; color: var(--ink); }
figcaption, .note, footer { color: var(--soft); font-size: .85rem; }
.mark { color: var(--mark); background: var(--mark-ground); border-radius: .3rem;
  padding: .15rem .5rem; font-size: .85rem; font-weight: 500; }
details { margin-top: 2.5rem; }
summary { cursor: pointer; font-weight: 600; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: .6rem; }
"""

_SCRIPT = """
document.querySelectorAll("th").forEach(function (th) {
  th.addEventListener("click", function () {
    var row = th.parentNode, body = th.closest("table").tBodies[0];
    var column = Array.prototype.indexOf.call(row.children, th);
    var down = th.getAttribute("aria-sort") === "ascending";
    var value = function (tr) {
      var text = tr.children[column].textContent, number = parseFloat(text.replace(/,/g, ""));
      return isNaN(number) ? text : number;
    };
    Array.from(row.children).forEach(function (one) { one.removeAttribute("aria-sort"); });
    th.setAttribute("aria-sort", down ? "descending" : "ascending");
    Array.from(body.rows).sort(function (a, b) {
      var x = value(a), y = value(b), order;
      if (typeof x === typeof y) order = x < y ? -1 : x > y ? 1 : 0;
      else order = typeof x === "number" ? -1 : 1;  // words, such as "never", come last
      return down ? -order : order;
    }).forEach(function (tr) { body.appendChild(tr); });
  });
});
"""
