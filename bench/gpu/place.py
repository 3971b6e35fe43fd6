"""Where a phase runs, how it times a call, and the file its rows go to.

A phase is a script of named cases. ``run_cases`` runs those that have no row yet, appends a row of
JSON for each as soon as it is there, and goes on after a case that failed. Where there is no GPU, a
stand-in (tests/compile_only.py) compiles what a GPU would be given, or only notes it, and launches
nothing: it shows that every case runs, and what it is given to compile.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import functools
import importlib.util
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SMALL = 4096  # coordinates of a case on the stand-in; a multiple of 16, as large sizes are
COPIED = 1 << 31  # bytes of the copy that others are a share of
ROUND_SECONDS = 0.12
LOST = 3  # exit status: the GPU refuses all further work of this process

Row = dict[str, Any]
Case = Callable[[], Row]


class Place:
    """A GPU, or a stand-in for one.

    Args:
        phase: Whose rows these are.
        rows: The file they are appended to.
        stand_in: ``None`` on a GPU; ``"compile"`` or ``"keys"`` where there is none, to compile
            what a GPU would be given, or only to note it.
        only: Names of cases, as shell patterns; all where empty.
    """

    def __init__(self, phase: str, rows: Path, stand_in: str | None, only: list[str]) -> None:
        self.phase, self.rows, self.only = phase, rows, only
        self.real = stand_in is None
        self.told: Row = {} if self.real else {"stand_in": True}  # in every row
        self.device = "cuda" if self.real else "cpu"
        if stand_in is not None:
            import compile_only

            compiles = stand_in == "compile"
            compile_only.install(compile=compiles, launchers=compiles, redirect=False)
        elif importlib.util.find_spec("triton") is not None:
            from triton import knobs

            knobs.compilation.listener = self._note_compilation

    def size(self, n: int) -> int:
        """So many coordinates; on the stand-in fewer."""
        return n if self.real else min(n, SMALL)

    def draw(self, *shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normally distributed numbers on the device, drawn there."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype)

    def wait(self) -> None:
        """Return when the device has done all that it was given."""
        if self.real:
            torch.cuda.synchronize()

    def write(self, row: Row) -> None:
        """Append a row to the file, whole, and say it."""
        line = json.dumps({"phase": self.phase, **row, **self.told})
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def _note_compilation(self, *, metadata: Row, times: Any, cache_hit: bool, **_: Any) -> None:
        """Say of a kernel that it was not found on disk: its seconds were the device's."""
        if not cache_hit:
            seconds = round(times.total / 1e6, 2)
            self.write({"compiled": {"kernel": metadata["name"], "seconds": seconds}})

    def _done(self) -> set[str]:
        if not self.rows.exists():
            return set()
        lines = self.rows.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return {row["case"] for row in rows if row["phase"] == self.phase and "case" in row}

    def run_cases(self, cases: Iterable[tuple[str, Case]]) -> None:
        """Run the cases that were asked for and have no row yet, each whatever became of others."""
        done = self._done()
        for name, case in cases:
            if name in done or (
                self.only and not any(fnmatch.fnmatch(name, only) for only in self.only)
            ):
                continue
            begin = time.perf_counter()
            try:
                found = case()
                self.wait()
            except Exception as error:
                traceback.print_exc()
                self.write({"case": name, "error": f"{type(error).__name__}: {error}"[:600]})
                if "captur" in str(error):  # generators still believe that a graph is captured
                    sys.exit(LOST)
                self._stop_if_lost()
                continue
            spent = round(time.perf_counter() - begin, 2)
            self.write({"case": name, **found, "case_s": spent})
            if self.real:
                torch.cuda.empty_cache()

    def _stop_if_lost(self) -> None:
        """After an illegal access the driver wants a new process for what is left."""
        try:
            self.wait()
        except Exception:
            sys.exit(LOST)


class Times(NamedTuple):
    """Seconds of a call, over several rounds."""

    median: float
    least: float
    most: float
    rounds: int

    def row(self, prefix: str = "") -> Row:
        """As columns of a row, in microseconds."""
        return {
            f"{prefix}us": round(1e6 * self.median, 2),
            f"{prefix}us_least": round(1e6 * self.least, 2),
            f"{prefix}us_most": round(1e6 * self.most, 2),
            f"{prefix}rounds": self.rounds,
        }


def timed(place: Place, call: Callable[[], object]) -> Times:
    """Time a call between two events of the device, after calls that are not counted."""
    if not place.real:
        begin = time.perf_counter()
        call()
        spent = time.perf_counter() - begin
        return Times(spent, spent, spent, 1)
    for _ in range(2):
        call()
    place.wait()
    begin = time.perf_counter()
    call()
    place.wait()
    once = time.perf_counter() - begin
    rounds = int(min(50, max(5, ROUND_SECONDS / max(once, 1e-6))))
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for first, last in marks:
        first.record()
        call()
        last.record()
    place.wait()
    spent = [1e-3 * first.elapsed_time(last) for first, last in marks]
    return Times(statistics.median(spent), min(spent), max(spent), rounds)


def graph_of(call: Callable[[], object], before: int, repeats: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``repeats`` calls, after some on another stream that are not part of it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(before):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph


def replayed(place: Place, call: Callable[[], object], repeats: int = 10) -> Times:
    """Time a call inside a CUDA graph of ``repeats`` of them: without the host's part."""
    if not place.real:
        return timed(place, call)
    times = timed(place, graph_of(call, 1, repeats).replay)
    return Times(*(value / repeats for value in times[:3]), times.rounds)


@functools.cache
def copy_rate(place: Place) -> float:
    """Bytes a second that a copy on the device reads and writes, here, now."""
    count = COPIED // 4 if place.real else SMALL
    source = torch.rand(count, device=place.device)
    target = torch.zeros_like(source)
    return 2 * 4 * count / timed(place, lambda: target.copy_(source)).median


def timed_both(place: Place, call: Callable[[], object], n: int, moved: float) -> Row:
    """Columns for a call of its own and one in a graph, and the latter's share of a copy.

    Args:
        place: Where.
        call: What to time.
        n: Its coordinates.
        moved: Bytes that it has to read and write.
    """
    alone = timed(place, call)
    graphed = replayed(place, call, 10 if n <= 10**6 else 2)
    row = alone.row() | graphed.row("graph_")
    row["ns_per_coordinate"] = round(1e9 * graphed.median / n, 4)
    return row | traffic(place, graphed, moved)


def traffic(place: Place, times: Times, moved: float) -> Row:
    """Columns for what a call moves, as a share of a copy."""
    rate = moved / times.median
    return {
        "bytes": int(moved),
        "gb_per_s": round(rate / 1e9, 1),
        "share_of_copy": round(rate / copy_rate(place), 4),
    }


def start(phase: str) -> Place:
    """The place that the command line asks for: ``SCRIPT ROWS [--stand-in KIND] [--only ...]``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("--stand-in", choices=["compile", "keys"])
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--phase", default=phase)
    asked = parser.parse_args()
    return Place(asked.phase, asked.rows, asked.stand_in, asked.only)


@contextlib.contextmanager
def configured(operation: str, how: str | None) -> Iterator[None]:
    """Has an operation's kernels compiled so, whatever the table says; by the table where None."""
    if how is not None:
        os.environ["AMALGAM_TRITON"] = f"{operation}={how}"
    try:
        yield
    finally:
        os.environ.pop("AMALGAM_TRITON", None)
