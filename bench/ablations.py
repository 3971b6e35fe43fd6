"""Ablations of the second student: what each of its inputs and settings is worth.

python bench/ablations.py run FOLDER      # meta-trains every variant, seed 0 first; resumable
python bench/ablations.py baselines FOLDER
python bench/ablations.py table FOLDER    # Markdown, from the rows
python bench/ablations.py gather FOLDER FILE.json

A run meta-trains one variant of the student on :data:`amalgam.tasks.SMALL` by the package's unroll
engine and leaves a row, a JSON file in FOLDER. A row that exists is not computed again. Runs of one
seed see the same tasks, optimizees and batches in the same order, except where the variant changes
what a meta-step takes. Everything runs in one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amalgam.heap import keep_freed_memory
from amalgam.layout import Layout
from amalgam.meta import Amalgamation, Trajectories, Unroll
from amalgam.operations import lstm
from amalgam.policies import Pool
from amalgam.policies.lstm_policy import Cell
from amalgam.policies.policy import PolicyConfig, ReferencePolicy, zero_head
from amalgam.seeding import generator_for
from amalgam.tasks import HELD_OUT, SMALL, Task, small
from amalgam.tasks.task import Batches
from amalgam.version import describe

# Decays of the further momenta.
_DECAYS = (0.5, 0.99)
# Below eps squared, so it changes no update.
_TINY = 1e-36
_LONGER = ("mlp-relu-2", "cnn", "autoencoder-3", "attention")
_EPS = 1e-10
# What counts where a run's last loss is larger, or not finite.
_WORST = 3.0


class NominalState(NamedTuple):
    """The student's state, for N coordinates.

    Attributes:
        m: First moments, (1, N), or (3, N) with further momenta.
        v: Second moment, (N,).
        h: The layer's outputs, (1, units, N).
        c: Its cells, likewise.
        p: The parameters, (N,); empty where no variant asks for them.
        t: Steps taken.
    """

    m: Tensor
    v: Tensor
    h: Tensor
    c: Tensor
    p: Tensor
    t: int


@dataclass(frozen=True, kw_only=True)
class NominalConfig(PolicyConfig):
    """Which parts of the student there are.

    Attributes:
        units: Units of the LSTM.
        correction: Whether the second output adds a multiple of the gradient to the direction.
        time: Whether tanh(t / 10), tanh(t / 100) and tanh(t / 1000) are inputs.
        shape: Whether a tensor's rank / 2 and log(fan-in) / 4 are inputs.
        rms: Whether log(RMS of a tensor's parameters + 0.001) / 4 is an input.
        factor_floor: Where given, updates are multiplied by max(RMS, factor_floor).
        momenta: Whether momenta of decays 0.5 and 0.99 are inputs: tanh|a_k| and tanh(a a_k).
        lr: The update's size where the LSTM says nothing.
        gain: Of the first output.
    """

    units: int = 8
    correction: bool = True
    time: bool = True
    shape: bool = True
    rms: bool = True
    factor_floor: float | None = None
    momenta: bool = False
    lr: float = 0.005
    gain: float = 2.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-15
    warmup_steps: int = 0

    @property
    def sees_parameters(self) -> bool:
        """Whether anything depends on the parameters themselves."""
        return self.rms or self.factor_floor is not None

    @property
    def inputs(self) -> int:
        """Inputs of the LSTM."""
        return 3 + 2 * len(_DECAYS) * self.momenta + 3 * self.time + 2 * self.shape + self.rms


class NominalReference(ReferencePolicy):
    """The second student in plain PyTorch, with switches.

    It takes the arguments of :class:`amalgam.policies.Policy`.
    """

    config_type = NominalConfig
    config: NominalConfig
    coordinatewise = False

    def build(self, generator: torch.Generator | None) -> None:
        self.cell = Cell(self.config.inputs, self.config.units, generator)
        self.head = zero_head(self.config.units, 2 if self.config.correction else 1)
        betas = (self.config.beta1, *(_DECAYS if self.config.momenta else ()))
        self._betas = torch.tensor(betas)[:, None]
        self._tensors: tuple[Layout, _Tensors] | None = None

    def initial_state(self, like: Tensor, layout: Layout | None = None) -> NominalState:
        """The state before the first step, for parameters ``like``, shape (N,)."""
        momenta = 1 + len(_DECAYS) * self.config.momenta
        cells = like.new_zeros((1, self.config.units, len(like)))
        p = like.detach().clone() if self.config.sees_parameters else like.new_zeros(0)
        return NominalState(
            like.new_zeros((momenta, len(like))), torch.zeros_like(like), cells, cells, p, 0
        )

    def compute(
        self, grad: Tensor, state: NominalState, weights: Sequence[Tensor], layout: Layout | None
    ) -> tuple[Tensor, NominalState]:
        config, t = self.config, state.t + 1
        tensors = self._tensors_of(grad, layout)
        m = state.m.lerp(grad, 1 - self._betas)
        v = torch.addcmul(config.beta2 * state.v, grad, grad, value=1 - config.beta2)
        # The root has no derivative at 0, where no gradient has come yet: there nothing moves.
        root = (v / (1 - config.beta2**t)).clamp_min(_TINY).sqrt()
        r = torch.where(v > 0, 1 / (root + config.eps), 0)
        momenta, b = m / (1 - self._betas**t) * r, grad * r
        a, *others = momenta.unbind()
        size = b.abs()
        squashed = [a * b, size]
        for other in others:
            squashed += [other.abs(), a * other]
        inputs = [a.abs()[None], torch.stack(squashed).tanh()]
        with torch.no_grad():
            rms = tensors.rms(state.p) if config.sees_parameters else None
            per_tensor = self._per_tensor(tensors, rms, t)
            if per_tensor is not None:
                inputs.append(per_tensor[:, tensors.index])
        x = torch.cat(inputs)
        out, h, c = lstm.step(x, state.h, state.c, weights)
        o = torch.addmm(weights[-1][:, None], weights[-2], out)
        direction = a + o[1] * b / (1 + size / 3) if config.correction else a
        update = config.lr * (config.gain * o[0]).clamp(-7, 4).exp() * direction
        if config.factor_floor is not None and rms is not None:
            update = update * rms.clamp_min(config.factor_floor)[tensors.index]
        p = state.p - update.detach() if config.sees_parameters else state.p
        return update, NominalState(m, v, h, c, p.detach(), t)

    def warm_up(
        self, grad: Tensor, state: NominalState, *, layout: Layout | None = None
    ) -> NominalState:
        raise NotImplementedError("this student has no warm-up")

    def _per_tensor(self, tensors: _Tensors, rms: Tensor | None, t: int) -> Tensor | None:
        """The inputs that are the same for a whole tensor, (inputs, tensors)."""
        config, rows = self.config, []
        if config.time:
            rows += [torch.full_like(tensors.sizes, math.tanh(t / by)) for by in (10, 100, 1000)]
        if config.shape:
            rows += [tensors.ranks / 2, tensors.fan_ins.log() / 4]
        if config.rms and rms is not None:
            rows.append((rms + 1e-3).log() / 4)
        return torch.stack(rows) if rows else None

    def _tensors_of(self, grad: Tensor, layout: Layout | None) -> _Tensors:
        layout = layout or Layout({"": grad.shape})
        if self._tensors is None or self._tensors[0] is not layout:
            self._tensors = layout, _Tensors(layout, grad)
        return self._tensors[1]


class _Tensors:
    """What the student sees of each of a layout's tensors.

    Attributes:
        index: The number of the tensor that each coordinate belongs to, (N,).
        sizes: Coordinates of each tensor; this and what follows are floats, (tensors,).
        ranks: Its dimensions.
        fan_ins: The product of all dimensions but the first.
    """

    def __init__(self, layout: Layout, like: Tensor) -> None:
        shapes = list(layout.shapes.values())
        self.index = torch.arange(len(shapes)).repeat_interleave(torch.tensor(layout.sizes))
        self.sizes = like.new_tensor(layout.sizes)
        self.ranks = like.new_tensor([len(shape) for shape in shapes])
        self.fan_ins = like.new_tensor([math.prod(shape[1:]) for shape in shapes])

    def rms(self, p: Tensor) -> Tensor:
        """The root of the mean square of each tensor of a vector (N,)."""
        return (torch.zeros_like(self.sizes).index_add_(0, self.index, p * p) / self.sizes).sqrt()


@dataclass(frozen=True)
class Variant:
    """A student, and how it is meta-trained.

    Attributes:
        name: For tables and files.
        student: Its parts.
        second_order: See :class:`amalgam.meta.Amalgamation`.
        window: Steps of a window.
        tasks: Tasks in each meta-step.
        meta_steps: Meta-steps; none leaves the student as it begins.
        learning_rate: Adam's, on the student's weights, at the first meta-step.
    """

    name: str
    student: NominalConfig = field(default_factory=NominalConfig)
    second_order: bool = True
    window: int = 50
    tasks: int = 4
    meta_steps: int = 150
    learning_rate: float = 1e-3


def variants() -> list[Variant]:
    """The base, and one change of it at a time."""

    def with_student(name: str, **changes: Any) -> Variant:
        return Variant(name, NominalConfig(**changes))

    return [
        Variant("untrained", meta_steps=0),
        Variant("untrained, RMS factor", NominalConfig(factor_floor=0.01, lr=0.03), meta_steps=0),
        Variant("base"),
        with_student("without o2", correction=False),
        with_student("without time", time=False),
        with_student("with momenta", momenta=True),
        with_student("RMS factor, floor 0.01", factor_floor=0.01, lr=0.03),
        with_student("RMS factor, floor 0.1", factor_floor=0.1, lr=0.03),
        with_student("4 units", units=4),
        with_student("without RMS input", rms=False),
        with_student("without rank and fan-in", shape=False),
        Variant("first order", second_order=False),
        Variant("windows of 20", window=20),
        Variant("1 task a meta-step", tasks=1),
        with_student("2 units", units=2),
        with_student("without inputs of tensors", time=False, shape=False, rms=False),
        with_student("16 units", units=16),
        Variant("windows of 100", window=100),
        Variant("12 tasks a meta-step", tasks=12),
        Variant("meta-learning rate 0.003", learning_rate=3e-3),
        with_student("RMS factor, momenta", factor_floor=0.1, lr=0.03, momenta=True),
    ]


@dataclass
class _Episode:
    at: Trajectories
    windows: int


class MetaTraining:
    """Meta-trains a variant's student on all tasks.

    Args:
        variant: What to train.
        tasks: The tasks.
        seed: Decides everything random.

    Attributes:
        student: The student, trained so far.
        windows: Windows run.
        not_finite: Episodes ended because a loss, a gradient, an update or a meta-gradient was not
            finite.
    """

    shortest, longest = 100, 800
    largest_norm = 0.1

    def __init__(self, variant: Variant, tasks: Sequence[Task], seed: int) -> None:
        self.student = NominalReference(variant.student, generator=generator_for(seed, "weights"))
        self.windows = self.not_finite = 0
        self._variant, self._seed = variant, seed
        how = Amalgamation(scale_spread=0.3, second_order=variant.second_order)
        self._unrolls = [Unroll(task, self.student, Pool([]), how) for task in tasks]
        self._episodes: list[_Episode | None] = [None] * len(tasks)
        self._begun = [0] * len(tasks)
        self._meta_optimizer = torch.optim.Adam(
            self.student.parameters(), lr=variant.learning_rate, betas=(0.9, 0.99)
        )

    def run(self) -> None:
        """Take all meta-steps."""
        weights, steps = list(self.student.parameters()), self._variant.meta_steps
        for step in range(steps):
            for group in self._meta_optimizer.param_groups:
                cosine = (1 + math.cos(math.pi * step / steps)) / 2
                group["lr"] = self._variant.learning_rate * (0.05 + 0.95 * cosine)
            total = [torch.zeros_like(w) for w in weights]
            chosen = random.Random(f"{self._seed} {step}").sample(
                range(len(self._unrolls)), self._variant.tasks
            )
            for task in chosen:
                found = self._meta_gradient(task, step, weights)
                if found is not None:
                    torch._foreach_add_(total, list(found), alpha=1 / len(chosen))
            for weight, grad in zip(weights, total, strict=True):
                weight.grad = grad
            self._meta_optimizer.step()

    def _meta_gradient(
        self, task: int, step: int, weights: Sequence[Tensor]
    ) -> tuple[Tensor, ...] | None:
        """A task's next window's meta-gradient, clipped by its norm; ``None`` if not finite."""
        unroll, length = self._unrolls[task], self._variant.window
        episode = self._episodes[task] or self._begin(task)
        generator = generator_for(self._seed, "batches", task, step)
        batches = Batches.stack([unroll.task.batches(generator, length)])
        window = unroll.window(episode.at, batches)
        grads = torch.autograd.grad(window.meta_loss.sum(), weights)
        norm = torch.stack([g.norm() for g in grads]).norm()
        self.windows += 1
        if window.skipped.any() or not norm.isfinite():
            self.not_finite += 1
            self._episodes[task] = None
            return None
        episode = _Episode(window.end, episode.windows - 1)
        self._episodes[task] = episode if episode.windows else None
        factor = (self.largest_norm / (norm + 1e-12)).clamp_max(1)
        return tuple(g * factor for g in grads)

    def _begin(self, task: int) -> _Episode:
        purpose = ("episode", task, self._begun[task])
        self._begun[task] += 1
        logs = math.log(self.shortest), math.log(self.longest)
        horizon = math.exp(random.Random(f"{self._seed} {purpose}").uniform(*logs))
        begin = self._unrolls[task].begin(generator_for(self._seed, *purpose))
        return _Episode(begin, max(1, round(horizon / self._variant.window)))


Step = Callable[[Tensor, Tensor, float], Tensor]
"""Called with parameters, gradient and a factor on the learning rate; returns new parameters."""


def last_loss(
    task: Task, make: Callable[[Tensor], Step], steps: int, *, decays: bool, seed: int = 1
) -> float:
    """The log of the validation loss after training with ``make``'s steps, at most 3.

    Args:
        task: The task.
        make: Makes what takes the steps, for initial parameters (N,).
        steps: How many.
        decays: Whether the learning rate goes to zero linearly.
        seed: Decides initial parameters and batches.
    """
    params = task.init_params(generator_for(seed, "optimizee"))
    take = make(params)
    for number, batch in enumerate(task.batches(generator_for(seed, "batches"), steps)):
        leaf = params.requires_grad_()
        (grad,) = torch.autograd.grad(task.objective(leaf, batch), leaf)
        with torch.no_grad():
            params = take(params.detach(), grad, 1 - number / steps if decays else 1.0)
    with torch.no_grad():
        loss = math.log(task.objective(params, tuple(task.validation)).item() + _EPS)
    return min(loss, _WORST) if math.isfinite(loss) else _WORST


def steps_of(student: NominalReference, layout: Layout) -> Callable[[Tensor], Step]:
    """What makes a student's steps, for :func:`last_loss`."""

    def make(params: Tensor) -> Step:
        state = student.initial_state(params, layout)

        def take(params: Tensor, grad: Tensor, factor: float) -> Tensor:
            nonlocal state
            if student.config.sees_parameters:
                state = state._replace(p=params)
            update, state = student.step(grad, state, layout=layout)
            return params - factor * update

        return take

    return make


def steps_of_torch(
    optimizer: Callable[..., torch.optim.Optimizer], **settings: float
) -> Callable[[Tensor], Step]:
    """What makes the steps of an optimizer of PyTorch's, for :func:`last_loss`."""

    def make(params: Tensor) -> Step:
        own = nn.Parameter(params.detach().clone())
        taken = optimizer([own], **settings)

        def take(params: Tensor, grad: Tensor, factor: float) -> Tensor:
            own.grad = grad
            taken.param_groups[0]["lr"] = factor * settings["lr"]
            taken.step()
            return own.detach().clone()

        return take

    return make


def scores(
    makes: Callable[[Task], Callable[[Tensor], Step]], tasks: Iterable[Task], unseen: Iterable[Task]
) -> dict[str, dict[str, float]]:
    """Each task's :func:`last_loss`, by what is measured.

    Returns:
        ``"300"``: the tasks at 300 steps. ``"1000"``: four of them at 1,000. ``"unseen"``: the
        held-out architectures at 600; ``"unseen decayed"``: the same with linear decay.
    """
    tasks = list(tasks)
    longer = [task for task in tasks if task.name in _LONGER]

    def of(which: Iterable[Task], steps: int, decays: bool) -> dict[str, float]:
        return {task.name: last_loss(task, makes(task), steps, decays=decays) for task in which}

    return {
        "300": of(tasks, 300, False),
        "1000": of(longer, 1000, False),
        "unseen": of(unseen, 600, False),
        "unseen decayed": of(unseen, 600, True),
    }


def run_one(variant: Variant, seed: int, tasks: Sequence[Task], unseen: Sequence[Task]) -> Any:
    """Meta-train a variant and score it: its row."""
    began = time.perf_counter()
    training = MetaTraining(variant, tasks, seed)
    training.run()
    trained = time.perf_counter()
    student = training.student
    found = scores(lambda task: steps_of(student, task.layout), tasks, unseen)
    return {
        "variant": variant.name,
        "seed": seed,
        "settings": asdict(variant),
        "windows": training.windows,
        "inner_steps": training.windows * variant.window,
        "not_finite": training.not_finite,
        "seconds_training": round(trained - began, 1),
        "seconds_scoring": round(time.perf_counter() - trained, 1),
        "scores": found,
    }


def baselines() -> dict[str, Callable[[Tensor], Step]]:
    """Nine analytical optimizers."""
    optim = torch.optim
    return {
        **{f"Adam {lr}": steps_of_torch(optim.Adam, lr=lr) for lr in (0.001, 0.003, 0.01, 0.03)},
        **{f"RMSprop {lr}": steps_of_torch(optim.RMSprop, lr=lr) for lr in (0.003, 0.01)},
        **{
            f"SGD {lr}, momentum 0.9": steps_of_torch(optim.SGD, lr=lr, momentum=0.9)
            for lr in (0.03, 0.1, 0.3)
        },
    }


def about() -> dict[str, Any]:
    """Where a row comes from."""
    return {
        **describe(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
        "load": round(os.getloadavg()[0], 2),
    }


def write(path: Path, row: Any) -> None:
    """Write a row, which appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**row, **about()}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def file_of(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name.replace(' ', '-').replace(',', '')}.{seed}.json"


def read(folder: Path) -> list[dict[str, Any]]:
    """All rows of a folder, or of a file that ``gather`` wrote."""
    if folder.is_file():
        return list(json.loads(folder.read_text(encoding="utf-8")))
    return [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]


def mean(scores: dict[str, float]) -> float:
    return fmean(scores.values())


_COLUMNS = ("300", "1000", "deep", "deep decayed", "wide", "wide decayed")


def columns(scores: dict[str, dict[str, float]]) -> list[float]:
    """What a row of the table shows."""
    found = [mean(scores[name]) for name in _COLUMNS[:2]]
    for name in ("deep", "wide"):
        found += [scores["unseen"][name], scores["unseen decayed"][name]]
    return found


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """On each task the best of the rows' scores."""
    first = rows[0]["scores"]
    return {
        what: {task: min(row["scores"][what][task] for row in rows) for task in by_task}
        for what, by_task in first.items()
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown.

    A variant's scores are means over its seeds. Beside them stand each seed's score at 300 steps,
    what it is more than the base's of the same seed, and on how many tasks it is less.
    """
    lines = [
        f"| | seeds | {' | '.join(_COLUMNS)} | 300 by seed | less base's | tasks better "
        "| inner steps | not finite |",
        f"|---|{'---:|' * (len(_COLUMNS) + 6)}",
    ]
    base = {r["seed"]: r["scores"]["300"] for r in rows if r.get("variant") == "base"}
    order = [variant.name for variant in variants()]
    for name in sorted({r["variant"] for r in rows if "variant" in r}, key=order.index):
        own = sorted((r for r in rows if r.get("variant") == name), key=lambda r: int(r["seed"]))
        shown = [fmean(column) for column in zip(*(columns(r["scores"]) for r in own), strict=True)]
        paired = [(r["scores"]["300"], base[r["seed"]]) for r in own if r["seed"] in base]
        cells = [
            str(len(own)),
            *(f"{x:.3f}" for x in shown),
            " ".join(f"{mean(r['scores']['300']):.3f}" for r in own),
            " ".join(f"{mean(ours) - mean(bases):+.3f}" for ours, bases in paired),
            " ".join(str(sum(ours[t] < bases[t] for t in ours)) for ours, bases in paired),
            f"{own[0]['inner_steps']:,}",
            " ".join(str(r["not_finite"]) for r in own),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    others = [row for row in rows if "baseline" in row]
    names = list(baselines())
    ordered = sorted(others, key=lambda row: names.index(row["baseline"]))
    context = [(row["baseline"], row["scores"]) for row in ordered]
    if others:
        context.append(("the best of these on each task", best_of(others)))
    for name, found in context:
        shown = columns(found)
        lines.append(f"| {name} | | {' | '.join(f'{x:.3f}' for x in shown)} | | | | | |")
    return "\n".join(lines)


def _task(name: str) -> Task:
    """A small task, called by its optimizee's name."""
    task = small(optimizee=name)
    task.name = name
    return task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("command", choices=("run", "baselines", "table", "gather"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path, nargs="?", help="what gather writes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variants", nargs="+", help="their names; all by default")
    parser.add_argument("--meta-steps", type=int, help="for all trained variants, to try it out")
    given = parser.parse_args()
    if given.command == "table":
        print(table(read(given.folder)))
        return
    if given.command == "gather":
        if given.file is None:
            parser.error("gather needs the file to write")
        given.file.parent.mkdir(parents=True, exist_ok=True)
        given.file.write_text(json.dumps(read(given.folder)) + "\n", encoding="utf-8")
        return
    torch.set_num_threads(1)
    keep_freed_memory()
    tasks, unseen = (list(map(_task, names)) for names in (SMALL, HELD_OUT))
    if given.command == "baselines":
        for name, make in baselines().items():
            path = file_of(given.folder, name, 0)
            if not path.exists():
                found = scores(lambda task, make=make: make, tasks, unseen)  # type: ignore[misc]
                write(path, {"baseline": name, "scores": found})
        return
    chosen = variants()
    unknown = set(given.variants or ()) - {variant.name for variant in chosen}
    if unknown:
        names = [variant.name for variant in chosen]
        parser.error(f"--variants must be among {names}, not {sorted(unknown)}")
    for seed in given.seeds:
        for variant in chosen:
            if given.variants and variant.name not in given.variants:
                continue
            if given.meta_steps is not None and variant.meta_steps:
                variant = replace(variant, meta_steps=given.meta_steps)
            path = file_of(given.folder, variant.name, seed)
            if not path.exists():
                row = run_one(variant, seed, tasks, unseen)
                write(path, row)
                print(f"{variant.name} {seed}: {mean(row['scores']['300']):.3f}", flush=True)


if __name__ == "__main__":
    main()
