"""One unroll, run in a process of its own, so that what the process held at its peak can be told.

python bench/unrolls.py '{"task": "mlp", "steps": 100, "order": 2, "budget": "60MB"}'

Prints a line of JSON: seconds of a window's forward and backward; bytes held at the peak beyond
those held before, per coordinate and step, and likewise what the window's steps took beyond those
of a window of two: not the optimizees' own passes and what else does not grow. ``engine`` is
``eager`` for plain autograd through the reference, ``ours``, or ``floor`` for the optimizees' own
passes alone. ``python bench/unrolls.py all FILE`` runs every case below, one after the other, and
writes FILE; ``replicates`` in the place of ``all``, what tells the cost of replicates, three times
in turn. With ``keep_freed_memory``, as on the command line of the package, for all engines.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch
from harness import forget_peak, memory
from torch import Tensor, nn

from amalgam.backends import build_info
from amalgam.heap import keep_freed_memory
from amalgam.meta import Amalgamation, Memory, Trajectories, Unroll
from amalgam.meta.reference import window as eager_window
from amalgam.meta.window import WindowInputs
from amalgam.policies import Pool, Student
from amalgam.seeding import generator_for
from amalgam.tasks import Task, load
from amalgam.tasks.networks import glorot
from amalgam.tasks.task import Batches
from amalgam.version import describe

POOL = Pool(["adam", "rmsprop"])


def mlp() -> nn.Module:
    return glorot(nn.Sequential(nn.Linear(784, 20), nn.Sigmoid(), nn.Linear(20, 10)))


def cnn() -> nn.Module:
    """The paper's optimizee, 18,122 parameters."""
    return glorot(
        nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 16, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
    )


def million() -> nn.Module:
    return glorot(nn.Sequential(nn.Linear(784, 1259), nn.Sigmoid(), nn.Linear(1259, 10)))


def ten_million() -> nn.Module:
    return glorot(nn.Sequential(nn.Linear(784, 12580), nn.Sigmoid(), nn.Linear(12580, 10)))


BUILDERS = {"mlp": mlp, "cnn": cnn, "million": million, "ten-million": ten_million}


def task_of(name: str) -> Task:
    """A task on noise at MNIST's size, or one of the package's by its name."""
    if name not in BUILDERS:
        return load(name)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(4096, 784, generator=generator), torch.randint(10, (4096,))
    return Task(name, BUILDERS[name], (x, y), (x[:128], y[:128]))


class Case:
    """One window of one engine.

    Args:
        task: Its task's name.
        steps: Steps of the window.
        engine: See the module.
        order: Of the meta-gradient.
        replicates: Students side by side.
        budget: For points and graphs.
        segment: By hand instead.
        cells: Dtype of kept cells.
        pool: Whether there are teachers.
        device: Where.
        backend: Of ``ours``.
        graph: Whether ``ours`` runs as a CUDA graph, after some runs without.
        stack: As :class:`amalgam.meta.Amalgamation` has it.
        autocast: Likewise.
        fast: As :class:`amalgam.tasks.Task` has ``fast_convolutions``; ``None`` leaves the task's.
    """

    def __init__(
        self,
        task: str,
        steps: int,
        engine: str = "ours",
        order: int = 2,
        replicates: int = 1,
        budget: str | None = None,
        segment: int | None = None,
        cells: str = "float32",
        pool: bool = True,
        device: str = "cpu",
        backend: str = "auto",
        graph: bool = True,
        stack: bool | None = None,
        autocast: Literal["bfloat16"] | None = None,
        fast: bool | None = None,
    ) -> None:
        self.task, self.steps, self.engine = task_of(task).to(device), steps, engine
        if fast is not None:
            self.task.fast_convolutions = fast
        self.students = [
            Student(generator=torch.Generator().manual_seed(seed)).to(device)
            for seed in range(replicates)
        ]
        backend = "reference" if engine == "eager" else backend
        self.how = Amalgamation(
            second_order=order == 2,
            scale_spread=1.0,
            backend=backend,
            cuda_graph=graph,
            stack=stack,
            autocast=autocast,
        )
        self.unroll = Unroll(
            self.task,
            self.students,
            POOL if pool else Pool([]),
            self.how,
            memory=Memory(budget, segment, cells),
        )
        self.gradient: list[list[Tensor]] | None = None
        self.begin = self.unroll.begin(
            *(generator_for(row, "episode") for row in range(replicates))
        )
        self.batches = Batches.stack(
            [self.task.batches(generator_for(row, "batches"), steps) for row in range(replicates)]
        )
        self.coordinates = replicates * self.task.layout.numel

    def run(self) -> None:
        {"ours": self.ours, "eager": self.eager, "floor": self.floor}[self.engine]()

    def ours(self) -> None:
        given = WindowInputs(
            self.begin, self.batches, [student.weights() for student in self.students]
        )
        _, _, self.gradient = self.unroll.meta_gradient(given, (1.0, 0.1))

    def eager(self) -> None:
        total: Any = 0
        batches = [self.batches[t] for t in range(self.steps)]
        for row, student in enumerate(self.students):
            weights = [student.weights()] * self.steps
            meta, imitation, _ = eager_window(
                self.task, student, self.unroll.pool, self.how, self.begin, batches, weights, row
            )
            total = total + meta + 0.1 * imitation
        weights = [w for student in self.students for w in student.weights()]
        found = torch.autograd.grad(total, weights)
        each = len(found) // len(self.students)
        self.gradient = [list(found[at : at + each]) for at in range(0, len(found), each)]

    def floor(self) -> None:
        """The passes that no engine can spare: gradients for all, a Hessian product a step."""
        begin: Trajectories = self.begin
        params = begin.params[:, None]
        teachers = begin.teacher_params.transpose(0, 1)
        second = self.how.second_order
        for t in range(self.steps):
            batch = self.batches[t]
            _, grads, kept = self.unroll.gradients(params, begin.scale, batch, graph=second)
            if kept is not None:
                leaf, slopes = kept
                torch.autograd.grad(slopes, leaf, grads)
            self.unroll.gradients(teachers, begin.scale, batch)


