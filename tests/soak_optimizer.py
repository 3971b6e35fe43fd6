"""Thousands of steps of AmalgamatedOptimizer with faults, beside the same steps without.

python tests/soak_optimizer.py [--steps 10000] [--kills 10] [--seed 0] [--only NAME]

A small network with parameters of several dtypes is trained twice. In both runs gradients are
missing, learning rates and weight decay change, and a group is added. In one of them, besides,

- gradients are poisoned with NaN, infinities and numbers too large to be squared, and the step is
  tried again with the clean ones; where tensors are skipped alone, the other run's has no gradient;
- parameters are frozen where the other run's have no gradient, and thawed;
- steps come without any gradient, loads are refused, and the number of threads changes, but where
  updates are orthogonalised;
- the optimizer is copied, pickled, and saved and loaded, into itself and into a new one;
- the process is killed, and a new one goes on from the last checkpoint.

Then parameters and state are the same bits in both, finite throughout, and every skip was counted.
Faults are drawn from the seed and the step, so a run that fails fails again.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amalgam import AmalgamatedOptimizer, NominalConfig, NominalStudent
from amalgam.files import whole
from amalgam.optimizers.base import computing_dtype

CHECKPOINT_EVERY = 25
KINDS = ("nan", "inf", "-inf", "huge")
ROWS, INPUTS, WIDTH, OUTPUTS = 11, 7, 61, 3  # several threads are worth it
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "standard": {"student": "standard"},
    "standard, bfloat16": {
        "student": "standard",
        "cells_dtype": torch.bfloat16,
        "moments_dtype": torch.bfloat16,
        "rounding": "stochastic",
        "seed": 5,
        "nonfinite": "skip-tensor",
    },
    "standard, 8 bits": {
        "student": "standard",
        "cells_dtype": torch.int8,
        "moments_dtype": torch.bfloat16,
        "rounding": "stochastic",
        "seed": 5,
    },
    "compact": {"student": "compact"},
    "paper's": {"student": "digits", "nonfinite": "raise"},
}


class Network(nn.Module):
    """Odd shapes, a scalar, an empty tensor, one that is never used, and three dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(ROWS, INPUTS)
        self.first = nn.Linear(INPUTS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.low = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
        self.last = nn.Linear(WIDTH, OUTPUTS)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.idle = nn.Parameter(torch.ones(5))

    def forward(self, numbers: Tensor) -> Tensor:
        hidden = self.norm(self.first(self.rows(numbers)))
        hidden = hidden + self.low(hidden.bfloat16().tanh()).float()
        return self.last(hidden) * self.scale.float() + self.empty.sum()


class Plan(NamedTuple):
    """What happens in a step.

    Attributes:
        without: Names of the parameters without gradient.
        poisoned: The name of the one whose gradient is poisoned, if one is, and the kind of poison.
        faults: What else happens before the step, in the faulty run alone.
        threads: How many compute the faulty run's step.
    """

    without: frozenset[str]
    poisoned: tuple[str, str] | None
    faults: tuple[str, ...]
    threads: int


FAULTS = {
    "no gradient": 0.02,
    "refused load": 0.01,
    "load into itself": 0.02,
    "resume": 0.02,
    "deepcopy": 0.01,
    "pickle": 0.02,
}


def plan_of(seed: int, step: int, names: Sequence[str]) -> Plan:
    """What is drawn of the seed and the step; what lasts longer than one step, of the period.

    Args:
        seed: The run's.
        step: Which it is, from 0.
        names: Of the parameters that the optimizer has.
    """
    of_step, of_period = (
        random.Random(f"{seed} {kind}") for kind in (f"step {step}", f"period {step // 9}")
    )
    without = set(of_period.sample(names, 2)) if of_period.random() < 0.3 else set()
    if of_step.random() < 0.05:
        without.add(of_step.choice(names))
    with_gradients = sorted(set(names) - without - {"empty", "idle"})
    poisoned = None
    if of_step.random() < 0.05:
        poisoned = of_step.choice(with_gradients), of_step.choice(KINDS)
    faults = tuple(name for name, share in FAULTS.items() if of_step.random() < share)
    return Plan(frozenset(without), poisoned, faults, of_step.choice((1, 1, 1, 2, 3)))


def optimizer_of(model: Network, name: str, student: Any = None) -> AmalgamatedOptimizer:
    how = dict(CONFIGURATIONS[name])
    if student is not None:
        how["student"] = student
    named = [(n, p) for n, p in model.named_parameters() if not n.startswith("last")]
    return AmalgamatedOptimizer(named, **how)


def add_late_group(model: Network, optimizer: AmalgamatedOptimizer) -> None:
    named = [(n, p) for n, p in model.named_parameters() if n.startswith("last")]
    optimizer.add_param_group({"params": named, "weight_decay": 1e-4})


class Run:
    """A run without faults.

    Args:
        name: One of CONFIGURATIONS.
        seed: What first parameters, batches and plans are drawn of.
        steps: How many the whole run has; the second group comes after a third of them.
    """

    def __init__(self, name: str, seed: int, steps: int) -> None:
        self.name, self.seed, self.steps = name, seed, steps
        torch.manual_seed(seed)
        self.model = Network()
        self.optimizer = optimizer_of(self.model, name)
        self.taken = 0
        self.digests: list[str] = []

    def go(self) -> None:
        """Take the steps that are left."""
        while self.taken < self.steps:
            groups = self.optimizer.param_groups
            if self.taken >= self.steps // 3 and len(groups) == 1:
                add_late_group(self.model, self.optimizer)
            names = [name for group in groups for name in group["param_names"]]
            self.step(plan_of(self.seed, self.taken, names))
            self.taken += 1
            self.check_finite()
            self.digests.append(self.digest())

    def step(self, plan: Plan) -> None:
        for number, group in enumerate(self.optimizer.param_groups):
            group["lr"] = 0.55 + 0.45 * math.cos(self.taken / (37 + number))
            if self.taken % 101 == 100:
                group["weight_decay"] = (0.0, 1e-5, 1e-4)[self.taken // 101 % 3]
        self.optimizer.zero_grad()
        self.compute_gradients(plan.without)
        self.update(plan)

    def compute_gradients(self, without: frozenset[str]) -> None:
        self.loss().backward()
        for name, param in self.model.named_parameters():
            if name in without:
                param.grad = None

    def loss(self) -> Tensor:
        """How far from a table, of which every step sees some rows with noise."""
        table = torch.linspace(-1, 1, ROWS * OUTPUTS).sin().view(ROWS, OUTPUTS)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.taken)
        numbers = torch.randint(ROWS, (16,), generator=generator)
        noise = torch.randn(16, OUTPUTS, generator=generator)
        return nn.functional.mse_loss(self.model(numbers), table[numbers] + 0.3 * noise)

    def update(self, plan: Plan) -> None:
        if plan.poisoned is not None and self.optimizer.nonfinite == "skip-tensor":
            self.param(plan.poisoned[0]).grad = None
        self.optimizer.step()

    def param(self, name: str) -> Tensor:
        return dict(self.model.named_parameters())[name]

    def numbers(self) -> dict[str, Tensor]:
        """Parameters and state, by name."""
        found = {}
        for name, param in self.model.named_parameters():
            found[name] = param.detach()
            for part, value in self.optimizer.state.get(param, {}).items():
                found[f"{name}, {part}"] = value
        return found

    def check_finite(self) -> None:
        for name, value in self.numbers().items():
            if not value.isfinite().all():
                raise AssertionError(f"{name} is not finite after step {self.taken}")

    def digest(self) -> str:
        """Of the parameters."""
        made = hashlib.blake2b(digest_size=8)
        for param in self.model.parameters():
            made.update(param.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        return made.hexdigest()


class FaultyRun(Run):
    """The same run with faults, which a folder's checkpoint lets another process go on with.

    Args:
        name: One of CONFIGURATIONS.
        seed: As of :class:`Run`.
        steps: Likewise.
        folder: For the checkpoint, from which it goes on where there is one.
        kill_at: The step in which it kills its process.
    """

    def __init__(
        self, name: str, seed: int, steps: int, folder: Path, kill_at: int | None = None
    ) -> None:
        super().__init__(name, seed, steps)
        self.kill_at = kill_at
        self.checkpoint = folder / "checkpoint.pt"
        self.happened: Counter[str] = Counter()
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, weights_only=True)
            self.taken, self.digests = saved["taken"], saved["digests"]
            self.happened = Counter(saved["happened"])
            self.renew(saved["model"], saved["optimizer"])

    def step(self, plan: Plan) -> None:
        if self.taken % CHECKPOINT_EVERY == 0:
            self.save()
        for fault in plan.faults:
            self.meet(fault)
            self.happened[fault] += 1
        super().step(plan)

    def save(self) -> None:
        with whole(self.checkpoint) as beside:
            torch.save(
                {
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "taken": self.taken,
                    "digests": self.digests,
                    "happened": dict(self.happened),
                },
                beside,
            )

    def renew(self, of_model: dict[str, Any], of_optimizer: dict[str, Any]) -> None:
        """Go on with a new model and a new optimizer, whose student is the checkpoint's."""
        self.model = Network()
        self.model.load_state_dict(of_model)
        self.optimizer = optimizer_of(self.model, self.name, student=of_optimizer)
        if len(of_optimizer["param_groups"]) > 1:
            add_late_group(self.model, self.optimizer)
        self.optimizer.load_state_dict(of_optimizer)

    def meet(self, fault: str) -> None:
        if fault == "no gradient":
            self.optimizer.zero_grad()
            with self.unchanged(fault):
                self.optimizer.step()
        elif fault == "refused load":
            other = AmalgamatedOptimizer(self.optimizer.param_groups[0]["params"], student=OTHER)
            with self.unchanged(fault):
                expect(ValueError, lambda: self.optimizer.load_state_dict(other.state_dict()))
        elif fault == "deepcopy":
            self.model, self.optimizer = copy.deepcopy((self.model, self.optimizer))
        elif fault == "pickle":
            pickled = pickle.dumps((self.model, self.optimizer))
            self.model, self.optimizer = pickle.loads(pickled)
        else:
            file = io.BytesIO()
            torch.save((self.model.state_dict(), self.optimizer.state_dict()), file)
            file.seek(0)
            of_model, of_optimizer = torch.load(file, weights_only=True)
            if fault == "resume":
                self.renew(of_model, of_optimizer)
            else:
                self.optimizer.load_state_dict(of_optimizer)

    def compute_gradients(self, without: frozenset[str]) -> None:
        """The same gradients, but what has none is frozen, until the next step."""
        for name, param in self.model.named_parameters():
            param.requires_grad_(name not in without)
        self.happened["frozen"] += len(without)
        self.loss().backward()

    def update(self, plan: Plan) -> None:
        if self.taken == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        before = torch.get_num_threads()
        # Products of matrices may have other last bits by other numbers of threads.
        threads = 1 if self.optimizer.param_groups[0]["orthogonal"] else plan.threads
        torch.set_num_threads(threads)
        self.happened["several threads"] += threads > 1
        if plan.poisoned is None or not self.step_poisoned(*plan.poisoned):
            self.optimizer.step()
        torch.set_num_threads(before)

    def step_poisoned(self, name: str, kind: str) -> bool:
        """Step with a gradient that is not finite, or too large.

        Returns:
            Whether that was the step, which the other parameters have taken.
        """
        self.happened[f"{kind} gradient"] += 1
        param = self.param(name)
        clean = param.grad.clone()
        largest = math.sqrt(torch.finfo(computing_dtype(param.dtype)).max)
        element = self.taken % param.numel()
        param.grad.view(-1)[element] = 2 * largest if kind == "huge" else float(kind)
        if self.optimizer.nonfinite == "skip-tensor":
            with self.unchanged(f"{kind} gradient", name):
                self.optimizer.step()
            return True
        with self.unchanged(f"{kind} gradient"):
            if self.optimizer.nonfinite == "raise":
                expect(RuntimeError, self.optimizer.step)
            else:
                self.optimizer.step()
        param.grad.copy_(clean)
        return False

    @contextmanager
    def unchanged(self, fault: str, of: str = "") -> Iterator[None]:
        """Raise AssertionError where parameters, or one of them, or their state change in it."""
        before = {name: value.clone() for name, value in self.numbers().items()}
        yield
        after = self.numbers()
        for name in before.keys() | after.keys():
            mine = not of or name.split(",")[0] == of
            if mine and not (name in before and torch.equal(before[name], after[name])):
                raise AssertionError(f"{fault} changed {name} in step {self.taken}")


OTHER = NominalStudent(NominalConfig(hidden=2), generator=torch.Generator().manual_seed(0))


def expect(kind: type[Exception], call: Callable[[], object]) -> None:
    """Raise AssertionError unless a call raises such an exception."""
    try:
        call()
    except kind:
        return
    raise AssertionError(f"{call} did not raise {kind.__name__}")


def soak(name: str, steps: int, kills: int, seed: int, folder: Path) -> str:
    """Run with and without faults, the former in processes that are killed.

    Args:
        name: One of CONFIGURATIONS.
        steps: Of each run.
        kills: How many processes are killed, at steps drawn of the seed.
        seed: Of everything that is drawn.
        folder: An empty one, for checkpoints.

    Returns:
        What happened, in a line.

    Raises:
        AssertionError: Something was not finite, not the same in both runs, or not counted.
    """
    begun = time.monotonic()
    points = sorted(random.Random(f"{seed} kills").sample(range(steps), kills))
    for point in [*points, None]:
        worker = [sys.executable, __file__, "--worker", str(folder), "--only", name]
        worker += ["--steps", str(steps), "--seed", str(seed)]
        worker += [] if point is None else ["--kill-at", str(point)]
        done = subprocess.run(worker, capture_output=True, text=True)
        if done.returncode != (0 if point is None else -signal.SIGKILL):
            raise AssertionError(
                f"{name}, seed {seed}, to be killed at {point}: exit status {done.returncode}\n"
                f"{done.stderr}"
            )
    plain, faulty = Run(name, seed, steps), FaultyRun(name, seed, steps, folder)
    plain.go()
    where = f"{name}, seed {seed}"
    if plain.digests != faulty.digests:
        pairs = zip(plain.digests, faulty.digests, strict=False)
        step = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
        raise AssertionError(f"{where}: parameters differ after step {step}")
    ours, theirs = faulty.numbers(), plain.numbers()
    differ = [n for n in ours.keys() | theirs.keys() if not torch.equal(ours[n], theirs[n])]
    if differ or faulty.taken != steps:
        raise AssertionError(f"{where}: differ after {faulty.taken} steps: {differ}")
    poisoned = sum(faulty.happened[f"{kind} gradient"] for kind in KINDS)
    counted = 0 if faulty.optimizer.nonfinite == "raise" else poisoned
    if faulty.optimizer.skipped_steps != counted:
        raise AssertionError(
            f"{where}: counted {faulty.optimizer.skipped_steps} skips of {counted}"
        )
    moved = max((n.abs().max().item() for n in theirs.values() if n.numel()), default=0.0)
    happened = ", ".join(f"{what} {count}" for what, count in sorted(faulty.happened.items()))
    return (
        f"{where}: {steps} steps, killed {kills} times, the same bits in {len(ours)} tensors, the "
        f"largest number {moved:.3g}; {happened}; {time.monotonic() - begun:.0f} s"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(CONFIGURATIONS))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kill-at", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    # Of the skips, which are what is looked for.
    warnings.simplefilter("ignore", RuntimeWarning)
    torch.set_num_threads(1)
    if options.worker is not None:
        run = FaultyRun(options.only, options.seed, options.steps, options.worker, options.kill_at)
        run.go()
        run.save()
        return
    for name in [options.only] if options.only else CONFIGURATIONS:
        with tempfile.TemporaryDirectory() as folder:
            line = soak(name, options.steps, options.kills, options.seed, Path(folder))
            print(line, flush=True)


if __name__ == "__main__":
    main()
