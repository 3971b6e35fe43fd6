"""The command line: ``amalgam train | evaluate | compare | convert | info``."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from amalgam import evaluation_commands, ops, recipes, tasks, weight_files
from amalgam.heap import keep_freed_memory
from amalgam.version import describe

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Amalgamate optimizers: teachers in, one learned optimizer out.",
)
_console = Console()


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe's name, or a path to a TOML file.")
    ],
    out: Annotated[Path | None, typer.Option(help="Run folder [default: runs/RECIPE-SEED]")] = None,
    seed: Annotated[int, typer.Option(help="Decides everything random.")] = 0,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key: strategy.unroll=20"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run stopped.")] = False,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:1 [default: the recipe's]")
    ] = None,
) -> None:
    """Meta-train a student, then compare it with its teachers, Adam and AdamW."""
    from amalgam.meta import distributed

    distributed.join()
    overrides = [*(override or []), *([f"device={device}"] if device is not None else [])]
    _train(recipe, out, seed, overrides, resume)


def _train(recipe: str, out: Path | None, seed: int, override: list[str], resume: bool) -> None:
    from amalgam.evaluation.report import between_replicates, tables_of
    from amalgam.experiment import Experiment
    from amalgam.meta import distributed

    name = Path(recipe).stem
    folder = out or Path("runs") / f"{name}-{seed}"
    chosen = distributed.by_first(lambda: recipes.load(recipe, override))
    run = Experiment(chosen, folder, name=name, seed=seed, resume=resume)
    if distributed.rank():
        run.train()
        distributed.leave()
        return
    _console.print(f"{name}: {chosen.description}\nrun folder: {folder}", highlight=False)

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
            _console.print(between_replicates(results, len(students)), highlight=False)
    kept = "student.safetensors" if len(students) == 1 else "replicate-*/student.safetensors"
    _console.print(f"student: {folder / kept}\nplots:   {folder / 'plots'}")


app.command("evaluate")(evaluation_commands.evaluate_command)
app.command("compare")(evaluation_commands.compare_command)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="An .npz, or a TensorFlow checkpoint's folder.")],
    dest: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    key: Annotated[str | None, typer.Option(help="Which student of an .npz: min-max/1")] = None,
) -> None:
    """Convert one of the paper's authors' released students into one of ours."""
    from amalgam.convert import convert as convert_student

    student = convert_student(source, dest, key=key)
    _console.print(f"{dest}: {student.config}", highlight=False)


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
        "students": list(weight_files.shipped()),
        "recipes": list(recipes.shipped()),
        "tasks": list(tasks.TASKS),
        "task families": list(tasks.FAMILIES),
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for key, value in report.items():
        if key != "backends":
            shown = ", ".join(value) if isinstance(value, list) else value
            _console.print(f"{key}: {shown}", highlight=False)
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


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def main() -> None:
    """Run the command line; show errors that the user can mend without a traceback.

    Under ``torchrun`` an error goes into its report, once, instead of from every process to the
    terminal.
    """
    keep_freed_memory()
    _find_modules_here()
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
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


def _run() -> None:
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("AMALGAM_DEBUG"):
            raise
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
