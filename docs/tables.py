"""Writes the tables and the picture of README.md and docs/ from committed rows.

python docs/tables.py          # writes what has changed
python docs/tables.py --check  # writes nothing; exit code 1 where rows give another table

In Markdown a line ``<!-- table: KIND ARGUMENT... -->`` begins a table and ``<!-- end -->`` ends it.
KIND is a key of :data:`KINDS`; the arguments are its function's, and paths are the repository's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from amalgam.evaluation import Evaluation, report, tables
from amalgam.files import whole

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- table: ([^\n]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
EVALUATION = "bench/results/evaluations/short-epyc-2-cores"


def pages() -> list[Path]:
    """The Markdown files that may hold tables."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")]
    return sorted(found)


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text, and whose others are numbers."""
    lines = [f"| {' | '.join(headings)} |", "|---|" + "---:|" * (len(headings) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _rows_of(path: str) -> Any:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def evaluation(folder: str, decay: str = "") -> str:
    """The table over all tasks of an evaluation.

    Args:
        folder: What ``amalgam evaluate --out`` wrote.
        decay: ``"constant"`` leaves out the runs whose rate falls to zero.
    """
    table = tables.over_all_tasks(report.read(ROOT / folder))
    rows = [row for row in table.rows if decay != "constant" or not row[0].endswith(", linear")]
    return _markdown(table.headings, rows)


def task(folder: str, name: str, *columns: str) -> str:
    """One task's table of an evaluation.

    Args:
        folder: What ``amalgam evaluate --out`` or ``amalgam train`` wrote.
        name: The task's.
        columns: The first words of the headings to show beside the optimizer's; all by default.
    """
    found = report.read(ROOT / folder)
    index = [about.name for about in found.tasks].index(name)
    table = report.tables_of(found)[index]
    shown = [
        at
        for at, heading in enumerate(table.headings)
        if at == 0 or not columns or heading.replace(" ", "-").startswith(columns)
    ]
    cells = [[row[at] for at in shown] for row in table.rows]
    return _markdown([table.headings[at] for at in shown], cells)


def ablations(path: str) -> str:
    """The table of ``bench/ablations.py``."""
    module = _module("bench/ablations.py")
    return str(module.table(module.read(ROOT / path))) + "\n"


def claims(path: str) -> str:
    """The table of ``bench/claims.py``."""
    return str(_module("bench/claims.py").table(ROOT / path)) + "\n"


def scaling(path: str) -> str:
    """The table of ``bench/scaling.py``."""
    return str(_module("bench/scaling.py").table(ROOT / path)) + "\n"


def weight_decay(path: str, which: str = "table") -> str:
    """A table of ``bench/weight_decay.py``: ``"table"``, or ``"table_short"``."""
    return str(getattr(_module("bench/weight_decay.py"), which)(ROOT / path)) + "\n"


def cell_dtypes(path: str) -> str:
    """The table of ``bench/cell_dtypes.py``."""
    return str(_module("bench/cell_dtypes.py").table(ROOT / path)) + "\n"


def _module(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def from_markdown(path: str) -> str:
    """The table of a Markdown file that a script wrote beside its rows."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("|")) + "\n"


def step_in_place(path: str, with_huge_pages: str) -> str:
    """The step in place of the paper's student beside PyTorch's, and the functional one.

    Args:
        path: Rows of ``bench/bench_student_step.py``.
        with_huge_pages: The same, run with ``THP_MEM_ALLOC_ENABLE=1``.
    """
    rows = []
    for name, file in (
        ("as PyTorch comes", path),
        ("where PyTorch uses huge pages", with_huge_pages),
    ):
        found = {
            (facts["operation"], facts["backend"]): facts["ns_per_coordinate"]
            for facts in (each["extra_info"] for each in _rows_of(file)["benchmarks"])
            if (facts["n"], facts["threads"]) == (2**20, 2)
        }
        slow = (f"{found['student_step_', backend]:,.0f}" for backend in ("compiled", "eager"))
        ways = (f"{found[f'student_step {way}', 'cpu']:.0f}" for way in ("forward", "backward"))
        rows.append([name, f"{found['student_step_', 'cpu']:.1f}", *slow, *ways])
    head = ["", "in place, `cpu`", "`torch.compile`", "eager PyTorch"]
    return _markdown([*head, "functional, `cpu`", "its backward, `cpu`"], rows)


