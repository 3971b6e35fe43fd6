"""``amalgam evaluate`` and ``amalgam compare``."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from amalgam import tasks
from amalgam.device import resolve
from amalgam.evaluation import compare as comparing
from amalgam.evaluation import page, paper, report, tables
from amalgam.evaluation.cache import RunCache, default_folder
from amalgam.evaluation.contenders import (
    names_of,
    student_contender,
    teacher_contenders,
)
from amalgam.evaluation.protocol import Evaluation, Protocol, evaluate, short_protocol
from amalgam.evaluation.runner import NamedTask, Progress, Runner
from amalgam.hints import did_you_mean
from amalgam.policies import POOLS, Pool, load_policy

_console = Console()

FLAG = ""  # what an option without a value takes, where help would say <bool>
_WIDE_SUMMARY, _WIDE_TASK = 120, 190  # columns of a terminal that the widest tables need
_EVERY = 30.0  # seconds between two lines of progress where there is no terminal


Students = Annotated[
    list[str],
    typer.Argument(
        metavar="STUDENT",
        help="Learned optimizers: names of shipped ones, paths, hf://OWNER/NAME.",
    ),
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:1.")]


def evaluate_command(
    students: Students,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE]",
            help="Tasks or groups of tasks, with commas between them or the option given again; "
            "the dotted path of your own.",
            show_default="paper, or with --short short",
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder for tables, curves and report.")
    ] = None,
    short: Annotated[
        bool, typer.Option("--short", metavar=FLAG, help="Shorter runs, smaller grids, 2 seeds.")
    ] = False,
    protocol: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="tuned, or paper: its 25 epochs, ten runs, its teachers."
        ),
    ] = "tuned",
    horizon: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Steps that budgets are multiples of.",
            show_default="1000, or with --short 100",
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            metavar="X,X...",
            help="Multiples of the horizon to read at.",
            show_default="0.25,1,4,10, or with --short 0.25,1",
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Runs of each contender.",
            show_default="5, or with --short 2",
        ),
    ] = None,
    decays: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME...",
            help="How rates go on: constant, linear.",
            show_default="constant,linear",
        ),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A teacher to compare with, at the paper's rate; repeatable."
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Runs side by side, a thread each.",
            show_default="one a core",
        ),
    ] = None,
    device: Device = "auto",
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Where runs are kept.", show_default="the user's cache folder"
        ),
    ] = None,
) -> None:
    """Compare students with tuned baselines; stopped, the same command goes on where it was."""
    from amalgam import distributed

    distributed.join()
    named = _tasks(tasks or ["short" if short else "paper"])
    chosen = _protocol(protocol, short, horizon, budgets, seeds, decays)
    if protocol == "paper" and not teacher:
        teacher = list(dict.fromkeys(one.kind for one in POOLS["large"]))
    contenders = [
        student_contender(name, load_policy(path))
        for name, path in zip(names_of(students), students, strict=True)
    ] + teacher_contenders(Pool(teacher or []))
    asked = {
        "contenders": [[one.name, one.identity] for one in contenders],
        "tasks": [dataclasses.asdict(task) for task in named],
        "protocol": chosen.about() if isinstance(chosen, Protocol) else dataclasses.asdict(chosen),
    }
    # As a file has it, to be compared with one.
    asked = json.loads(json.dumps(asked))
    where = resolve(device)
    with (
        _progress(show=distributed.rank() == 0) as show,
        Runner(
            named,
            cache=RunCache(default_folder() if cache is None else cache),
            jobs=jobs or (_cores() if where.type == "cpu" and distributed.world() == 1 else 1),
            device=where,
            report=show,
        ) as runner,
    ):
        # Not before tasks are made: a folder for one that there is not is litter.
        folder = None if out is None else distributed.by_first(lambda: _folder(out, asked))
        try:
            if isinstance(chosen, Protocol):
                found = evaluate(runner, contenders, chosen)
            else:
                papers = paper.evaluate(runner, contenders, epochs=chosen.epochs, runs=chosen.runs)
        except KeyboardInterrupt:
            typer.echo("Stopped. The runs that ended are kept: the same command goes on.", err=True)
            raise
    first = distributed.rank() == 0
    distributed.leave()
    if not first:
        return
    if isinstance(chosen, Protocol):
        _show(found)
    else:
        for of_task in papers:
            _console.print(paper.table(of_task, chosen.epochs))
    stand_ins = page.stand_ins(runner.about)
    if stand_ins:
        _console.print(stand_ins, highlight=False, markup=False)
    if folder is None:
        return
    if isinstance(chosen, Protocol):
        report.record(found, folder, asked)
    else:
        report.record_papers(papers, folder, asked, chosen.epochs, runner.about)
    _print_path("report", folder / report.PAGE)


@dataclasses.dataclass(frozen=True)
class _Paper:
    """What can be set of the paper's protocol."""

    epochs: int = paper.EPOCHS
    runs: int = paper.RUNS


