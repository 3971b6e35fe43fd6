"""The command line, as a user runs it."""

import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed

from amalgam import Student
from amalgam.policies import Choice, load_policy

TINY = """
description = "seconds"
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
seeds = 2
every = 2
"""


TWO_STAGES = """
description = "seconds"
threads = 1
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


def run(*arguments: object, fails: bool = False) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment, timeout=120
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


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


def test_train_killed_at_random_moments_ends_in_the_same_bits(tiny, tmp_path, chance) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run("train", tiny, "--out", whole, "--seed", 3)
    for expected in ("student", "adam", "sgd", "Adam", "AdamW", "loss after 4"):
        assert expected in done.stdout
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
    run("train", tiny, "--out", cut, "--seed", 3, "--resume")

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

    refused = run("train", tiny, "--out", cut, "--seed", 3, fails=True)
    assert "holds a run already" in refused.stderr
    changed = ["--set", "strategy.unroll=5"]
    refused = run("train", tiny, "--out", cut, "--seed", 3, "--resume", *changed, fails=True)
    assert "recipe.strategy.unroll is 4 there and 5 here" in refused.stderr
    refused = run("train", tiny, "--out", cut, "--seed", 4, "--resume", fails=True)
    assert "seed is 3 there and 4 here" in refused.stderr
    refused = run(
        "train", tiny, "--out", cut, "--seed", 3, "--resume", "--device", "cuda:7", fails=True
    )
    assert "device must be one of 'auto', 'cpu', not 'cuda:7'" in refused.stderr
    run("train", tiny, "--out", cut, "--seed", 3, "--resume", "--device", "cpu")
    assert metrics(whole) == metrics(cut)

    done = run(
        *("evaluate", whole / "student.safetensors", "--tasks", "digits-cnn", "--short"),
        *("--horizon", 2, "--budgets", 1, "--seeds", 1, "--teacher", "rmsprop", "--jobs", 1),
        *("--out", tmp_path / "compared", "--cache", tmp_path / "cache", "--device", "cpu"),
    )
    assert "rmsprop" in done.stdout
    assert (tmp_path / "compared" / "plots" / "digits-cnn.png").exists()


def test_a_two_stage_run_killed_in_both_stages_ends_in_the_same_bytes(tmp_path, chance) -> None:
    recipe = tmp_path / "two.toml"
    recipe.write_text(TWO_STAGES)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run("train", recipe, "--out", whole, "--seed", 2)
    for expected in ("meta-training the choice", "student", "choice", "rmsprop", "adam"):
        assert expected in done.stdout
    cuts = [
        ("choice/metrics.jsonl", chance.randrange(1, 6)),
        ("metrics.jsonl", chance.randrange(1, 6)),
        ("metrics.jsonl", chance.randrange(7, 14)),
    ]
    assert killed(cut, cuts, chance, "train", recipe, "--out", cut, "--seed", 2) >= 2
    run("train", recipe, "--out", cut, "--seed", 2, "--resume")
    for name in ("choice/student.safetensors", "student.safetensors", "evaluation.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    for name in (".", "choice"):
        assert metrics(whole / name) == metrics(cut / name)
    choice = load_policy(whole / "choice" / "student.safetensors")
    assert isinstance(choice, Choice)
    assert choice.provenance["teachers"] == []
    assert load_policy(whole / "student.safetensors").provenance["teachers"] == ["choice"]


def test_replicates_are_evaluated_and_their_spread_is_reported(tiny, tmp_path) -> None:
    short = ["--set", "strategy.stages=[{episodes=2}]", "--set", "replicates=3"]
    done = run("train", tiny, "--out", tmp_path / "run", *short)
    for expected in ("student 0", "student 2", "between 3 replicates"):
        assert expected in done.stdout
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
def test_torchrun(tiny, tmp_path) -> None:
    """One process reports, evaluates and writes; an error is shown once."""
    out, short = tmp_path / "run", ["--set", "strategy.stages=[{episodes=2}]", "--set", "threads=1"]
    train = ["-m", "amalgam.cli", "train", tiny]
    done = together(*train, "--out", out, *short)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("run folder:") == 1
    assert done.stdout.count("loss after 4") == 1
    assert not list(out.rglob(".*"))
    alone = tmp_path / "alone"
    run("train", tiny, "--out", alone, *short, "--set", "training.optimizees=2")
    ours, theirs = (Student.load(d / "student.safetensors").weights() for d in (alone, out))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=2e-5)

    refused = together(*train, "--out", out, *short)
    assert refused.returncode != 0
    assert (refused.stdout + refused.stderr).count("holds a run already") == 1
    wrong = together(*train, "--out", tmp_path / "x", "--set", "strategy.unrol=3")
    assert (wrong.stdout + wrong.stderr).count("the nearest is 'strategy.unroll'") == 1
    assert not (tmp_path / "x").exists()


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


def test_errors_have_no_traceback(tiny, tmp_path) -> None:
    done = run("train", tiny, "--out", tmp_path / "x", "--set", "strategy.unrol=3", fails=True)
    assert done.stderr.strip().startswith("error:")
    assert "the nearest is 'strategy.unroll'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()
    done = run("evaluate", tmp_path / "none.safetensors", fails=True)
    assert "none.safetensors" in done.stderr


def test_info() -> None:
    report = json.loads(run("info", "--json").stdout)
    backends = {backend["name"]: backend for backend in report["backends"]}
    assert backends["reference"]["works"]
    for backend in backends.values():
        assert backend["works"] == (backend["reason"] is None)
    assert "digits" in report["recipes"]
    text = run("info").stdout
    assert "reference" in text
    assert "student_step" in text