def nominal_steps(path: str) -> str:
    """Steps in place of nominal students, the paper's and AdamW, with two threads."""
    names = {
        f"1 x {units}": f"nominal 1x{units}, cells float32, moments float32" for units in (4, 8, 16)
    }
    names |= {
        "1 x 8, bfloat16": "nominal 1x8, cells bfloat16, moments bfloat16",
        "2 x 20, the paper's": "RNNProp 2x20",
        "AdamW, foreach": "adamw_foreach",
        "AdamW, fused": "adamw_fused",
    }
    rows = []
    for each in _rows_of(path)["nominal"]["benchmarks"]:
        facts = each["extra_info"]
        if facts["threads"] == 2:
            least = facts["least_ns_per_coordinate"]
            rows.append(
                [
                    f"{facts['n']:,}",
                    *(
                        f"{least[key]:.2f}" if least[key] < 1 else f"{least[key]:.1f}"
                        for key in names.values()
                    ),
                ]
            )
    return _markdown(["coordinates", *names], rows)


def thousand_tensors(path: str) -> str:
    """Milliseconds of a step over a thousand small tensors, the paper's student beside AdamW.

    Args:
        path: Rows of ``bench/bench_student_step.py -k a_thousand_parameters_alternating``.
    """
    names = {
        "`AmalgamatedOptimizer`": "optimizer",
        "`AdamW(foreach=True)`": "adamw_foreach",
        "`AmalgamatedOptimizer`, all in one tensor": "optimizer_at_once",
    }
    facts = [each["extra_info"] for each in _rows_of(path)["benchmarks"]]
    rows = [
        [str(of["threads"]), *(f"{of['least_ms'][name]:.1f}" for name in names.values())]
        for of in facts
    ]
    return _markdown(["threads", *names], rows)


def model_steps(*paths: str) -> str:
    """Milliseconds of steps over well-known models' parameters on a CPU, the fastest first.

    Args:
        paths: Rows of ``bench/bench_optimizer_models.py``.
    """
    runs = [each["extra_info"] for path in paths for each in _rows_of(path)["benchmarks"]]
    first = runs[0]
    rows = []
    for name in sorted(first["least_ms"], key=first["least_ms"].__getitem__):
        times = (run["least_ms"].get(name) for run in runs)
        bytes_each = first["memory"][name]["state_bytes"] / first["parameters"]
        rows.append([name, *("" if of is None else _milliseconds(of) for of in times)])
        rows[-1].append(f"{bytes_each:.0f}")
    heads = (f"{run['model']}, threads: {run['threads']}" for run in runs)
    return _markdown(["optimizer", *heads, "bytes of state"], rows)


def gpu_step(path: str, n: str, *students: str) -> str:
    """Steps in place on a GPU, in a CUDA graph, by CUDA's kernels, and the time of Triton's.

    Args:
        path: The rows of ``bench/on_gpu.py``.
        n: How many coordinates.
        students: The sizes to show, as ``1x8``; all by default.
    """
    rows: list[list[str]] = []
    table: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in _gpu_rows(path, "speed").values():
        if row.get("n") != int(n):
            continue
        if row["operation"] == "AdamW fused":
            rows.append(["PyTorch's fused AdamW", "", "", *_speed(row), ""])
        elif row.get("kind") == "plain" and not row["configuration"] and "form" not in row:
            backend, _, permitted = row["backend"].partition(":")
            kind = row["student"], row["cells"], permitted.removeprefix("bf16,")
            table.setdefault(kind, {})[backend] = row | {"permitted": permitted}
    for (student, cells, _), by in table.items():
        if "cuda" in by and student in (students or [student]):
            permitted = by["cuda"]["permitted"]
            words = f"`{permitted}`" if permitted else "nothing: errs as float32"
            triton = _speed(by["triton"])[0] if "triton" in by else ""
            if triton and by["triton"]["permitted"] != permitted:
                triton += f", with `{by['triton']['permitted']}`"
            rows.append([student.replace("x", " x "), cells, words, *_speed(by["cuda"]), triton])
    head = ["student", "cells", "permitted", "ns a coordinate", "share of a copy"]
    return _markdown([*head, "Triton's kernel, ns"], rows)


