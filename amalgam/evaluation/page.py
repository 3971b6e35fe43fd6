"""The web page of an evaluation: tables and curves in one file that loads nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence

from amalgam.evaluation import paper, plots, tables
from amalgam.evaluation.protocol import Evaluation, Result
from amalgam.evaluation.runner import About
from amalgam.version import describe


def of_evaluation(evaluation: Evaluation) -> str:
    """The page of an evaluation by the protocol with tuned baselines, as HTML.

    Args:
        evaluation: The evaluation.
    """
    protocol = evaluation.protocol
    caption = (
        "Validation loss of the runs of {steps:,} steps; dashed where the rate decays. Bands reach "
        "from the smallest to the largest of the seeds."
    )
    sections = [
        _section(
            about,
            of_budgets[-1],
            tables.of_task(of_budgets, evaluation.horizon, parameters=about.parameters),
            caption.format(steps=of_budgets[-1][0].steps),
        )
        for about, of_budgets in zip(evaluation.tasks, evaluation.results, strict=True)
    ]
    return _page(
        f"{_count(len(evaluation.tasks), 'task')}, {_count(protocol.seeds, 'seed')} each, horizon "
        f"{protocol.horizon} steps, read after "
        f"{_listed([f'{steps:,}' for steps in protocol.steps])} steps. Baselines are tuned at the "
        f"horizon, on seeds that are not reported. \u201cLinear\u201d says that the rate falls to "
        f"zero at the last step.",
        evaluation.tasks,
        tables.over_all_tasks(evaluation).html(),
        sections,
        f"<details><summary>How the baselines were tuned</summary>"
        f"{tables.of_tunings(evaluation).html()}</details>",
    )


def of_papers(
    results: Sequence[Sequence[paper.PaperResult]], tasks: Sequence[About], epochs: int
) -> str:
    """The page of an evaluation by the paper's protocol, as HTML.

    Args:
        results: For each task, the contenders' results.
        tasks: What is known of the tasks.
        epochs: Epochs of each run.
    """
    sections = [
        _section(
            about,
            [one.result for one in of_task],
            paper.table(of_task, epochs),
            f"Validation loss of the runs of {_count(epochs, 'epoch')}. Bands reach from the "
            f"smallest to the largest of the seeds.",
        )
        for about, of_task in zip(tasks, results, strict=True)
    ]
    runs = len(results[0][0].result.curves)
    return _page(
        f"{_count(len(tasks), 'task')} by the paper's protocol: {_count(epochs, 'epoch')}, "
        f"{_count(runs, 'run')} each, every optimizer at a constant rate, teachers at the paper's.",
        tasks,
        "",
        sections,
        "",
    )


def stand_ins(tasks: Sequence[About]) -> str:
    """A sentence that names the tasks whose data are stand-ins; nothing where none are.

    Args:
        tasks: What is known of the tasks.
    """
    names = [about.name for about in tasks if about.stand_in]
    if not names:
        return ""
    return (
        f"Stand-in data, drawn by this package and not the published sets: {', '.join(names)}. "
        f"Losses on them compare with each other, and with nothing published."
    )


def _section(
    about: About, results: Sequence[Result], table: tables.Table, caption: str
) -> list[str]:
    """A task's heading, data, curves and table."""
    mark = ' <span class="mark">stand-in data</span>' if about.stand_in else ""
    return [
        f"<h2>{html.escape(about.name)}{mark}</h2>",
        f"<p>{about.parameters:,} parameters, batches of {about.batch_size}. "
        f"{html.escape(about.data.removeprefix(f'{about.name}: '))}.</p>",
        f"<figure>{plots.curves_svg(results)}<figcaption>{caption}</figcaption></figure>",
        table.html(),
    ]


def _page(
    summary: str,
    tasks: Sequence[About],
    over_all: str,
    sections: Sequence[Sequence[str]],
    details: str,
) -> str:
    """The page; ``over_all`` and ``details`` are HTML that stands before and after all tasks."""
    marked, version = stand_ins(tasks), describe()
    links = ", ".join(
        f'<a href="#task-{index}">{html.escape(about.name)}</a>'
        for index, about in enumerate(tasks)
    )
    parts = ["<h1>Optimizers compared</h1>", f"<p>{html.escape(summary)}</p>"]
    if marked:
        parts.append(f"<p class=mark>{html.escape(marked)}</p>")
    parts += [over_all, f"<p>Tasks: {links}.</p>"]
    for index, section in enumerate(sections):
        parts += [f'<section id="task-{index}">', *section, "</section>"]
    parts += [
        details,
        f"<footer>amalgam {html.escape(str(version['amalgam_version']))}, commit "
        f"{html.escape(str(version['commit']))}. Click a heading to sort.</footer>",
    ]
    body = "\n".join(filter(None, parts))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Optimizers compared</title><style>{_STYLE}</style></head>"
        f"<body><main>\n{body}\n</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


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
