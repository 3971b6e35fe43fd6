"""The command line: ``amalgam train | validate | evaluate | compare | convert | push | info``.

Exit codes: 0, done; 1, it failed while it ran; 2, what was asked for can't be done; 3, a run is
over and nothing was learned; 130 and 143, interrupted by Ctrl-C and by SIGTERM; 141, nobody reads
the output any more.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from amalgam import ops, recipes, tasks, weight_files
from amalgam.device import resolve
from amalgam.evaluation import commands
from amalgam.evaluation.commands import FLAG, Device, Students
from amalgam.evaluation.contenders import names_of
from amalgam.evaluation.tables import Table
from amalgam.extras import MissingExtra
from amalgam.heap import keep_freed_memory
from amalgam.optimizers import estimate_memory
from amalgam.optimizers.source import student_of
from amalgam.policies import load_policy
from amalgam.tasks import Task
from amalgam.version import describe

if TYPE_CHECKING:
    from amalgam.experiment import Experiment

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Amalgamate optimizers: teachers in, one learned optimizer out.",
    epilog="To begin with: amalgam train digits",
)
_console = Console()
_WIDE_BAR = 100  # columns of a terminal that a progress bar with both losses needs
_EVERY = 30.0  # seconds between two lines of progress where there is no terminal
INTERRUPTED = 128 + signal.SIGINT
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EIO}


_OwnCode = Annotated[
    bool,
    typer.Option(
        "--own-code",
        metavar=FLAG,
        help="Let a recipe from outside the working directory run the modules it names.",
    ),
]


class _Terminated(SystemExit):
    """SIGTERM came; unlike other ends of the process, one that a run can go on after."""


def _print_version(asked: bool) -> None:
    if asked:
        about = describe()
        _plain(f"amalgam {about['amalgam_version']} ({about['commit'] or 'commit unknown'})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar=FLAG,
            callback=_print_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A shipped recipe's name (`amalgam info` lists them), or a path to a TOML file.",
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Run folder.", show_default="runs/RECIPE-SEED"),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Decides everything random.")] = 0,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a key, as strategy.unroll=20; repeatable."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", metavar=FLAG, help="Go on where the run stopped.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE", help="auto, cpu, cuda or cuda:1.", show_default="the recipe's"
        ),
    ] = None,
    own_code: _OwnCode = False,
    tensorboard: Annotated[
        bool,
        typer.Option(
            "--tensorboard", metavar=FLAG, help="Write the metrics to FOLDER/tensorboard, too."
        ),
    ] = False,
) -> None:
    """Meta-train a student, then compare it with its teachers, Adam and AdamW."""
    from amalgam import distributed

    if out is not None and not out.strip():
        raise ValueError(f"--out must name a folder, not {out!r}; '.' is the working directory")
    folder = Path(out) if out is not None else Path("runs") / f"{Path(recipe).stem}-{seed}"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out must name a folder, and {str(folder)!r} is a file")
    distributed.join()
    overrides = [*(override or []), *([f"device={device}"] if device is not None else [])]
    with _told_how_to_resume(folder):
        chosen = distributed.by_first(
            lambda: recipes.load(recipe, overrides, own_code=own_code or None)
        )
        _train(chosen, Path(recipe).stem, folder, seed, resume, tensorboard)


@contextmanager
def _told_how_to_resume(folder: Path) -> Iterator[None]:
    """Where the block is interrupted and there is a run to go on with, say by which command."""
    from amalgam.experiment import RECIPE

    try:
        yield
    except (KeyboardInterrupt, _Terminated) as stopped:
        if (folder / RECIPE).exists() and "RANK" not in os.environ:
            arguments = [*sys.argv[1:], *(["--resume"] if "--resume" not in sys.argv else [])]
            command = shlex.join(["amalgam", *arguments])
            _say(f"interrupted; this goes on where the last checkpoint is:\n  {command}")
        sys.exit(stopped.code if isinstance(stopped, _Terminated) else INTERRUPTED)


def _train(
    chosen: recipes.Recipe, name: str, folder: Path, seed: int, resume: bool, tensorboard: bool
) -> None:
    from amalgam import distributed
    from amalgam.experiment import Experiment

    run = Experiment(chosen, folder, name=name, seed=seed, resume=resume, tensorboard=tensorboard)
    if distributed.rank():
        run.train()
        distributed.leave()
        return
    with distributed.locked(folder):
        _train_and_evaluate(run, name, folder)


def _train_and_evaluate(run: Experiment, name: str, folder: Path) -> None:
    """What the first process does, which reports."""
    from amalgam import distributed
    from amalgam.evaluation.report import between_replicates, tables_of

    _plain(f"{name}: {run.recipe.description}\nrun folder: {folder}")

    with _training_progress() as progress:
        students = run.train(progress.report, progress.begin)
        progress.end(run.meta_steps)
    distributed.leave()

    with _evaluation_progress() as report:
        found = run.evaluate(report)
    for table, results in zip(tables_of(found, wide=False), found.at(0), strict=True):
        _console.print(table)
        if len(students) > 1:
            _plain(between_replicates(results, len(students)))
    kept = "student.safetensors" if len(students) == 1 else "replicate-*/student.safetensors"
    _plain(f"student: {folder / kept}\nplots:   {folder / 'plots'}")


@app.command()
def validate(
    students: Students,
    by: Annotated[
        str, typer.Option(metavar="RECIPE", help="A shipped recipe's name, or a path.")
    ] = "standard",
    seed: Annotated[
        int, typer.Option(metavar="N", help="Decides initial weights and batches.")
    ] = 0,
    device: Device = "auto",
    own_code: _OwnCode = False,
) -> None:
    """Score students by a recipe's meta-validation, best first, to keep one of several replicates.

    The score is the mean log of the last validation loss (of the loss over its first one where
    the recipe has no logs), over the recipe's validation tasks, seeds and decays of the rate.
    """
    from amalgam.meta import validation

    recipe, where = recipes.load(by, own_code=own_code or None), resolve(device)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    sources = [
        one.task.to(where) if isinstance(one.task, Task) else one.task
        for one in recipe.validation or recipe.tasks
    ]
    named = dict(zip(names_of(students), map(load_policy, students), strict=True))
    scores = []
    with _evaluation_progress() as report:
        for name, student in named.items():
            report(name)
            score = validation.of_student(
                student.to(where),
                sources,
                recipe.training,
                recipe.amalgamation,
                seed=seed,
                device=where,
            )
            scores.append((score, name))
    # A score that is no number, of a student that diverged, comes last.
    scores.sort(key=lambda pair: (math.isnan(pair[0]), pair))
    rows = tuple((name, f"{score:.4f}") for score, name in scores)
    title = f"meta-validation of {Path(by).stem}, lower is better"
    best = frozenset({0} if math.isfinite(scores[0][0]) else ())
    _console.print(Table(title, ("student", "score"), rows, best))


class _Bars:
    """Progress on a terminal: a bar for each policy that is trained."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars

    def begin(self, what: str, meta_steps: int | None) -> None:
        self._bars.add_task(what, total=meta_steps, meta=0.0, imitation=0.0)

    def report(self, row: dict[str, Any]) -> None:
        self._bars.update(
            self._bars.task_ids[-1],
            completed=row["meta_step"],
            meta=_number(row["meta_loss"]),
            imitation=_number(row["imitation_loss"]),
        )

    def end(self, meta_steps: Sequence[int]) -> None:
        for bar, trained in zip(self._bars.task_ids, meta_steps, strict=True):
            self._bars.update(bar, total=trained, completed=trained)