def _speed(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['ns_per_coordinate']:.3f}", f"{row['share_of_copy']:.0%}"


def _gpu_rows(path: str, phase: str) -> dict[str, dict[str, Any]]:
    """The rows of a phase of ``bench/on_gpu.py`` that have a figure, by their cases."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row.get("phase") == phase]
    return {row["case"]: row for row in rows if "operation" in row}


def gpu_nominal(path: str) -> str:
    """Steps in place of the nominal form on a GPU, in a CUDA graph, by CUDA's and Triton's kernels.

    Args:
        path: The rows of ``bench/on_gpu.py``.
    """
    table: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in _gpu_rows(path, "speed").values():
        if row.get("form") != "nominal" or "kind" not in row or row["configuration"]:
            continue
        backend, _, permitted = row["backend"].partition(":")
        permitted = permitted.removeprefix("bf16,")
        words = [f"`{permitted}`"] if permitted else ["nothing"]
        words += ["rounded at random"] if row["kind"] == "stochastic" else []
        kind = row["student"].replace("x", " x "), row["cells"], ", ".join(words)
        table.setdefault(kind, {})[backend] = row
    rows = [
        [
            *kind,
            *(f"{by[backend]['ns_per_coordinate']:.4f}" for backend in ("cuda", "triton")),
            *(f"{by[backend]['share_of_copy']:.0%}" for backend in ("cuda", "triton")),
        ]
        for kind, by in table.items()
        if len(by) == 2
    ]
    head = ["student", "cells and moments", "permitted", "CUDA's, ns", "Triton's, ns"]
    return _markdown([*head, "CUDA's share", "Triton's share"], rows)


def gpu_functional(path: str) -> str:
    """What meta-training takes of small students on a GPU, by CUDA's and Triton's kernels.

    Args:
        path: The rows of ``bench/on_gpu.py``.
    """
    table: dict[tuple[str, str], dict[str, float]] = {}
    for row in _gpu_rows(path, "speed").values():
        name, backend = row["operation"], row.get("backend")
        if backend not in ("cuda", "triton") or row.get("kind") or row.get("configuration"):
            continue
        if name.startswith("choice") and row["student"] != "2x20":
            what = f"`{name}`, {row['teachers']} teachers"
        elif row.get("form") == "nominal":
            what = f"`{name}`"
        else:
            continue
        student = row["student"].replace("x", " x ")
        of_steps = row.get("steps", 1)
        table.setdefault((what, student), {})[backend] = (
            row.get("graph_us", row["us"]) * 1e3 / row["n"] / of_steps
        )
    rows = [[*what, f"{by['cuda']:.3f}", f"{by['triton']:.3f}"] for what, by in table.items()]
    return _markdown(["operation", "student", "CUDA's, ns", "Triton's, ns"], rows)


def gpu_windows(before: str, alone: str, after: str) -> str:
    """Milliseconds of an inner step of meta-training on a GPU, without graphs, with, and on a CPU.

    Args:
        before: The rows of a run without graphs, and of that machine's processor.
        alone: The rows of a run with graphs, in which each replicate steps alone.
        after: The rows of a run with graphs, in which they step together.
    """
    old, rows = _gpu_rows(before, "windows"), []
    graphs = [_gpu_rows(path, "windows") for path in (alone, after)]
    for case in {**graphs[0], **graphs[1]}:
        found = [of.get(case) for of in graphs]
        row = found[1] or found[0]
        assert row is not None
        if not row["graph"] or row["obstacle"]:
            continue
        label = case.removesuffix(" in a graph")
        times = [old.get(label), *found, old.get(label.replace(" cuda", " cpu"))]
        kernels = [f"{of['kernels_per_step']:,.0f}" if of else "" for of in found]
        name = {"million": "a million coordinates", "cnn": "the paper's CNN"}.get(row["task"])
        name = row["task"] if name is None else f"{name}, T = {row['steps']}"
        name += {True: ", as one", False: ", one by one", None: ""}[row.get("stack")]
        name += ", bfloat16" if row.get("autocast") else ""
        order = {1: "first", 2: "second"}[row["order"]]
        first, *both, cpu = (f"{of['ms_per_step']:.3g}" if of else "" for of in times)
        rows.append([name, str(row["replicates"]), order, first, *both, *kernels, cpu])
    head = ["task", "replicates", "order", "no graph, ms", "each alone, ms", "together, ms"]
    return _markdown([*head, "kernels alone", "together", "16 CPU cores, ms"], rows)


def gpu_models(path: str) -> str:
    """A training step of a GPT on a GPU, with the optimizer's.

    Args:
        path: The rows of ``bench/on_gpu.py``.
    """
    table: dict[str, dict[bool, dict[str, Any]]] = {}
    for row in _gpu_rows(path, "model").values():
        if "graph" in row:
            table.setdefault(row["optimizer"], {})[row["graph"]] = row
    rows = [
        [name, *(f"{by[graph]['us'] / 1e3:.1f}" for graph in (False, True))]
        for name, by in table.items()
    ]
    return _markdown(["optimizer", "eager, ms", "in a CUDA graph, ms"], rows)


def gpu_steps(path: str) -> str:
    """Steps alone on well-known models' parameters on a GPU, and the bytes of their state.

    Args:
        path: The rows of ``bench/on_gpu.py``.
    """
    table: dict[str, list[Any]] = {}
    names: list[str] = []
    for row in _gpu_rows(path, "model").values():
        if "state_bytes" not in row:
            continue
        model = row["operation"].removeprefix("step of ")
        names += [model] if model not in names else []
        cells = table.setdefault(row["optimizer"], [])
        cells += [f"{row['us'] / 1e3:.1f}", f"{row['graph_us'] / 1e3:.1f}"]
        cells.append(f"{row['state_bytes'] / row['parameters']:.0f}")
    of_each = ("ms", "in a graph", "bytes of state")
    head = [f"{model}: {what}" if what == "ms" else what for model in names for what in of_each]
    return _markdown(["optimizer", *head], [[name, *cells] for name, cells in table.items()])


def gpt_training(*paths: str) -> str:
    """Losses of files held out after a GPT's training, one column a seed.

    Args:
        *paths: The rows of ``bench/on_gpu.py``, or of ``bench/gpt.py``; of a training in several
            the first one's counts. ``PATH:NAME,NAME`` takes the rows of these optimizers alone.
    """
    table: dict[tuple[str, str, str], dict[int, float]] = {}
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        path, _, names = path.partition(":")
        for case, row in _gpu_rows(path, "training").items():
            if not names or row["optimizer"] in names.split(","):
                found.setdefault(case, row)
    for row in found.values():
        size = f"{row['parameters'] / 1e6:.1f} million, {row['steps']} steps"
        name = f"{row['optimizer']}, lr={row['lr']:g}"
        last = row["held_out_losses"][str(row["steps"])]
        table.setdefault((size, name, row["decay"]), {})[row["seed"]] = last
    seeds = sorted({seed for by in table.values() for seed in by})
    rows = [
        [*what, *(f"{by[seed]:.3f}" if seed in by else "" for seed in seeds)]
        for what, by in sorted(table.items(), key=lambda item: (item[0][0], min(item[1].values())))
    ]
    return _markdown(["GPT", "optimizer", "rate", *(f"seed {seed}" for seed in seeds)], rows)


def unroll_memory(path: str) -> str:
    """Bytes that windows of the MLP keep, and milliseconds a step."""
    cases: dict[str, dict[str, Any]] = {
        "eager": {"engine": "eager"},
        "all kept": {},
        "`budget` of 40, 100, 220 MB": {"budget": ("40MB", "100MB", "220MB")},
        "`budget` of 60 MB": {"budget": ("60MB",), "cells": None},
        "first order": {"order": 1},
    }
    rows = []
    for name, asked in cases.items():
        found = {
            row["steps"]: row
            for row in _rows_of(path)["rows"]
            if row["task"] == "mlp" and not row["keep_freed_memory"] and _is(row, asked)
        }
        cells = [
            f"{found[steps]['bytes_per_coordinate_and_step']:,.0f} "
            f"({found[steps]['grown_bytes_per_coordinate_and_step']:,.0f})"
            if steps in found
            else ""
            for steps in (20, 100, 500)
        ]
        rows.append([name, *cells, f"{found[100]['milliseconds_per_step']:.1f}"])
    headings = ["MLP 784-20-10, 15,910 coordinates", "T = 20", "T = 100", "T = 500"]
    return _markdown([*headings, "ms per step at T = 100"], rows)


def _is(row: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether a row has the settings asked for, and no others that change what is kept."""
    for key in ("engine", "budget", "order", "cells"):
        wanted = asked.get(key)
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if row.get(key) not in allowed:
            return False
    return True


