"""The command line, as a user runs it."""

import io
import json
import math
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed

from amalgam import Student, __version__, cli, experiment, weight_files
from amalgam.meta import replicate, trainer, validation
from amalgam.policies import Choice, load_policy

TINY = """
description = "seconds"
threads = 1
device = "cpu"
[task]
name = "digits-mlp"
batch_size = 64
[[teachers]]
kind = "adam"
[[teachers]]
kind = "sgd"
[student]
layers = 1
hidden = 4
warmup_steps = 3
[training]
checkpoint_every = 3
validate_every = 10
validation_steps = 4
validation_seeds = 1
[strategy]
kind = "stages"
unroll = 4
[[strategy.stages]]
episodes = 15
windows = 2
[evaluation]
tasks = ["digits-mlp"]
steps = 4
seeds = 1
every = 2
"""


TWO_STAGES = """
description = "seconds"
threads = 1
device = "cpu"
[task]
name = "digits-mlp"
batch_size = 64
[choice.policy]
teachers = "small"
hidden = 3
layers = 1
warmup_steps = 2
[choice.strategy]
num_periods = 3
unroll = 3
episodes = 3
windows = 1
validation = { unroll = 3, windows = 1, episodes = 1, warmup_windows = 1, warmup_lr = 0.05 }
[student]
layers = 1
hidden = 4
warmup_steps = 3
[training]
checkpoint_every = 3
[strategy]
kind = "repeat"
num_periods = 3
unroll = 3
windows = [1, 2]
episodes = 3
imitation_weight = "il_more"
repeat_threshold = 5.0
validation = { unroll = 3, windows = 1, episodes = 1, warmup_windows = 1, warmup_lr = 0.05 }
[evaluation]
tasks = ["digits-mlp"]
steps = 4
seeds = 1
every = 2
"""


@pytest.fixture(autouse=True)
def without_gpus(monkeypatch) -> None:
    """The same bits on all machines."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def tiny(tmp_path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "amalgam.cli", *map(str, arguments)]


@pytest.fixture
def here(monkeypatch):
    """Runs the command line in this process: its exit code, its output and its errors."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(cli, "_console", cli.Console(width=60))
    threads = torch.get_num_threads()

    def run_here(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["amalgam", *map(str, arguments)])
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli._run()
        return ended.value.code or 0, out.getvalue(), err.getvalue()

    yield run_here
    torch.set_num_threads(threads)


