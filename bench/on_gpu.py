"""A quarter of an hour on a machine with a GPU and no network: one driver, in phases.

    python bench/on_gpu.py prepare --python PYTHON   here, with nvcc: core and kernels for there
    python bench/on_gpu.py run [--out DIR]           there: every phase
    python bench/on_gpu.py dry [--out DIR]           anywhere: every phase, on a stand-in for a GPU

``run`` and ``dry`` take ``--limit SECONDS`` for all phases together and ``--only PHASE[:PATTERN]``
for a selection of phases, and of the cases in them. PYTHON is one of the version there, with the
torch and Triton of there: what is compiled is found again by both.

Each phase has its own limit, is killed at it, and holds up nothing but what comes after in time.
Every row is in DIR/rows.jsonl (by default of $OUT) as soon as it is measured; DIR/log.txt has what
was printed, DIR/ncu.txt the profiler's report, DIR/summary.txt what is also printed last.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TextIO

ROOT = Path(__file__).resolve().parents[1]
PREPARED = ROOT / "build" / "gpu" / "prepared.tar.xz"
# Triton's files name each other by absolute paths, so they lie in the same place here and there.
CACHE = Path(tempfile.gettempdir()) / "amalgam-kernels"
ALL_SECONDS = 450.0
LOST = 3  # a phase's script wants a new process, as the GPU refuses this one further work
# Of this machine: what is written names files from there on.
FOLDERS = (ROOT, Path(sys.prefix), Path(tempfile.gettempdir()))
OUTCOME = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
# In files with tests that need a GPU.
MARKED = re.compile(r"\bmark\.gpu\b|\bby_triton\b|\bon_gpus\b")
SLOWER = 5  # times as long may a phase take where kernels are not computed by a GPU
CHECKED = (
    "student_step * 2x20 n=64 default",
    "student_step * 1x4 n=63 default",
    "student_step_ 2x20 stochastic *",
    "student_step_ 1x4 control *",
    "choice_step * k=2 default",
    "choice_step * cuda",
    "nominal student_* cuda",
    "teacher_*",
)


class Phase(NamedTuple):
    """Something to run there, of which nothing else depends.

    Attributes:
        name: Its name.
        seconds: After which it is killed.
        commands: What to run, all at once; ``None`` stands for what can't run here, and why.
    """

    name: str
    seconds: float
    commands: Callable[[Run], list[list[str]] | str]


class Run:
    """One run of the phases, and where what it gives is written.

    Args:
        out: The folder for its files.
        stand_in: As ``gpu.place.Place`` has it.
        only: Phases, each perhaps with patterns of its cases; all where empty.
    """

    def __init__(self, out: Path, stand_in: str | None, only: dict[str, list[str]]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.stand_in, self.only = out, stand_in, only
        self.rows = out / "rows.jsonl"
        self.log = (out / "log.txt").open("a", encoding="utf-8", buffering=1)
        self.begin = time.monotonic()
        self.ended: list[tuple[str, float, str]] = []

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """The rows so far; the last one of a killed process may be cut off, and is left out."""
        if not self.rows.exists():
            return []
        lines = self.rows.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def failed(self) -> bool:
        """Whether a phase was killed or had to end, or a row says that something raised."""
        ended = all(status == "ended" or seconds == 0 for _, seconds, status in self.ended)
        return not ended or any(
            "error" in row or row.get("outcome") in ("failed", "error") for row in self.read()
        )

    def environment(self) -> dict[str, str]:
        """Of every phase; the stand-in's tensors are too small for several threads."""
        single = {"OMP_NUM_THREADS": "1"} if self.stand_in else {}
        paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench"), os.environ.get("PYTHONPATH")]
        return {
            **os.environ,
            **single,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(CACHE),
            "PATH": os.environ.get("PATH", "") + os.pathsep + "/usr/local/cuda/bin",
        }

    def script(self, name: str, *arguments: str, only: Sequence[str] = ()) -> list[str]:
        """The command of a phase's script."""
        command = [sys.executable, str(ROOT / "bench" / "gpu" / f"{name}.py"), str(self.rows)]
        if self.stand_in:
            command += ["--stand-in", self.stand_in]
        chosen = [*only, *(self.only.get(name) or [])]
        return [*command, *arguments, *(["--only", *chosen] if chosen else [])]

    def phase(self, phase: Phase, seconds: float) -> None:
        """Run a phase for so many seconds at most."""
        commands = phase.commands(self)
        if isinstance(commands, str):
            self.write({"phase": phase.name, "left_out": commands})
            self.ended.append((phase.name, 0.0, commands))
            return
        begin, until = time.monotonic(), time.monotonic() + seconds
        ends = self._together(phase.name, commands, until)
        tries = 1
        while LOST in ends and time.monotonic() < until and tries < 20:
            tries += 1
            ends = self._together(phase.name, commands, until)
        status = "ended" if not any(ends) else f"exit {ends}"
        if None in ends:
            status = f"killed at its limit of {seconds:.0f} s"
        if tries > 1:
            status += f", {tries} processes"
        self.ended.append((phase.name, time.monotonic() - begin, status))

    def _together(self, name: str, commands: list[list[str]], until: float) -> list[int | None]:
        """Run commands at once and log their lines; ``None`` for one that had to be killed."""
        running = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                errors="replace",
                text=True,
                bufsize=1,
            )
            for command in commands
        ]
        killed = False
        with selectors.DefaultSelector() as selector:
            for process in running:
                assert process.stdout is not None
                os.set_blocking(process.stdout.fileno(), False)
                selector.register(process.stdout, selectors.EVENT_READ, [""])
            while selector.get_map():
                left = until - time.monotonic()
                if left <= 0 and not killed:
                    killed = True
                    alive = [process for process in running if process.poll() is None]
                    for process in alive:
                        os.killpg(process.pid, signal.SIGKILL)
                for key, _ in selector.select(max(0.05, min(left, 1.0)) if not killed else 1.0):
                    if not self._read(name, key.fileobj, key.data):  # type: ignore[arg-type]
                        selector.unregister(key.fileobj)
        ends: list[int | None] = [process.wait() for process in running]
        return [None if killed and end == -signal.SIGKILL else end for end in ends]

    def _read(self, name: str, stream: TextIO, rest: list[str]) -> bool:
        """Take what a process printed; whether there can be more."""
        text = os.read(stream.fileno(), 1 << 16).decode(errors="replace")
        *lines, rest[0] = (rest[0] + text).split("\n")
        for line in lines if text else [rest[0]]:
            for folder in FOLDERS:
                line = line.replace(f"{folder}/", "")
            self.log.write(f"[{name}] {line}\n")
            found = OUTCOME.match(line)
            if found:
                self.write({"phase": name, "case": found[1], "outcome": found[2].lower()})
        return bool(text)