def unroll_time(path: str) -> str:
    """Milliseconds a step, where freed memory is kept."""
    found = {
        (row["task"], row.get("engine"), row.get("replicates")): row["milliseconds_per_step"]
        for row in _rows_of(path)["rows"]
        if row["keep_freed_memory"]
    }
    rows = []
    for name, of in (
        ("that MLP, T = 100", "mlp"),
        ("MLP of 1,000,915 coordinates, T = 5", "million"),
        ("the paper's CNN, 18,122 coordinates, T = 20", "cnn"),
    ):
        each = (found[of, engine, None] for engine in ("ours", "eager", "floor"))
        rows.append([name, *map(_milliseconds, each)])
    return _markdown(
        ["ms per step, freed memory kept", "ours", "eager", "the optimizees' own passes"], rows
    )


def unroll_replicates(path: str) -> str:
    """Milliseconds a step of one replicate and of eight: the least, middle and most of the runs."""
    found: dict[tuple[str, int, Any], list[float]] = {}
    for row in _rows_of(path)["rows"]:
        key = row["task"], row["replicates"], row.get("stack")
        found.setdefault(key, []).append(row["milliseconds_per_step"])
    rows = []
    for name, task in (("digits MLP", "digits-mlp"), ("digits CNN", "digits-cnn")):
        one, together, apart = (found[task, *how] for how in ((1, None), (8, None), (8, False)))
        times = [statistics.median(each) for each in (together, one)]
        cells = [" / ".join(map(_milliseconds, sorted(each))) for each in (one, together, apart)]
        rows.append([name, *cells, f"{times[0] / times[1]:.1f}"])
    return _markdown(
        ["ms per step", "one", "eight as one", "eight one after another", "eight as one / one"],
        rows,
    )


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def schemes(folder: str) -> str:
    """Final losses task by task: of some alone, and of groups of replicates the best and the mean.

    Replicates are named by their group and a number, as ``mean-1``.

    Args:
        folder: What an evaluation wrote.
    """
    found = report.read(ROOT / folder)
    losses: dict[str, dict[str, list[float]]] = {}
    for of in found.at(found.horizon):
        for result in of:
            group = re.sub(r"-\d+$", "", result.name)
            of_tasks = losses.setdefault(group, {})
            of_tasks.setdefault(result.task, []).append(result.summary("final")[0])
    rows = []
    for group, of_tasks in losses.items():
        each = list(of_tasks.values())
        count = len(each[0])
        if count == 1:
            rows.append([group, *(f"{of[0]:.3f}" for of in each)])
            continue
        rows.append([f"{group}, best of {count}", *(f"{min(of):.3f}" for of in each)])
        rows.append([f"{group}, mean", *(f"{sum(of) / count:.3f}" for of in each)])
    return _markdown(["optimizer", *(about.name for about in found.tasks)], rows)