def peak_of(case: Case, rounds: int) -> tuple[float, int]:
    """The fastest round's seconds, and bytes held at the peak of all beyond those held before."""
    gc.collect()
    # glibc would take the peak out of what it holds free, unseen.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = memory("VmRSS")
    forget_peak()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        case.run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), memory("VmHWM") - before


ENGINES = ("ours", "eager", "floor")
REPLICATES: list[dict[str, Any]] = [
    {"task": task, "steps": 20, "rounds": 5, "keep_freed_memory": True, **how}
    for task in ("digits-mlp", "digits-cnn")
    for how in ({"replicates": 1}, {"replicates": 8}, {"replicates": 8, "stack": False})
]
CASES: list[dict[str, Any]] = [
    # Memory.
    *({"task": "mlp", "steps": steps, "order": 1} for steps in (20, 100, 500)),
    *(
        {"task": "mlp", "steps": steps, "budget": budget}
        for steps, budget in ((20, "40MB"), (100, "60MB"), (100, "100MB"), (500, "220MB"))
    ),
    {"task": "mlp", "steps": 100, "budget": "60MB", "cells": "bfloat16"},
    *({"task": "mlp", "steps": steps} for steps in (20, 100, 500)),
    *({"task": "mlp", "steps": steps, "engine": "eager"} for steps in (20, 100)),
    {"task": "ten-million", "steps": 20, "order": 1},
    {"task": "ten-million", "steps": 5, "budget": "14GB"},
    # Time.
    *(
        {"task": task, "steps": steps, "engine": engine, "rounds": 3, "keep_freed_memory": True}
        for task, steps in (("mlp", 100), ("million", 5), ("cnn", 20))
        for engine in ENGINES
    ),
    *REPLICATES,
]


def run_all(cases: list[dict[str, Any]], path: Path) -> None:
    """Every case in a process of its own, and what they gave in one file."""
    rows = []
    for case in cases:
        command = [sys.executable, __file__, json.dumps(case)]
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        print(line, end="", flush=True)
        rows.append(json.loads(line))
    about = {"torch": torch.__version__, "amalgam": build_info(), **describe()}
    about |= {"processor": processor(), "threads": 2}
    path.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


def processor() -> str:
    """What Linux calls it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    several = {"all": CASES, "replicates": 3 * REPLICATES}
    if sys.argv[1] in several:
        run_all(several[sys.argv[1]], Path(sys.argv[2]))
        return
    asked = json.loads(sys.argv[1])
    threads, rounds = asked.pop("threads", 2), asked.pop("rounds", 1)
    torch.set_num_threads(threads)
    keeps = asked.pop("keep_freed_memory", False)
    if keeps:
        keep_freed_memory()
    short = {**asked, "steps": 2}
    peak_of(Case(**short), 1)  # loads and compiles what is loaded and compiled once
    few = peak_of(Case(**short), 1)
    case = Case(**asked)
    seconds, peak = peak_of(case, rounds)
    grown = peak - few[1]
    steps = case.coordinates * case.steps
    print(
        json.dumps(
            {
                **asked,
                "threads": threads,
                "keep_freed_memory": keeps,
                "coordinates": case.coordinates,
                "seconds": seconds,
                "milliseconds_per_step": 1e3 * seconds / case.steps,
                "ns_per_coordinate_and_step": 1e9 * seconds / steps,
                "peak_bytes": peak,
                "bytes_per_coordinate_and_step": peak / steps,
                "grown_bytes_per_coordinate_and_step": grown
                / (case.coordinates * (case.steps - 2)),
            }
        )
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
