"""Many training runs: from the cache where they are there, else spread over processes.

The processes of ``torchrun`` share the runs, and each of them may start processes of its own. A run
takes one thread of a CPU, and so the same bits however many run side by side. On a GPU runs of one
task are rows of one (:mod:`amalgam.evaluation.rows`).
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch

from amalgam import distributed, tasks
from amalgam.evaluation.cache import VERSION, RunCache, fingerprint
from amalgam.evaluation.contenders import Contender
from amalgam.evaluation.rows import Row, most_rows, obstacle, seconds_a_step, train_rows
from amalgam.evaluation.runs import Curve, Readings, train
from amalgam.heap import keep_freed_memory
from amalgam.ranges import several_of
from amalgam.seeding import generator_for
from amalgam.tasks import Task


@dataclass(frozen=True)
class NamedTask:
    """A task by name, which any process can make.

    Attributes:
        name: As :func:`amalgam.tasks.load` takes it.
        arguments: Arguments of the task's function, ``batch_size`` among them; what is not there is
            as the function has it.
    """

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def load(self, device: str | torch.device) -> Task:
        """The task on a device.

        Raises:
            ValueError: There is no such task, or it does not take the arguments.
        """
        return _task(self, str(device))


# Runs come task by task, and data may be large.
@functools.lru_cache(maxsize=1)
def _task(named: NamedTask, device: str) -> Task:
    return tasks.load(named.name, arguments=dict(named.arguments)).to(device)


class Run(NamedTuple):
    """A run to make.

    Attributes:
        task: The task's index in the runner.
        contender: The optimizer.
        seed: Seed of all that is random.
        steps: Steps to take.
        readings: What to read.
        timed: Whether anybody asks what a step took.
    """

    task: int
    contender: Contender
    seed: int
    steps: int
    readings: Readings
    timed: bool = True


@dataclass(frozen=True)
class About:
    """What is known of a task without its data.

    Attributes:
        name: Its name.
        parameters: How many its network has.
        batch_size: Samples a step.
        epoch: Steps of an epoch.
        data: Sizes and digest of its data.
        fingerprint: What decides a run's numbers.
        stand_in: Whether its data stand in for a published set.
        seconds: Seconds that a gradient took when it was looked at.
    """

    name: str
    parameters: int
    batch_size: int
    epoch: int
    data: str
    fingerprint: str
    stand_in: bool
    seconds: float = field(compare=False)


def look_at(task: Task) -> About:
    """Describe a task, and take the time of a gradient.

    Args:
        task: The task, on the device to train on.
    """
    module = task.init_module(generator_for(0, "cost"))
    batches = task.batches(generator_for(0, "cost"), 4)
    times = []
    for index in range(4):
        began = time.perf_counter()
        task.backward(module, batches[index], generator_for(0, "cost"))
        times.append(time.perf_counter() - began)
        module.zero_grad()
    return About(
        task.name,
        task.layout.numel,
        task.batch_size,
        len(task.train[0]) // task.batch_size,
        task.describe(),
        fingerprint(task),
        task.stand_in,
        min(times[1:]),
    )


class Progress(NamedTuple):
    """How far a runner is.

    Attributes:
        done: Seconds that what is done was expected to take.
        made: Likewise, without what was in the cache.
        total: Likewise, of all that was announced.
        what: What was finished last.
        runs: How many runs are finished.
        cached: How many of them were in the cache.
    """

    done: float
    made: float
    total: float
    what: str
    runs: int
    cached: int


class Runner:
    """Makes runs; a context manager, at whose end its processes end.

    Args:
        tasks: The tasks, by name or made. Made ones are run in this process.
        cache: Where runs are kept; ``None`` to keep none.
        jobs: How many processes run side by side; 1 for this one alone.
        device: Where to train, as :func:`amalgam.device.resolve` gives it.
        report: Called after each run.
        rows: Whether runs of one task go side by side, as rows of one, where they can: their bits
            are others than those of each alone. Where ``None``, on a GPU with one job.

    Attributes:
        about: What is known of each task.
        total: Seconds that all runs are expected to take, for the reports; whoever knows of runs to
            come adds :meth:`cost` of them.

    Raises:
        TypeError: What is given is no task.
        ValueError: There is no task, or several jobs are not to be had with these.
    """

    def __init__(
        self,
        tasks: NamedTask | Task | Sequence[NamedTask | Task],
        *,
        cache: RunCache | None = None,
        jobs: int = 1,
        device: torch.device | str = "cpu",
        report: Callable[[Progress], None] = lambda progress: None,
        rows: bool | None = None,
    ) -> None:
        words = "a NamedTask, such as NamedTask('digits-mlp'), or a Task"
        self._tasks = tuple(several_of("tasks", tasks, NamedTask | Task, words))
        if not self._tasks:
            raise ValueError("tasks must be one or more, such as NamedTask('digits-mlp'), not none")
        if rows and jobs > 1:
            raise ValueError(f"jobs must be 1 where runs go side by side as rows, not {jobs}")
        if jobs > 1 and any(isinstance(task, Task) for task in self._tasks):
            raise ValueError(f"jobs must be 1 for tasks that are made already, not {jobs}")
        self._cache = cache
        self._jobs = jobs
        self._device = torch.device(device)
        self._report = report
        self._executor: ProcessPoolExecutor | None = None
        self._others = multiprocessing.active_children()
        self._done, self._saved, self._runs, self._cached = 0.0, 0.0, 0, 0
        self.total = 0.0
        rows = self._device.type == "cuda" and jobs == 1 if rows is None else rows
        about, most = [], []
        for task in self._tasks:
            made = _task_of(task, self._device)
            about.append(look_at(made))
            most.append(most_rows(made) if rows and obstacle(made) is None else 1)
        self.about, self._most = tuple(about), most

    def __enter__(self) -> Runner:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the processes, and what they run."""
        if self._executor is not None:
            self._executor.shutdown(wait=not any(error), cancel_futures=True)
            self._executor = None
            for process in multiprocessing.active_children():
                if process not in self._others:
                    process.terminate()

    def cost(self, task: int, steps: int) -> float:
        """Seconds that so many steps are expected to take, optimizer and readings not counted.

        Args:
            task: The task's index.
            steps: How many.
        """
        return self.about[task].seconds * steps

    def run(self, runs: Sequence[Run]) -> list[Curve]:
        """Make runs; every process of ``torchrun`` calls this with the same ones.

        Args:
            runs: What to run; those of one task together are the fastest.

        Returns:
            Each run's curve, in their order.
        """
        curves: dict[int, Curve] = {}
        missing: list[list[tuple[int, Run]]] = []
        # Contenders may share runs, as AdamW does where its best setting is everyone's.
        first_of = {self._name(index, run): index for index, run in reversed([*enumerate(runs)])}
        # Processes are to agree, whatever memory each has.
        self._most = [min(each) for each in zip(*distributed.from_all(self._most), strict=True)]
        groups = self._groups(runs, sorted(first_of.values()))
        for group in groups[distributed.rank() :: distributed.world()]:
            for index in group:
                found = self._kept(runs[index])
                if found is not None:
                    curves[index] = found
                    self._finished(runs[index], cached=True)
            if not curves.keys() >= set(group):
                missing.append([(index, runs[index]) for index in group])
        for index, run, curve in self._made(missing):
            if index in curves:  # beside it another was missing
                continue
            curves[index] = curve
            if self._cache is not None and run.contender.identity is not None:
                self._cache.put(self._key(run), curve)
            self._finished(run, cached=False)
        everywhere = dict(ChainMap(*distributed.from_all(curves)))
        ordered = []
        for index, run in enumerate(runs):
            first = first_of[self._name(index, run)]
            ordered.append(everywhere[first])
            if first != index and index % distributed.world() == distributed.rank():
                self._finished(run, cached=False)
        return ordered

    def _in_rows(self, run: Run) -> bool:
        """Whether a run goes side by side with others."""
        return self._most[run.task] > 1 and not run.contender.draws

    def _groups(self, runs: Sequence[Run], indices: Sequence[int]) -> list[list[int]]:
        """Which runs go side by side, so that every process has a share of them.

        A run's last bits depend on how many those are. So what is cached does not matter: a call
        that was stopped goes on to the same bits.
        """
        alike: dict[tuple[int, int, Readings], list[int]] = {}
        groups: list[list[int]] = []
        for index in indices:
            run = runs[index]
            if self._in_rows(run):
                alike.setdefault((run.task, run.steps, run.readings), []).append(index)
            else:
                groups.append([index])
        for (task, _, _), of_kind in alike.items():
            most = min(self._most[task], -(-len(of_kind) // distributed.world()))
            groups += [of_kind[at : at + most] for at in range(0, len(of_kind), most)]
        return sorted(groups)

    def _made(self, groups: Sequence[list[tuple[int, Run]]]) -> Iterator[tuple[int, Run, Curve]]:
        """Each run with its curve, as they end."""
        if self._jobs == 1:
            for group in groups:
                _, first = group[0]
                task = self._tasks[first.task]
                if self._in_rows(first):
                    found = _run_rows(task, [run for _, run in group], self._device)
                else:
                    found = [_run(task, first, self._device)]
                for (index, run), curve in zip(group, found, strict=True):
                    yield index, run, curve
            return
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                self._jobs, multiprocessing.get_context("spawn"), initializer=_begin
            )
        waiting: dict[Future[Curve], tuple[int, Run]] = {}
        for ((index, run),) in groups:
            future = self._executor.submit(_run, self._tasks[run.task], run, self._device)
            waiting[future] = (index, run)
        for future in as_completed(waiting):
            index, run = waiting[future]
            yield index, run, future.result()

    def _kept(self, run: Run) -> Curve | None:
        if self._cache is None or run.contender.identity is None:
            return None
        found = self._cache.get(self._key(run))
        # A run that nobody timed may be asked for by somebody who does.
        unknown = found is not None and math.isnan(found.seconds)
        return None if unknown and run.timed and self._in_rows(run) else found

    def _key(self, run: Run) -> Mapping[str, Any]:
        return {
            "version": VERSION,
            "task": self.about[run.task].fingerprint,
            "optimizer": run.contender.identity,
            "decay": run.contender.decay,
            "seed": run.seed,
            "steps": run.steps,
            "readings": asdict(run.readings),
            "device": self._device.type,
            "torch": torch.__version__,
            **({"rows": True} if self._in_rows(run) else {}),
        }

    def _name(self, index: int, run: Run) -> str:
        """What tells a run from all others of a call."""
        return str(index) if run.contender.identity is None else json.dumps(self._key(run))

    def _finished(self, run: Run, *, cached: bool) -> None:
        # Each process sees its own share, and knows no more of the others'.
        cost = self.cost(run.task, run.steps) * distributed.world()
        self._done += cost
        self._saved += cost if cached else 0.0
        self._runs += 1
        self._cached += cached
        self._report(
            Progress(
                min(self._done, self.total),
                self._done - self._saved,
                self.total,
                f"{self.about[run.task].name}: {run.contender.name}",
                self._runs,
                self._cached,
            )
        )


def _task_of(task: NamedTask | Task, device: torch.device) -> Task:
    return task if isinstance(task, Task) else task.load(device)


def _run(task: NamedTask | Task, run: Run, device: torch.device) -> Curve:
    with _one_thread():
        try:
            return train(
                _task_of(task, device),
                run.contender.make,
                steps=run.steps,
                seed=run.seed,
                readings=run.readings,
                decay=run.contender.decay,
            )
        except Exception as error:
            error.add_note(f"in a run of {run.contender.name}, seed {run.seed}, {run.steps} steps")
            raise


def _run_rows(task: NamedTask | Task, runs: Sequence[Run], device: torch.device) -> list[Curve]:
    made = _task_of(task, device)
    timed = {run.contender.name: run.contender.make for run in runs if run.timed}
    with _one_thread():
        times = {name: seconds_a_step(made, make) for name, make in timed.items()}
        curves = _curves(made, runs)
    return [
        replace(curve, seconds=times.get(run.contender.name, math.nan))
        for run, curve in zip(runs, curves, strict=True)
    ]


def _curves(task: Task, runs: Sequence[Run]) -> list[Curve]:
    """All runs side by side, or, where there is no memory for that, a half after the other."""
    rows = [
        Row(run.contender.make, run.seed, run.contender.decay, run.contender.name) for run in runs
    ]
    try:
        return train_rows(task, rows, steps=runs[0].steps, readings=runs[0].readings)
    except torch.OutOfMemoryError:
        if len(runs) == 1:
            raise
    half = len(runs) // 2
    return [*_curves(task, runs[:half]), *_curves(task, runs[half:])]


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    if threads != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads != 1:
            torch.set_num_threads(threads)


def _begin() -> None:
    """Prepare a process that makes runs."""
    keep_freed_memory()
    torch.set_num_threads(1)
    # Ctrl-C goes to all processes of a terminal; the one that started this one tells of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, killed ones included."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