class _Lines:
    """Progress in a log file: a line at the beginning and the end of training, and now and then."""

    def __init__(self) -> None:
        self._said, self._of, self._last = time.monotonic(), "", ""

    def begin(self, what: str, meta_steps: int | None) -> None:
        self._finish()
        self._of = "" if meta_steps is None else f" of {meta_steps}"
        _plain(f"meta-training the {what}")

    def report(self, row: dict[str, Any]) -> None:
        self._last = (
            f"meta-step {row['meta_step']}{self._of}: "
            f"meta-loss {_number(row['meta_loss']):+.3f}, "
            f"imitation {_number(row['imitation_loss']):+.3f}"
        )
        if time.monotonic() - self._said >= _EVERY:
            self._finish()

    def end(self, meta_steps: Sequence[int]) -> None:
        self._finish()

    def _finish(self) -> None:
        if self._last:
            _plain(self._last)
        self._said, self._last = time.monotonic(), ""


@contextmanager
def _training_progress() -> Iterator[_Bars | _Lines]:
    """What shows how far meta-training is."""
    if not _console.is_terminal:
        yield _Lines()
        return
    narrow = _console.width < _WIDE_BAR
    imitation = "" if narrow else "  imitation {task.fields[imitation]:+.3f}"
    with Progress(
        TextColumn("{task.description}" if narrow else "meta-training the {task.description}"),
        BarColumn(bar_width=10 if narrow else 20),
        MofNCompleteColumn(),
        TextColumn("meta-loss {task.fields[meta]:+.3f}" + imitation),
        TimeRemainingColumn(),
        console=_console,
    ) as bars:
        yield _Bars(bars)