def machine_phase(run: Run) -> list[list[str]]:
    commands = [run.script("machine")]
    if shutil.which("nvidia-smi"):
        query = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.max.mem"
        commands.append(["nvidia-smi", f"--query-gpu={query}", "--format=csv"])
    return commands


def script_phase(name: str) -> Callable[[Run], list[list[str]]]:
    return lambda run: [run.script(name)]


def tests_phase(run: Run) -> list[list[str]] | str:
    """The tests marked gpu, each file in a process of its own."""
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed"
    command = [sys.executable, "-m", "pytest", "-v", "--no-header", "-c", os.devnull]
    command += [f"--rootdir={ROOT}", "-p", "no:cacheprovider", "-p", "at_once", "--tb=short"]
    command += ["-W", "ignore::pytest.PytestUnknownMarkWarning", "-m", "gpu"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += ["-o", "timeout=60"]
    if run.stand_in:
        command += ["-p", "compile_only"]
        command += ["--keys-only"] if run.stand_in == "keys" else ["--launchers"]
    patterns = run.only.get("tests") or []
    if patterns:
        command += ["-k", " or ".join(patterns)]
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [f for f in files if MARKED.search(f.read_text(encoding="utf-8"))]
    return [[*command, str(file.relative_to(ROOT))] for file in marked]


def sanitized_phase(checker: str) -> Callable[[Run], list[list[str]] | str]:
    """Small cases of every kernel under one of compute-sanitizer's tools."""

    def commands(run: Run) -> list[list[str]] | str:
        tool = shutil.which("compute-sanitizer", path=run.environment()["PATH"])
        if tool is None:
            return "compute-sanitizer is not on PATH"
        command = run.script("smoke", "--phase", checker, only=CHECKED)
        before = [tool, "--tool", checker, "--error-exitcode", "9"]
        return [["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *before, *command]]

    return commands


def ncu_phase(run: Run) -> list[list[str]] | str:
    tool = shutil.which("ncu", path=run.environment()["PATH"])
    if tool is None or run.stand_in:
        return "ncu is not on PATH" if tool is None else "ncu needs a GPU"
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats")
    sections += ("WarpStateStats", "ComputeWorkloadAnalysis")
    command = [tool, "--clock-control", "none", "--log-file", str(run.out / "ncu.txt")]
    command += ["-k", "regex:^(in_place|backward|forward)$"]
    for section in sections:
        command += ["--section", section]
    return [[*command, *run.script("profiled")]]


PHASES = (
    Phase("machine", 45, machine_phase),
    Phase("arithmetic", 20, script_phase("arithmetic")),
    Phase("smoke", 60, script_phase("smoke")),
    Phase("windows", 90, script_phase("windows")),
    Phase("tests", 130, tests_phase),
    Phase("speed", 150, script_phase("speed")),
    Phase("model", 60, script_phase("model")),
    Phase("evaluation", 30, script_phase("evaluation")),
    Phase("memcheck", 45, sanitized_phase("memcheck")),
    Phase("racecheck", 60, sanitized_phase("racecheck")),
    Phase("training", 240, script_phase("training")),
    Phase("ncu", 45, ncu_phase),
)


def summary(run: Run) -> str:
    """What is to be known first: phases, what failed, and the times beside a copy."""
    rows = run.read()
    lines = []
    for name, seconds, status in run.ended:
        of_phase = [row for row in rows if row.get("phase") == name]
        outcomes = Counter(row["outcome"] for row in of_phase if "outcome" in row)
        counts = [f"{len(of_phase)} rows"]
        counts += [f"{sum('error' in row for row in of_phase)} raised"]
        counts += [f"{sum(row.get('ok') is False for row in of_phase)} not ok"]
        counts += [f"{count} {outcome}" for outcome, count in sorted(outcomes.items())]
        lines.append(f"{name:9s} {seconds:6.1f} s  {status}: {', '.join(counts)}")
    compiled = [row["compiled"] for row in rows if "compiled" in row]
    spent = sum(each["seconds"] for each in compiled)
    lines.append(f"compiled there: {len(compiled)} kernels, {spent:.0f} s")
    for row in rows:
        outcome = row.get("outcome", "")
        if "error" in row or row.get("ok") is False or outcome in ("failed", "error"):
            told = row.get("error") or {k: row[k] for k in ("relative", "ratio") if k in row}
            lines.append(f"! {row['phase']} {row.get('case')}: {outcome} {told}"[:220])
    for row in rows if run.stand_in is None else ():
        if "share_of_copy" in row:
            graph = f" graph {row['graph_us']:.1f}" if "graph_us" in row else ""
            share = f"{row['share_of_copy']:.0%} of a copy"
            lines.append(f"{row['case']}: {row['us']:.1f} us{graph}, {share}")
        elif row.get("phase") == "windows" and "ms_per_step" in row:
            lines.append(f"{row['case']}: {row['ms_per_step']} ms a step")
        elif row.get("phase") == "evaluation" and "seconds" in row:
            alone, rows_ = row["seconds"].values()
            lines.append(f"{row['case']}: {row['runs']} runs {alone} s, side by side {rows_} s")
        elif row.get("phase") == "model" and "optimizer_us" in row:
            step, alone = row["us"] / 1e3, row["optimizer_us"] / 1e3
            lines.append(f"{row['case']}: {step:.2f} ms a step, optimizer alone {alone:.2f}")
        elif row.get("phase") == "model" and "us" in row:
            alone, graph = row["us"] / 1e3, row["graph_us"] / 1e3
            lines.append(f"{row['case']}: {alone:.2f} ms, in a graph {graph:.2f}")
        elif "held_out_losses" in row:
            lines.append(f"{row['case']}: {row['held_out_losses']}, {row['ms_per_step']} ms a step")
    return "\n".join(lines)


def unpack() -> None:
    """Put what `prepare` made where it is looked for."""
    if not PREPARED.exists():
        return
    with tarfile.open(PREPARED) as archive:
        for member in archive.getmembers():
            top, _, rest = member.name.partition("/")
            target = CACHE if top == "cache" else ROOT / "amalgam"
            member.name = rest
            if member.isfile() and not (target / rest).exists():
                archive.extract(member, target, filter="data")


def settle(run: Run) -> None:
    """See that the package can be imported from here, with a core and its kernels."""
    link = ROOT / "amalgam" / "kernels"
    if not link.exists():
        link.symlink_to(Path("..") / "kernels")
    unpack()
    found = [sys.executable, "-c", "import amalgam._core"]
    if subprocess.run(found, cwd=ROOT, env=run.environment(), capture_output=True).returncode:
        build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        environment = {**run.environment(), "AMALGAM_CUDA": "auto" if run.stand_in else "1"}
        done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
        run.log.write(f"[build] {done.stdout}{done.stderr}\n")
        if done.returncode:
            run.write({"phase": "build", "error": done.stderr[-600:]})


def go(run: Run, limit: float) -> str:
    """Run the phases that were asked for, within a limit, and say what came out."""
    settle(run)
    until = run.begin + limit
    wanted = [phase for phase in PHASES if not run.only or phase.name in run.only]
    if run.stand_in == "compile":  # nothing is timed
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda phase: run.phase(phase, limit), wanted))
        wanted = []
    for phase in wanted:
        left = until - time.monotonic()
        if left > 1:
            run.phase(phase, min(phase.seconds * (SLOWER if run.stand_in else 1), left))
        else:
            run.ended.append((phase.name, 0.0, "no time was left"))
    text = summary(run)
    (run.out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    return text


def prepare(python: str, again: bool) -> None:
    """Build the core, and compile every kernel that the phases launch, for that Python.

    Args:
        python: The interpreter.
        again: Whether to forget what was built and compiled before.
    """
    folder = PREPARED.parent
    folder.mkdir(parents=True, exist_ok=True)
    if again:
        shutil.rmtree(CACHE, ignore_errors=True)
        shutil.rmtree(folder / "core", ignore_errors=True)
    if not list(folder.glob("core/amalgam/_core*")):
        build = [python, "setup.py", "--quiet", "build_ext", "--build-lib", str(folder / "core")]
        build += ["--build-temp", str(folder / "objects")]
        subprocess.run(build, cwd=ROOT, env={**os.environ, "AMALGAM_CUDA": "1"}, check=True)
    core = next(folder.glob("core/amalgam/_core*"))
    shutil.copy(core, ROOT / "amalgam")
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [python, __file__, "dry", "--stand-in", "compile", "--limit", "3600"]
    if subprocess.run([*command, "--out", str(out)], cwd=ROOT).returncode:
        print(f"a phase failed on the stand-in: {out / 'log.txt'} says why", file=sys.stderr)
    with tarfile.open(PREPARED, "w:xz") as archive:
        archive.add(core, f"core/{core.name}")
        for file in sorted(CACHE.rglob("*")):
            # Of what Triton keeps, a launch reads the machine code, its description, and stubs.
            if file.suffix in (".cubin", ".json", ".so"):
                archive.add(file, f"cache/{file.relative_to(CACHE)}")
    print(f"{PREPARED}: {PREPARED.stat().st_size / 2**20:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare")
    preparing.add_argument("--python", default=sys.executable)
    preparing.add_argument("--again", action="store_true", help="build and compile all anew")
    for name in ("run", "dry"):
        each = commands.add_parser(name)
        each.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")))
        limit = ALL_SECONDS * (SLOWER if name == "dry" else 1)
        each.add_argument("--limit", type=float, default=limit)
        each.add_argument("--only", nargs="*", default=[])
        if name == "dry":
            each.add_argument("--stand-in", choices=["compile", "keys"], default="keys")
    asked = parser.parse_args()
    if asked.command == "prepare":
        prepare(asked.python, asked.again)
        return
    only: dict[str, list[str]] = {}
    for text in asked.only:
        name, _, pattern = text.partition(":")
        only.setdefault(name, []).extend([pattern] if pattern else [])
    unknown = sorted(set(only) - {phase.name for phase in PHASES})
    if unknown:
        parser.error(f"--only names {unknown}; there are {[phase.name for phase in PHASES]}")
    run = Run(asked.out, getattr(asked, "stand_in", None), only)
    print(go(run, asked.limit))
    if run.stand_in and run.failed():
        sys.exit(1)


if __name__ == "__main__":
    main()