@pytest.fixture
def wide(here, monkeypatch):
    """The same on a terminal that holds every table; its output, of what does not fail."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli, "_console", cli.Console(width=200))

    def run_wide(*arguments: object) -> str:
        code, out, err = here(*arguments)
        assert code == 0, out + err
        return out

    return run_wide


def assert_one_line(found: tuple[int, str, str], code: int, named: str) -> None:
    """An error of this exit code, in one line that holds these words."""
    assert found[0] == code
    (line,) = found[2].strip().splitlines()
    assert re.search(named, line), line


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    return rows


@pytest.fixture
def chance() -> random.Random:
    """Draws the moments to kill at; a failing test shows the seed, which the variable sets."""
    seed = int(os.environ.get("AMALGAM_KILL_SEED", random.SystemRandom().randrange(2**32)))
    print(f"AMALGAM_KILL_SEED={seed} draws these moments again:")
    return random.Random(seed)


def killed(
    folder: Path, cuts: list[tuple[str, int]], chance: random.Random, *arguments: object
) -> int:
    """Kill and resume a run each time a log has so many lines; returns how many kills hit it."""
    kills = 0
    resume: list[str] = []
    for name, lines in cuts:
        delay = chance.uniform(0, 0.05)
        print(f"kill when {name} has {lines} lines, {delay:.4f} s later")
        process = subprocess.Popen(
            command(*arguments, *resume), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        log = folder / name
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_bytes().count(b"\n") >= lines:
                time.sleep(delay)
                break
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        resume = ["--resume"]
    return kills


def test_train_killed_at_random_moments_ends_in_the_same_bits(
    here, wide, tiny, tmp_path, chance
) -> None:
    """Runs that are killed are processes; this one begins and ends them, which takes less time."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    shown = wide("train", tiny, "--out", whole, "--seed", 3)
    for expected in ("student", "adam", "sgd", "Adam", "AdamW", "loss after 4"):
        assert expected in shown
    for name in (
        "recipe.json",
        "metrics.jsonl",
        "evaluation.json",
        "evaluation.md",
        "plots/training.png",
        "plots/digits-mlp.png",
    ):
        assert (whole / name).stat().st_size > 0

    first, *later = (
        ("metrics.jsonl", chance.randrange(*lines)) for lines in ((1, 8), (9, 20), (21, 29))
    )
    train = ("train", tiny, "--out", cut, "--seed", 3)
    assert killed(cut, [first], chance, *train) == 1
    assert not (cut / "student.safetensors").exists()
    assert killed(cut, later, chance, *train, "--resume") >= 1
    wide("train", tiny, "--out", cut, "--seed", 3, "--resume")

    ours, theirs = (Student.load(d / "student.safetensors") for d in (whole, cut))
    assert all(map(torch.equal, ours.weights(), theirs.weights()))
    assert (whole / "student.safetensors").read_bytes() == (
        cut / "student.safetensors"
    ).read_bytes()
    assert metrics(whole) == metrics(cut)
    assert (whole / "evaluation.json").read_bytes() == (cut / "evaluation.json").read_bytes()

    about = ours.provenance
    assert about["seed"] == 3
    assert about["recipe"] == "tiny"
    assert about["resolved"]["strategy"]["unroll"] == 4
    assert about["amalgam_version"]
    assert "digits-mlp" in about["data"]

    train = ("train", tiny, "--out", cut, "--seed")
    assert_one_line(here(*train, 3), 2, "holds a run already")
    found = here(*train, 3, "--resume", "--set", "strategy.unroll=5")
    assert_one_line(found, 2, "recipe.strategy.unroll is 4 there and 5 here")
    assert_one_line(here(*train, 4, "--resume"), 2, "seed is 3 there and 4 here")
    found = here(*train, 3, "--resume", "--device", "cuda:7")
    assert_one_line(found, 2, "device must be one of 'auto', 'cpu'.* not 'cuda:7'")
    wide(*train, 3, "--resume", "--device", "auto", "--set", "evaluation.tasks=[]")
    assert metrics(whole) == metrics(cut)

    shown = wide(
        *("evaluate", whole / "student.safetensors", "--tasks", "digits-cnn", "--short"),
        *("--horizon", 2, "--budgets", 1, "--seeds", 1, "--teacher", "rmsprop", "--jobs", 1),
        *("--out", tmp_path / "compared", "--cache", tmp_path / "cache", "--device", "cpu"),
    )
    assert "rmsprop" in shown
    assert (tmp_path / "compared" / "plots" / "digits-cnn.png").exists()