@contextmanager
def _evaluation_progress() -> Iterator[Callable[[str], None]]:
    """What shows which run the closing evaluation is at: a status, or a line now and then."""
    if _console.is_terminal:
        with _console.status("evaluating") as status:
            yield lambda what: status.update(escape(f"evaluating: {what}"))
        return
    _plain("evaluating")
    said = time.monotonic()

    def say(what: str) -> None:
        nonlocal said
        if time.monotonic() - said >= _EVERY:
            _plain(f"evaluating: {what}")
            said = time.monotonic()

    yield say


def _plain(text: str) -> None:
    """Print text as it is: brackets are no markup, and no path is broken in two."""
    _console.print(text, highlight=False, markup=False, soft_wrap=True)


def _say(text: str, style: str = "yellow") -> None:
    """The same to the error stream."""
    Console(stderr=True).print(text, style=style, highlight=False, markup=False, soft_wrap=True)


app.command("evaluate")(commands.evaluate_command)
app.command("compare")(commands.compare_command)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="An .npz, or a TensorFlow checkpoint's folder."),
    ],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="The .safetensors file to write.")],
    key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Which student of an .npz, as min-max/1.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar=FLAG, help="Replace DEST.")
    ] = False,
) -> None:
    """Convert one of the paper's authors' released students into one of ours."""
    from amalgam.convert import convert as convert_student

    if dest.exists() and not overwrite:
        raise FileExistsError(f"{str(dest)!r} is there already; replace it by --overwrite")
    student = convert_student(source, dest, key=key)
    _plain(f"{dest}: {student.config}")


@app.command()
def push(
    student: Annotated[
        str, typer.Argument(metavar="STUDENT", help="A shipped student's name, or a path.")
    ],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository.")],
    private: Annotated[
        bool,
        typer.Option("--private", metavar=FLAG, help="Make the repository private, if it is made."),
    ] = False,
) -> None:
    """Upload a student to the Hugging Face hub; hf://OWNER/NAME then is its name."""
    from amalgam import hub

    _plain(hub.push(load_policy(student), repo, private=private))