def compare_command(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER", help="Folders that `amalgam evaluate --out` wrote."),
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Whom to compare with.", show_default="the first other student"
        ),
    ] = None,
    contender: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Whom to compare; repeatable.", show_default="the other students"
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Steps to compare after.", show_default="the horizon"
        ),
    ] = None,
) -> None:
    """Compare optimizers task by task and over all, paired over the seeds that they share."""
    evaluations = {
        label: report.read(folder) for label, folder in comparing.labels_of(folders).items()
    }
    first = next(iter(evaluations.values()))
    known = {at for evaluation in evaluations.values() for at in evaluation.protocol.steps}
    at = first.protocol.horizon if steps is None else steps
    if at not in known:
        raise ValueError(f"steps must be one of {sorted(known)}, not {at}")
    everybody = comparing.contenders_of(evaluations)
    students = [name for name, results in everybody.items() if results[0].kind == "student"]
    others = [_known(name, everybody, "contender") for name in contender or []]
    left = (name for name in students if name not in others)
    against = next(left, None) if reference is None else _known(reference, everybody, "reference")
    if against is None:
        raise ValueError(
            f"reference must be given, one of {list(everybody)}: there is no other student"
        )
    if against in others:
        raise ValueError(f"contender must be another than the reference, not {against!r}, too")
    if not others:
        others = [name for name in students if name != against]
    if not others:
        others = [name for name in everybody if name != against]
    for name in others:
        found = comparing.compare(name, everybody[name], against, everybody[against], at)
        _console.print(comparing.table(found))


def _known(name: str, everybody: Sequence[str] | dict[str, Any], what: str) -> str:
    """A contender's name, or an error that lists them."""
    if name not in everybody:
        raise ValueError(
            f"{what} must be one of {list(everybody)}, not {name!r}{did_you_mean(name, everybody)}"
        )
    return name


def _print_path(what: str, path: Path) -> None:
    """Print where something is, in one line however narrow the terminal is."""
    _console.print(f"{what}: {path}", highlight=False, markup=False, soft_wrap=True)


def _show(found: Evaluation) -> None:
    """Print an evaluation's tables, as wide as the terminal is."""
    wide = _console.width >= _WIDE_TASK
    for table in report.tables_of(found, wide=wide):
        _console.print(table)
    _console.print(tables.over_all_tasks(found, wide=_console.width >= _WIDE_SUMMARY))


def _protocol(
    name: str,
    short: bool,
    horizon: int | None,
    budgets: str | None,
    seeds: int | None,
    decays: str | None,
) -> Protocol | _Paper:
    """The protocol that the options ask for."""
    if name not in ("tuned", "paper"):
        raise ValueError(f"protocol must be 'tuned' or 'paper', not {name!r}")
    if name == "paper":
        if (horizon, budgets, decays) != (None, None, None):
            raise ValueError(
                "horizon, budgets and decays are of the protocol 'tuned'; leave them out"
            )
        papers = _Paper(3, 2) if short else _Paper()
        return papers if seeds is None else dataclasses.replace(papers, runs=seeds)
    chosen = short_protocol() if short else Protocol()
    changes: dict[str, Any] = {}
    if horizon is not None:
        changes["horizon"] = horizon
    if seeds is not None:
        changes["seeds"] = seeds
    if budgets is not None:
        try:
            changes["budgets"] = tuple(float(one) for one in budgets.split(","))
        except ValueError:
            raise ValueError(
                f"budgets must be numbers with commas between them, such as 0.25,1,4, "
                f"not {budgets!r}"
            ) from None
    if decays is not None:
        changes["decays"] = tuple(decays.split(","))
    return dataclasses.replace(chosen, **changes)