KINDS: dict[str, Callable[..., str]] = {
    "evaluation": evaluation,
    "schemes": schemes,
    "task": task,
    "ablations": ablations,
    "cell-dtypes": cell_dtypes,
    "claims": claims,
    "scaling": scaling,
    "weight-decay": weight_decay,
    "from-markdown": from_markdown,
    "step-in-place": step_in_place,
    "thousand-tensors": thousand_tensors,
    "model-steps": model_steps,
    "nominal-steps": nominal_steps,
    "gpu-functional": gpu_functional,
    "gpu-models": gpu_models,
    "gpu-nominal": gpu_nominal,
    "gpu-step": gpu_step,
    "gpu-steps": gpu_steps,
    "gpt-training": gpt_training,
    "gpu-windows": gpu_windows,
    "unroll-memory": unroll_memory,
    "unroll-time": unroll_time,
    "unroll-replicates": unroll_replicates,
}
"""What a table may be made by."""


def written(text: str) -> str:
    """A page with every table as its rows give it."""

    def table(match: re.Match[str]) -> str:
        begin, asked, _, end = match.groups()
        kind, *arguments = asked.split()
        return f"{begin}\n{KINDS[kind](*arguments)}\n{end}"

    return MARKED.sub(table, text)


def compared(found: Evaluation) -> list[tuple[str, str]]:
    """What the picture shows: optimizers at constant rates and their losses, the worst first."""
    table = tables.over_all_tasks(found)
    at = 1 + found.horizon
    shown = [(row[0], row[at]) for row in table.rows if not row[0].endswith(", linear")]
    return sorted(shown, key=lambda row: float(row[1].split()[0]), reverse=True)


