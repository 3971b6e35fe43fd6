"""The command line: ``amalgam train | evaluate | compare | convert | push | info``.

Exit codes: 0, done; 1, it failed while it ran; 2, what was asked for can't be done; 3, a run is
over and nothing was learned; 130 and 143, interrupted by Ctrl-C and by SIGTERM; 141, nobody reads
the output any more.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import platform
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from amalgam import ops, recipes, tasks, weight_files
from amalgam.evaluation import commands
from amalgam.extras import MissingExtra
from amalgam.heap import keep_freed_memory
from amalgam.optimizers import estimate_memory
from amalgam.optimizers.source import student_of
from amalgam.policies import load_policy
from amalgam.version import describe

if TYPE_CHECKING:
    from amalgam.experiment import Experiment

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Amalgamate optimizers: teachers in, one learned optimizer out.",
)
_console = Console()
INTERRUPTED = 128 + signal.SIGINT
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EIO}


class _Terminated(SystemExit):
    """SIGTERM came; unlike other ends of the process, one that a run can go on after."""


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe's name, or a path to a TOML file.")
    ],
    out: Annotated[str | None, typer.Option(help="Run folder [default: runs/RECIPE-SEED]")] = None,
    seed: Annotated[int, typer.Option(help="Decides everything random.")] = 0,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key: strategy.unroll=20"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run stopped.")] = False,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:1 [default: the recipe's]")
    ] = None,
    own_code: Annotated[
        bool,
        typer.Option(
            "--own-code",
            help="Let a recipe from outside the working directory run the modules it names.",
        ),
    ] = False,
    tensorboard: Annotated[
        bool,
        typer.Option("--tensorboard", help="Write the metrics to OUT/tensorboard, too."),
    ] = False,
) -> None:
    """Meta-train a student, then compare it with its teachers, Adam and AdamW."""
    from amalgam.meta import distributed

    if out is not None and not out.strip():
        raise ValueError(f"--out must name a folder, not {out!r}; '.' is the working directory")
    folder = Path(out) if out is not None else Path("runs") / f"{Path(recipe).stem}-{seed}"
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
    from amalgam.experiment import Experiment
    from amalgam.meta import distributed

    run = Experiment(chosen, folder, name=name, seed=seed, resume=resume, tensorboard=tensorboard)
    if distributed.rank():
        run.train()
        distributed.leave()
        return
    with distributed.locked(folder):
        _train_and_evaluate(run, name, folder)


def _train_and_evaluate(run: Experiment, name: str, folder: Path) -> None:
    """What the first process does, which reports."""
    from amalgam.evaluation.report import between_replicates, tables_of
    from amalgam.meta import distributed

    _plain(f"{name}: {run.recipe.description}\nrun folder: {folder}")

    with Progress(
        TextColumn("meta-training the {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("meta-loss {task.fields[meta]:+.3f}  imitation {task.fields[imitation]:+.3f}"),
        TimeRemainingColumn(),
        console=_console,
    ) as progress:

        def begin(what: str, meta_steps: int | None) -> None:
            progress.add_task(what, total=meta_steps, meta=0.0, imitation=0.0)

        def metrics(row: dict[str, Any]) -> None:
            progress.update(
                progress.task_ids[-1],
                completed=row["meta_step"],
                meta=_number(row["meta_loss"]),
                imitation=_number(row["imitation_loss"]),
            )

        students = run.train(metrics, begin)
        for bar, trained in zip(progress.task_ids, run.meta_steps, strict=True):
            progress.update(bar, total=trained, completed=trained)
    distributed.leave()

    with _console.status("evaluating") as status:
        found = run.evaluate(lambda who: status.update(escape(f"evaluating: {who}")))
    for table, results in zip(tables_of(found, wide=False), found.at(0), strict=True):
        _console.print(table)
        if len(students) > 1:
            _plain(between_replicates(results, len(students)))
    kept = "student.safetensors" if len(students) == 1 else "replicate-*/student.safetensors"
    _plain(f"student: {folder / kept}\nplots:   {folder / 'plots'}")


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
    source: Annotated[Path, typer.Argument(help="An .npz, or a TensorFlow checkpoint's folder.")],
    dest: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    key: Annotated[str | None, typer.Option(help="Which student of an .npz: min-max/1")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DEST.")] = False,
) -> None:
    """Convert one of the paper's authors' released students into one of ours."""
    from amalgam.convert import convert as convert_student

    if dest.exists() and not overwrite:
        raise FileExistsError(f"{str(dest)!r} is there already; replace it by --overwrite")
    student = convert_student(source, dest, key=key)
    _plain(f"{dest}: {student.config}")


@app.command()
def push(
    student: Annotated[str, typer.Argument(help="A shipped student's name, or a path.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private, if it is made.")
    ] = False,
) -> None:
    """Upload a student to the Hugging Face hub; hf://OWNER/NAME then is its name."""
    from amalgam import hub

    _plain(hub.push(load_policy(student), repo, private=private))


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
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
        if key not in ("backends", "students"):
            shown = ", ".join(value) if isinstance(value, list) else value
            _console.print(f"{key}: {shown}", highlight=False)
    students = Table("student", "kind", "layers x units", "bytes a parameter", "what it is")
    for student in report["students"]:
        size = f"{student['layers']} x {student['units']}"
        state = f"{student['bytes_a_parameter']:g}"
        students.add_row(
            student["name"], student["kind"], size, state, escape(student["description"])
        )
    _console.print(students)
    table = Table("backend", "works", "operations", "why not")
    for status in report["backends"]:
        forward = [name for name in status["operations"] if not name.endswith("_backward")]
        table.add_row(
            status["name"],
            "yes" if status["works"] else "no",
            ", ".join(forward),
            status["reason"] or "",
        )
    _console.print(table)


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