def _groups() -> dict[str, tuple[NamedTask, ...]]:
    """Tasks that go by one name."""
    return {
        **{name: tuple(map(NamedTask, members)) for name, members in tasks.GROUPS.items()},
        "digits": (NamedTask("digits-mlp"), NamedTask("digits-cnn")),
        "small": tuple(
            NamedTask("small", (("optimizee", name),)) for name in (*tasks.SMALL, *tasks.HELD_OUT)
        ),
    }


def _tasks(given: Sequence[str]) -> list[NamedTask]:
    """The tasks that the option names."""
    groups = _groups()
    found: list[NamedTask] = []
    for text in (part.strip() for one in given for part in one.split(",")):
        if text in groups:
            found += groups[text]
            continue
        name, *settings = text.split(":")
        if "." not in name and name not in tasks.TASKS:
            known = [*groups, *tasks.TASKS]
            raise ValueError(
                f"tasks must be some of the groups {list(groups)}, the tasks {list(tasks.TASKS)}, "
                f"or the dotted path of a function such as 'my.module.make_task', "
                f"not {text!r}{did_you_mean(name, known)}"
            )
        arguments = []
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals or not key.isidentifier():
                raise ValueError(
                    f"a task's arguments must be given as NAME:KEY=VALUE, not as {text!r}"
                )
            arguments.append((key, _value(value)))
        found.append(NamedTask(name, tuple(arguments)))
    return found


def _value(text: str) -> Any:
    """A number, true, false or null as JSON spells them; all else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _folder(out: str, asked: dict[str, Any]) -> Path:
    """The folder to write to, once it is certain that this works and overwrites nothing else."""
    if not out:
        raise ValueError("out must be the path of a folder, not ''")
    folder = Path(out)
    for name in ("recipe.json", "metrics.jsonl", "checkpoint.safetensors"):
        if (folder / name).exists():
            raise ValueError(
                f"out must not be a meta-training run's folder, and {out!r} holds its {name}; "
                f"choose another, such as {str(folder / 'evaluation')!r}"
            )
    there = folder / report.JSON
    if there.exists() and _asked_before(there) != asked:
        raise ValueError(
            f"{out!r} holds an evaluation of other students, tasks or settings; "
            f"choose another folder, or remove {str(there)!r}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"out must be a folder that can be written to, not {out!r}: {error}"
        ) from error
    return folder


def _asked_before(path: Path) -> Any:
    """What an evaluation's file was asked for; ``None`` where it does not say."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("asked")
    except (ValueError, AttributeError):
        return None


def _cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _progress(*, show: bool) -> Iterator[Callable[[Progress], None]]:
    """What shows how far a runner is: a bar on a terminal, a line now and then elsewhere."""
    if not show:
        yield lambda progress: None
        return
    if not _console.is_terminal:
        yield _lines()
        return
    with Bar(
        TextColumn("{task.percentage:>3.0f}%"),
        BarColumn(bar_width=20),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=_console,
        transient=True,
        speed_estimate_period=600,
    ) as bar:
        shown = bar.add_task("looking at the tasks", total=None)

        def report_bar(progress: Progress) -> None:
            bar.update(
                shown, total=progress.total, completed=progress.done, description=progress.what
            )

        yield report_bar


def _lines() -> Callable[[Progress], None]:
    began = last = time.monotonic()

    def report_line(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _EVERY:
            return
        last = now
        left = ""
        # The first runs are made while processes still start.
        if progress.made > progress.total / 20:
            seconds = (progress.total - progress.done) * (now - began) / progress.made
            left = f", about {seconds / 60:.0f} min left"
        typer.echo(
            f"{progress.runs} runs, {progress.cached} of them from the cache{left}: {progress.what}"
        )

    return report_line