def described(folder: str = EVALUATION) -> str:
    """The picture's numbers as text, which its file carries."""
    return "\n".join(" ".join(row) for row in compared(report.read(ROOT / folder)))


def picture(folder: str = EVALUATION) -> Figure:
    """Every optimizer's loss over tuned Adam's, over all tasks, with its interval.

    Args:
        folder: What ``amalgam evaluate --out`` wrote.
    """
    found = report.read(ROOT / folder)
    shown = compared(found)
    students = {one.name for one in found.results[0][0] if one.kind == "student"}
    figure = Figure(figsize=(8, 3.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for place, row in enumerate(shown):
        value, low, high = (float(number) for number in re.findall(r"[\d.]+", row[1]))
        colour = "#3b6fd4" if row[0] in students else "#7d8794"
        ax.plot([low, high], [place, place], color=colour, lw=5, alpha=0.35, solid_capstyle="butt")
        ax.plot(value, place, "o", color=colour, ms=7)
    ax.set_yticks(range(len(shown)), [row[0] for row in shown])
    for label, row in zip(ax.get_yticklabels(), shown, strict=True):
        if row[0] in students:
            label.set(color="#3b6fd4", fontweight="bold")
    ax.axvline(1, color="black", lw=0.8, ls=":")
    ax.set_xlabel(
        f"validation loss after {found.protocol.horizon} steps over tuned Adam's; less is better"
    )
    ax.set_title(
        f"Constant rates; students untuned, others tuned: {len(found.tasks)} tasks, "
        f"{found.protocol.seeds} seeds",
        fontsize=11,
    )
    ax.grid(axis="x", alpha=0.25)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return figure


def main() -> int:
    """Write the pages whose tables have changed, and the picture, or say which would change."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = written(text)
        if new == text:
            continue
        stale += 1
        print(f"{page.relative_to(ROOT)}: {'rows give other tables' if check else 'written'}")
        if not check:
            with whole(page) as beside:
                beside.write_text(new, encoding="utf-8")
    if not check:
        with whole(ROOT / "docs" / "optimizers.png") as beside:
            metadata = {"Description": described()}
            picture().savefig(beside, dpi=120, format="png", metadata=metadata)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