def test_a_two_stage_run_killed_in_both_stages_ends_in_the_same_bytes(
    wide, tmp_path, chance
) -> None:
    recipe = tmp_path / "two.toml"
    recipe.write_text(TWO_STAGES)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    shown = wide("train", recipe, "--out", whole, "--seed", 2)
    for expected in ("meta-training the choice", "student", "choice", "rmsprop", "adam"):
        assert expected in shown
    cuts = [
        ("choice/metrics.jsonl", chance.randrange(1, 6)),
        ("metrics.jsonl", chance.randrange(1, 6)),
        ("metrics.jsonl", chance.randrange(7, 14)),
    ]
    assert killed(cut, cuts, chance, "train", recipe, "--out", cut, "--seed", 2) >= 2
    wide("train", recipe, "--out", cut, "--seed", 2, "--resume")
    for name in ("choice/student.safetensors", "student.safetensors", "evaluation.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    for name in (".", "choice"):
        assert metrics(whole / name) == metrics(cut / name)
    choice = load_policy(whole / "choice" / "student.safetensors")
    assert isinstance(choice, Choice)
    assert choice.provenance["teachers"] == []
    assert load_policy(whole / "student.safetensors").provenance["teachers"] == ["choice"]


def test_replicates_are_evaluated_and_their_spread_is_reported(wide, tiny, tmp_path) -> None:
    short = ["--set", "strategy.stages=[{episodes=2}]", "--set", "replicates=3"]
    shown = wide("train", tiny, "--out", tmp_path / "run", *short)
    for expected in ("student 0", "student 2", "between 3 replicates"):
        assert expected in shown
    content = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    finals = [
        statistics.fmean(math.log(curve["validation_losses"][-1]) for curve in result["curves"])
        for result in content["results"]
        if result["name"].startswith("student")
    ]
    assert len(finals) == 3
    assert content["spread"]["digits-mlp"] == pytest.approx(statistics.stdev(finals))
    assert "between 3 replicates" in (tmp_path / "run" / "evaluation.md").read_text()
    for index in range(3):
        Student.load(tmp_path / "run" / f"replicate-{index}" / "student.safetensors")


def test_validate_scores_students_as_their_run_did(wide, tiny, tmp_path) -> None:
    run = tmp_path / "run"
    short = ["--set", "strategy.stages=[{episodes=2}]", "--set", "training.validate_every=2"]
    wide("train", tiny, "--out", run, "--seed", 3, *short)
    (score,) = [row["validation"] for row in metrics(run) if "validation" in row]
    shown = wide("validate", run / "student.safetensors", "--by", tiny, "--seed", 3)
    assert shown.startswith("evaluating\nmeta-validation of tiny, lower is better\n")
    assert shown.strip().splitlines()[-1].split() == ["student", f"{score:.4f}"]


def test_validate_puts_the_best_first_and_the_diverged_last(wide, tiny, monkeypatch) -> None:
    scores = iter([math.inf, math.nan, -2.0, 0.5])
    monkeypatch.setattr(validation, "of_student", lambda *of, **how: next(scores))
    names = ["digits", "compact", "standard"]
    shown = wide("validate", *names, weight_files.locate("digits"), "--by", tiny)
    assert [line.split() for line in shown.strip().splitlines()[-4:]] == [
        ["standard", "-2.0000"],
        ["weights/digits", "0.5000"],
        ["digits", "inf"],
        ["compact", "nan"],
    ]


def test_validate_says_what_is_wrong_with_what_is_given(here, tmp_path) -> None:
    assert_one_line(here("validate", "digits", "--by", "digit"), 2, "digits")
    assert_one_line(here("validate", "digits", "digits"), 2, "'digits' is given twice")
    assert_one_line(here("validate", tmp_path / "none"), 2, "neither a file nor a student")
    code, out, _ = here("validate", "digits", tmp_path / "none")
    assert (code, out) == (2, "")  # before any run


needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo, which this PyTorch lacks",
)