@app.command()
def info(
    as_json: Annotated[
        bool, typer.Option("--json", metavar=FLAG, help="Print JSON, for scripts.")
    ] = False,
) -> None:
    """Show what works on this machine, and why the rest does not."""
    from amalgam.backends.core import build_info

    report: dict[str, Any] = {
        **describe(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "core": build_info(),
        "backends": [dataclasses.asdict(status) for status in ops.backends().values()],
        "students": [_about(name) for name in weight_files.shipped()],
        "recipes": list(recipes.shipped()),
        "tasks": list(tasks.TASKS),
        "task families": list(tasks.FAMILIES),
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for key, value in report.items():
        if key == "core":
            _plain(_listed(value))
        elif key not in ("backends", "students"):
            _plain(f"{key}: {_listed(value)}")
    _console.print(
        "", _table_of_students(report["students"]), _table_of_backends(report["backends"])
    )


def _table_of_students(students: Sequence[Mapping[str, Any]]) -> Table:
    rows = tuple(
        (
            *(student["name"], student["kind"], f"{student['layers']} x {student['units']}"),
            *(f"{student['bytes_a_parameter']:g}", student["description"]),
        )
        for student in students
    )
    headings = ("student", "kind", "layers x units", "bytes a parameter", "what it is")
    return Table("students", headings, rows, words=frozenset({1, 2, 4}))


def _table_of_backends(backends: Sequence[Mapping[str, Any]]) -> Table:
    rows = tuple(
        (
            *(backend["name"], "yes" if backend["works"] else "no"),
            ", ".join(_whole(backend["operations"])),
            backend["reason"] or "",
        )
        for backend in backends
    )
    headings = ("backend", "works", "operations", "why not")
    return Table("backends", headings, rows, words=frozenset({1, 2, 3}))


def _whole(kernels: Sequence[str]) -> list[str]:
    """The kernels that compute an operation, and are no part of one, as its backward is."""
    parts = {f"{name}_backward" for name in kernels}
    return [name for name in kernels if name not in parts and not name.endswith("_into")]


def _listed(value: Any) -> str:
    """A value of the report in a line."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_listed(one)}" for name, one in value.items())
    return str(value)


def _about(name: str) -> dict[str, Any]:
    """What a shipped student is, and what the optimizer's state takes with it."""
    student = student_of(name)
    return {
        "name": name,
        "kind": student.kind,
        "description": student.description,
        "layers": student.config.layers,
        "units": student.config.hidden,
        "bytes_a_parameter": estimate_memory([torch.empty(1)], student).bytes_a_parameter,
    }


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def main() -> None:
    """Run the command line; show errors that the user can mend without a traceback.

    Under ``torchrun`` an error goes into its report, once, instead of from every process to the
    terminal.
    """
    keep_freed_memory()
    _find_modules_here()
    warnings.showwarning = _warn
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        _heed_signals()
        _run()
        return
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        record(_run)()
    except Exception:
        sys.exit(1)


def _find_modules_here() -> None:
    """Let recipes name modules of the working directory, as under ``python -m``."""
    if not sys.flags.safe_path and not {"", str(Path.cwd())} & set(sys.path):
        # At the end, where no file of the directory hides an installed package.
        sys.path.append(str(Path.cwd()))


def _heed_signals() -> None:
    """Treat SIGTERM as Ctrl-C, and end silently where nobody reads the output any more."""

    def stop(number: int, frame: object) -> None:
        raise _Terminated(128 + number)

    signal.signal(signal.SIGTERM, stop)
    if hasattr(signal, "SIGPIPE"):  # Windows has none
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def _warn(message: Warning | str, *where: object, **more: object) -> None:
    """Show a warning as one line, without the line of code that gave it."""
    _say(f"warning: {message}")


def _run() -> None:
    from amalgam.meta import NothingLearned
    from amalgam.operations.registry import BackendError

    try:
        app()
    except NothingLearned as error:
        _fail(error, 3)
    except (MemoryError, torch.OutOfMemoryError) as error:
        _fail(
            error,
            1,
            f"out of memory: {str(error) or 'the system gave none'}; set memory.budget, or fewer "
            f"training.optimizees; what was trained so far is kept (--resume)",
        )
    except (ValueError, OSError, BackendError, MissingExtra) as error:
        _fail(error, 1 if getattr(error, "errno", None) in DISK_FAULTS else 2)


def _fail(error: Exception, code: int, text: str | None = None) -> None:
    """End with an error in one line, or with its traceback if ``AMALGAM_DEBUG`` is set."""
    if os.environ.get("AMALGAM_DEBUG"):
        raise error
    _say(f"error: {' '.join((text or str(error)).split())}", "red")
    sys.exit(code)


if __name__ == "__main__":
    main()