def together(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Two processes, by torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {
        "COLUMNS": "200", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"
    }  # fmt: skip
    return subprocess.run(
        [*launch, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
    )


@needs_gloo
def test_torchrun(wide, tiny, tmp_path) -> None:
    """One process reports, evaluates and writes; an error is shown once."""
    out, short = tmp_path / "run", ["--set", "strategy.stages=[{episodes=2}]"]
    train = ["-m", "amalgam.cli", "train", tiny]
    done = together(*train, "--out", out, *short)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("run folder:") == 1
    assert done.stdout.count("loss after 4") == 1
    assert not list(out.rglob(".*"))
    alone = tmp_path / "alone"
    wide("train", tiny, "--out", alone, *short, "--set", "training.optimizees=2")
    ours, theirs = (Student.load(d / "student.safetensors").weights() for d in (alone, out))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=2e-5)

    refused = together(*train, "--out", out, *short)
    assert refused.returncode != 0
    assert (refused.stdout + refused.stderr).count("holds a run already") == 1


DYING = """
import os
import time

from amalgam import cli, experiment


def train(self, *arguments):
    if os.environ["RANK"] == "1":
        raise RuntimeError("rank one " + "is dead")
    time.sleep(60)


experiment.Experiment.train = train
cli.main()
"""


@needs_gloo
def test_a_dead_processs_traceback_shows_once(tiny, tmp_path) -> None:
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    done = together(script, "train", tiny, "--out", tmp_path / "run")
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("rank one is dead") == 1


def test_errors_have_no_traceback(here, tiny, tmp_path) -> None:
    wrong = ("train", tiny, "--out", tmp_path / "x", "--set", "strategy.unrol=3")
    done = subprocess.run(command(*wrong), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().startswith("error:")
    assert "tiny.toml with strategy.unrol=3: there is no key" in done.stderr
    assert "the nearest is 'strategy.unroll'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()
    assert_one_line(here("evaluate", tmp_path / "none.safetensors"), 2, "none.safetensors")


SHORT = ["--set", "strategy.stages=[{episodes=1}]", "--set", "evaluation.tasks=[]"]


def test_faults_have_exit_codes_and_one_line(here, tiny, tmp_path, monkeypatch) -> None:
    out = tmp_path / "run"
    train = ("train", tiny, "--device", "cpu", *SHORT)
    assert_one_line(here(*train, "--out", ""), 2, "--out must name a folder, not ''")
    assert_one_line(here("train", "digit"), 2, "did you mean 'digits'")
    assert_one_line(here(*train, "--out", tiny), 2, "--out must name a folder, and '.*tiny.toml'")
    cuda = ("--set", "amalgamation.backend=cuda")
    assert_one_line(here(*train, "--out", out, *cuda), 2, "amalgamation.backend='cuda' can't")
    assert not out.exists()
    monkeypatch.setattr(replicate.Replicate, "update", skip)
    assert_one_line(here(*train, "--out", out), 3, "the student learned nothing: all 1 meta-steps")
    monkeypatch.undo()
    (tmp_path / "alone").mkdir()
    Student().save(tmp_path / "alone" / "student.safetensors")
    before = (tmp_path / "alone" / "student.safetensors").read_bytes()
    found = here(*train, "--out", tmp_path / "alone")
    assert_one_line(found, 2, "holds student.safetensors, and no recipe.json")
    assert (tmp_path / "alone" / "student.safetensors").read_bytes() == before


def skip(self, *arguments: object) -> float:
    """In the place of :meth:`Replicate.update`."""
    self.skipped_meta_steps += 1
    return math.nan


@pytest.mark.parametrize(
    ("error", "code", "named"),
    [
        (MemoryError(), 1, "out of memory: the system gave none; set memory.budget, or fewer"),
        (
            torch.OutOfMemoryError("CUDA out of\nmemory"),
            1,
            "out of memory: CUDA out of memory; set",
        ),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_what_fails_on_the_way_is_one_line(error, code, named, here, tiny, tmp_path, monkeypatch):
    def fail(self, *arguments: object) -> None:
        raise error

    monkeypatch.setattr(experiment.Experiment, "train", fail)
    assert_one_line(here("train", tiny, "--out", tmp_path / "run", *SHORT), code, named)


@pytest.mark.parametrize(
    ("stop", "code"), [(KeyboardInterrupt(), 130), (cli._Terminated(143), 143)], ids=["int", "term"]
)
def test_an_interrupted_run_says_how_it_goes_on(
    stop, code, here, tiny, tmp_path, monkeypatch
) -> None:
    """Brackets in a path are no markup, and a command that is copied runs."""
    out = tmp_path / "a long name, so that a narrow terminal would break it [/x] 'y'"
    train = ["train", tiny, "--out", out, "--set", "description=[/x] [red]", *SHORT]

    def interrupt(self, row: dict) -> None:
        raise stop

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Trainer, "_close", interrupt)
        found = here(*train)
    assert found[0] == code
    words, command = found[2].strip().splitlines()
    assert words == "interrupted; this goes on where the last checkpoint is:"
    name, *arguments = shlex.split(command)
    assert (name, arguments) == ("amalgam", [*map(str, train), "--resume"])
    assert f"run folder: {out}" in found[1].splitlines()
    assert "tiny: [/x] [red]" in found[1].splitlines()
    done = here(*arguments)
    assert done[0] == 0
    assert f"student: {out}/student.safetensors" in done[1].splitlines()
    assert not list(out.rglob(".*"))


def test_signals_of_the_system(here, tiny, tmp_path) -> None:
    """A second run in the folder is refused; SIGTERM ends the first one, in good order."""
    train = ["train", tiny, "--out", tmp_path / "run", "--device", "cpu"]
    long = ["--set", "strategy.stages=[{episodes=10000, windows=1}]"]
    process = subprocess.Popen(
        command(*train, *long), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 100
        checkpoint = tmp_path / "run" / "checkpoint.safetensors"
        while not checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        refused = here(*train, *long, "--resume")
        assert_one_line(refused, 2, f"is in use by process {process.pid} on ")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 143
    assert errors.splitlines()[-1].endswith("--resume")
    assert "Traceback" not in errors
    assert not list((tmp_path / "run").rglob(".*"))


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="Windows has no SIGPIPE")
def test_nobody_reads_the_output() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command("info"), stdout=writing, stderr=subprocess.PIPE, text=True, timeout=100
    )
    os.close(writing)
    assert done.returncode == -signal.SIGPIPE  # a shell says 141
    assert done.stderr == ""


def test_tensorboard_shows_the_metrics_of_a_run_that_was_killed(
    here, tiny, tmp_path, monkeypatch
) -> None:
    """The part before the option was given, too, and after the run is over nothing twice."""
    pytest.importorskip("tensorboard", reason="needs tensorboard, which is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, stages = tmp_path / "run", "strategy.stages=[{episodes=2, windows=4}]"
    train = ("train", tiny, "--out", out, "--set", stages, "--set", "evaluation.tasks=[]")

    def interrupt(self, row: dict) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Trainer, "_close", interrupt)
        assert here(*train)[0] == 130
    assert not (out / "tensorboard").exists()
    for _ in range(2):
        assert here(*train, "--resume", "--tensorboard")[0] == 0
        events = EventAccumulator(str(out / "tensorboard"))
        events.Reload()
        rows = metrics(out)
        assert [row["meta_step"] for row in rows] == [*range(1, 9)]
        for tag, of in (
            ("meta_loss", lambda row: row["meta_loss"]),
            ("loss/adam", lambda row: row["loss"]["adam"]),
        ):
            found = [(event.step, event.value) for event in events.Scalars(tag)]
            assert found == [(row["meta_step"], pytest.approx(of(row))) for row in rows]


def test_a_missing_extra_is_one_line_before_anything_is_made(
    here, tiny, tmp_path, monkeypatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    found = here("train", tiny, "--out", tmp_path / "run", "--tensorboard", *SHORT)
    assert_one_line(found, 2, r"pip install 'amalgam-optim\[tensorboard\]'")
    assert not (tmp_path / "run").exists()


def test_convert_writes_over_nothing(here, tmp_path) -> None:
    source = tmp_path / "x.npz"
    np.savez(source, a=np.zeros(1))
    before = source.read_bytes()
    assert_one_line(here("convert", source, source), 2, "is there already; replace it by --over")
    found = here("convert", source, source, "--overwrite")
    assert_one_line(found, 2, "dest must be another file than what is converted, not .*x.npz")
    assert source.read_bytes() == before
    assert_one_line(here("convert", source, "/dev/null"), 2, "is there already")


def test_info(wide) -> None:
    report = json.loads(wide("info", "--json"))
    backends = {backend["name"]: backend for backend in report["backends"]}
    assert backends["reference"]["works"]
    for backend in backends.values():
        assert backend["works"] == (backend["reason"] is None)
    assert "digits" in report["recipes"]
    students = {student["name"]: student for student in report["students"]}
    assert (students["standard"]["layers"], students["standard"]["units"]) == (1, 8)
    assert students["standard"]["bytes_a_parameter"] == 72
    assert students["digits"]["bytes_a_parameter"] == 328
    assert students["digits"]["description"].startswith("Adam and RMSProp into one student")
    text = wide("info")
    assert "reference" in text
    assert "student_step_, student_unroll_backward, teacher_distance, teacher_step\n" in text
    assert "_into" not in text
    assert "student_step" in text
    assert re.search(r"standard .* nominal .* 1 x 8 .* 72 .* The default student", text)


TYPERS = ["--install-completion", "--show-completion", "--help"]


def test_a_newcomer_on_a_narrow_terminal(here) -> None:
    """Defaults are shown, tables fit, and there is a version."""
    for arguments, shown in (
        (["--help"], ["amalgam train digits", "--version"]),
        (["train", "--help"], ["runs/RECIPE-SEED", "the recipe's", "amalgam info"]),
        (["evaluate", "--help"], ["one a core", "0.25,1,4,10", "the user's cache"]),
        (["compare", "--help"], ["the first other", "the horizon"]),
    ):
        code, out, _ = here(*arguments)
        assert code == 0
        text = re.sub(r"[\s│]+", " ", out)
        for words in shown:
            assert words in text
        assert max(map(len, out.splitlines())) <= 60
        # An option without a value names none, but for Typer's own.
        assert re.findall(r"(--[a-z-]+) *<bool>", out) in (["--help"], TYPERS)
    code, out, _ = here("info")
    assert re.search(r"^core: (?!core)", out, re.MULTILINE)
    tables_begin = out.index("\nstudents\n")
    assert max(map(len, out[tables_begin:].splitlines())) <= 60
    code, out, _ = here("--version")
    assert out.startswith(f"amalgam {__version__} (")


@pytest.mark.parametrize("width", [60, 120])
def test_progress_on_a_terminal_is_not_cut(width, tiny, tmp_path, here, monkeypatch) -> None:
    console = cli.Console(width=width, force_terminal=True, record=True)
    monkeypatch.setattr(cli, "_console", console)
    assert here("train", tiny, "--out", tmp_path / "run", *SHORT)[0] == 0
    text = console.export_text()
    (line,) = {line.rstrip() for line in text.splitlines() if "meta-loss" in line}
    assert "…" not in line
    assert ("imitation" in line) == (width == 120)


def test_progress_in_a_log_file(tiny, tmp_path, here, monkeypatch) -> None:
    monkeypatch.setattr(cli, "_EVERY", 0.0)
    short = ["--set", "strategy.stages=[{episodes=3}]", *SHORT[2:]]
    code, out, _ = here("train", tiny, "--out", tmp_path / "run", *short)
    assert code == 0
    begins = out.index("meta-training the student\n")
    lines = re.findall(r"^meta-step (\d+) of (\d+): meta-loss [+-]", out[begins:], re.MULTILINE)
    assert len(lines) > 1
    assert [int(step) for step, _ in lines] == list(range(1, len(lines) + 1))
    assert lines[-1][0] == lines[-1][1]
    assert "\nevaluating\n" in out
    written = io.StringIO()
    with redirect_stdout(written), cli._evaluation_progress() as report:
        report("digits-mlp: Adam, lr=[0.001]")
    assert written.getvalue() == "evaluating\nevaluating: digits-mlp: Adam, lr=[0.001]\n"
