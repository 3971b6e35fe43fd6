"""How optimizers are compared: same tasks, same seeds, same steps, losses on unseen data.

The words used here: a *horizon* is a number of steps, and a *budget* a multiple of it that a run
may take. A contender whose rate decays makes a run for each budget, at whose end its rate is zero;
one at a constant rate makes one run, of the largest budget, which is read at each. A *baseline* is
tuned on a grid, with seeds of its own: the setting with the smallest mean validation loss at the
horizon is the one that runs, at every budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

import numpy as np

from amalgam.evaluation.contenders import (
    BASELINES,
    DECAYS,
    Contender,
    Setting,
    baseline,
    contenders_of,
    grid,
)
from amalgam.evaluation.runner import About, Run, Runner
from amalgam.evaluation.runs import Curve, Readings
from amalgam.ranges import check_fields, check_kind

TUNING_SEED = 10_000
"""The first of the seeds that baselines are tuned with; those of the reported runs begin at 0."""

RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
"""The paper's grid of learning rates."""

REFERENCE = "Adam"
"""The baseline that others are measured against, at the better of its decays."""

ONE_SETTING = "AdamW, one setting"
DEFAULTS = "AdamW, PyTorch's defaults"
_UNTUNED = (ONE_SETTING, DEFAULTS)
ORACLE = "oracle"

_FULL_GRIDS: dict[str, tuple[Setting, ...]] = {
    "Adam": grid(lr=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)),
    "AdamW": grid(lr=(1e-3, 3e-3, 1e-2, 3e-2), weight_decay=(0.01, 0.1, 1.0)),
    "SGD": grid(lr=(3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0), momentum=(0.9,)),
    "RMSprop": grid(lr=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "Muon": grid(lr=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)),
}
_SHORT_GRIDS: dict[str, tuple[Setting, ...]] = {
    "Adam": grid(lr=(3e-3, 1e-2, 3e-2, 0.1)),
    "AdamW": grid(lr=(1e-2, 3e-2), weight_decay=(0.01, 0.1)),
    "SGD": grid(lr=(0.03, 0.1, 0.3, 1.0), momentum=(0.9,)),
    "RMSprop": grid(lr=(1e-3, 3e-3, 1e-2)),
    "Muon": grid(lr=(1e-2, 3e-2, 0.1)),
}


@dataclass(frozen=True)
class Protocol:
    """What is run and read in an evaluation.

    Attributes:
        name: For tables.
        horizon: The horizon, in steps.
        budgets: Multiples of it at which contenders are read, ascending.
        seeds: Runs of each contender and budget.
        tuning_seeds: Runs of each point of a grid.
        decays: Of students and baselines; teachers' rates are constant.
        grids: For each baseline, the settings to tune over.
        falling_rates: Whether, with a decay, a baseline is tuned only over rates from the best
            constant one on: a rate that falls to zero covers less of the way than one that stays.
            AdamW is not where ``one_setting`` is, for which all its settings are ranked.
        one_setting: Whether AdamW runs also at the one setting that is best over all tasks, and at
            PyTorch's defaults.
        every: Steps between two readings of a curve; ``None`` for :attr:`curve` readings, at steps
            that are spaced evenly on a logarithmic axis.
        curve: How many they are then.
        timed: Whether the time of a step is told; without it an evaluation made anew is the same.
        curve_samples: Validation samples of each reading of a curve; all where ``None``.
        training_samples: Training samples of a reading at a budget, likewise.
        validation_samples: Validation samples of a reading at a budget, likewise.
    """

    name: str = "full"
    horizon: int = 1000
    budgets: tuple[float, ...] = (0.25, 1.0, 4.0, 10.0)
    seeds: int = 5
    tuning_seeds: int = 1
    decays: tuple[str, ...] = DECAYS
    grids: Mapping[str, tuple[Setting, ...]] = field(default_factory=lambda: dict(_FULL_GRIDS))
    falling_rates: bool = False
    one_setting: bool = True
    every: int | None = None
    curve: int = 24
    timed: bool = True
    curve_samples: int | None = 1000
    training_samples: int | None = 10_000
    validation_samples: int | None = None

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        samples = ("curve_samples", "training_samples", "validation_samples")
        check_fields(
            self,
            counts=(
                *("horizon", "seeds", "tuning_seeds", "curve", "every"),
                *(name for name in samples if getattr(self, name) is not None),
            ),
            positive=("budgets",),
        )
        if self.seeds > TUNING_SEED:
            raise ValueError(
                f"seeds must be at most {TUNING_SEED}, where those to tune with begin, "
                f"not {self.seeds}"
            )
        if 1.0 not in self.budgets or list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError(f"budgets must ascend and have 1 among them, not {self.budgets}")
        if len(set(self.steps)) < len(self.steps):
            raise ValueError(
                f"budgets must be of different steps, but {list(self.budgets)} times "
                f"{self.horizon} are {list(self.steps)}"
            )
        if self.budgets[0] * self.horizon < 1:
            raise ValueError(
                f"budgets must be 1 step or more, not {self.budgets[0]:g} times {self.horizon}"
            )
        for name, settings in self.grids.items():
            if name not in BASELINES:
                raise ValueError(f"grids must be of some of {list(BASELINES)}, not of {name!r}")
            if not settings:
                raise ValueError(
                    f"grids must hold one setting or more of {name!r}, such as grid(lr=(0.01,)), "
                    f"not none; leave {name!r} out to do without it"
                )
        distinct = set(self.decays)
        if not self.decays or not distinct <= set(DECAYS) or len(distinct) < len(self.decays):
            raise ValueError(f"decays must be some of {list(DECAYS)}, not {list(self.decays)}")

    @property
    def steps(self) -> tuple[int, ...]:
        """The budgets in steps."""
        return tuple(round(budget * self.horizon) for budget in self.budgets)

    def readings(self, steps: int) -> Readings:
        """What is read of a reported run of so many steps."""
        spaced = (
            np.geomspace(1, steps, self.curve)
            if self.every is None
            else np.arange(self.every, steps, self.every)
        )
        budgets = tuple(at for at in self.steps if at <= steps)
        return Readings(
            tuple(sorted({*(round(float(at)) for at in spaced), *budgets})),
            budgets,
            self.curve_samples,
            self.training_samples,
            self.validation_samples,
        )

    def tuning_readings(self) -> Readings:
        """What is read of a run that tunes."""
        return replace(self.readings(self.horizon), curve=(), full=(self.horizon,))

    def about(self) -> dict[str, Any]:
        """JSON-serialisable."""
        content: dict[str, Any] = {"horizon_steps": self.steps, **asdict(self)}
        content["grids"] = {
            name: [dict(setting) for setting in settings] for name, settings in self.grids.items()
        }
        return content


def short_protocol() -> Protocol:
    """A protocol for a look on a CPU: shorter runs, smaller grids, two seeds, small readings."""
    return Protocol(
        "short",
        horizon=100,
        budgets=(0.25, 1.0),
        seeds=2,
        grids=dict(_SHORT_GRIDS),
        falling_rates=True,
        curve=6,
        curve_samples=250,
        training_samples=250,
        validation_samples=1000,
    )


@dataclass(frozen=True)
class Result:
    """A contender's training runs on one task, within one budget.

    Attributes:
        name: The contender's name.
        task: The task's name.
        curves: The runs, one for each seed.
        kind: The contender's kind.
        decay: The contender's decay.
        settings: What was tuned.
        steps: The budget in steps.
    """

    name: str
    task: str
    curves: tuple[Curve, ...]
    kind: str = "baseline"
    decay: str = "constant"
    settings: str = ""
    steps: int = 0

    @property
    def diverged(self) -> int:
        """How many of the runs diverged; see :attr:`Curve.diverged`."""
        return sum(curve.diverged for curve in self.curves)

    @property
    def label(self) -> str:
        """Name and settings."""
        return f"{self.name} ({self.settings})" if self.settings else self.name

    def values(self, which: str) -> list[float]:
        """Of each run ``"final"``, ``"best"``, ``"training"`` or ``"accuracy"``."""
        return [float(getattr(curve, which)) for curve in self.curves]

    @property
    def scores(self) -> list[float]:
        """The runs' final losses as comparisons take them: infinite where a run diverged."""
        return [math.inf if curve.diverged else float(curve.final) for curve in self.curves]

    def summary(self, which: str) -> tuple[float, float]:
        """Mean and standard deviation over seeds of what :meth:`values` takes.

        Both are NaN where a value is not finite; the deviation also of a single run.
        """
        values = self.values(which)
        if not all(map(math.isfinite, values)):
            return math.nan, math.nan
        return fmean(values), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable, curves and all."""
        return {
            "name": self.name,
            "task": self.task,
            "kind": self.kind,
            "decay": self.decay,
            "settings": self.settings,
            "steps": self.steps,
            "diverged": self.diverged,
            "curves": [curve.as_dict() for curve in self.curves],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Result:
        """What :meth:`as_dict` gave.

        Raises:
            KeyError: Something is missing.
            TypeError: Something is of another type.
            ValueError: Something is no number.
        """
        return cls(
            content["name"],
            content["task"],
            tuple(Curve.from_dict(curve) for curve in content["curves"]),
            content["kind"],
            content["decay"],
            content["settings"],
            content["steps"],
        )


@dataclass(frozen=True)
class Tuning:
    """What tuning a baseline on one task came to.

    Attributes:
        task: The task's name.
        optimizer: The baseline's.
        decay: Its decay.
        settings: The grid's points that were tried, as text.
        losses: The mean validation loss of each, infinite where a run diverged.
        chosen: The index of the best.
        edge: What of the chosen setting is the smallest or largest of its values in the grid.
        runs: How many runs it took.
        steps: Steps of each.
    """

    task: str
    optimizer: str
    decay: str
    settings: tuple[str, ...]
    losses: tuple[float, ...]
    chosen: int
    edge: tuple[str, ...]
    runs: int
    steps: int


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        protocol: The protocol.
        tasks: What is known of the tasks.
        results: For each task, and then for each budget, the contenders' results in one order.
        tunings: What tuning came to.
    """

    protocol: Protocol
    tasks: tuple[About, ...]
    results: tuple[tuple[tuple[Result, ...], ...], ...]
    tunings: tuple[Tuning, ...] = ()

    @property
    def horizon(self) -> int:
        """The index of the budget that is the horizon."""
        return self.protocol.budgets.index(1.0)

    def at(self, budget: int) -> tuple[tuple[Result, ...], ...]:
        """For each task, the contenders' results within a budget.

        Args:
            budget: Its index.
        """
        return tuple(of_task[budget] for of_task in self.results)


def evaluate(
    runner: Runner,
    contenders: Sequence[Contender],
    protocol: Protocol,
) -> Evaluation:
    """Tune the baselines, then train every task with every contender over the same seeds.

    Args:
        runner: Makes the runs, of its tasks.
        contenders: What to compare with the baselines; their names differ.
        protocol: The protocol.

    Raises:
        TypeError: One of the contenders is none, or the protocol is none.
        ValueError: Two contenders, or two tasks, have one name; or there is nothing to evaluate.
    """
    contenders = contenders_of(contenders)
    check_kind("protocol", protocol, Protocol, "a Protocol, such as Protocol(horizon=100)")
    if not contenders and not protocol.grids:
        raise ValueError("contenders must be one or more where grids has no baseline, not none")
    tasks = range(len(runner.about))
    everybody = [
        each
        for contender in contenders
        for each in (
            [contender]
            if contender.kind == "teacher"
            else [contender.decaying(decay) for decay in protocol.decays]
        )
    ]
    known = [about.name for about in runner.about]
    tuned_names = [baseline(name, (), d).name for name in protocol.grids for d in protocol.decays]
    _check_differ("tasks", known)
    _check_differ("contenders", [*(one.name for one in everybody), *tuned_names, *_UNTUNED])
    one_setting = protocol.one_setting and "AdamW" in protocol.grids
    steps = _steps_of_task([one.decay for one in everybody], protocol, one_setting)
    runner.total += sum(runner.cost(task, steps) for task in tasks)

    # What was asked for comes first: a contender that fails does so before all the tuning.
    plans = [(task, contender) for task in tasks for contender in everybody]
    results = _run(runner, protocol, plans)
    found_settings = _tune(runner, protocol)
    tunings = [tuning for tuning, _ in found_settings]
    shared = _best_over_tasks(tunings, protocol) if one_setting else None
    tuned: list[_Plan] = []
    for task in tasks:
        tuned += [
            (task, baseline(one.optimizer, setting, one.decay))
            for one, setting in found_settings
            if one.task == known[task]
        ]
        if shared is not None:
            settings = "lr=0.001, weight_decay=0.01"
            defaults = replace(baseline("AdamW", (), "constant"), name=DEFAULTS, settings=settings)
            tuned += [(task, shared), (task, defaults)]
    plans += tuned
    results += _run(runner, protocol, tuned)
    found = tuple(
        tuple(
            tuple(
                of_budgets[budget]
                for (of, _), of_budgets in zip(plans, results, strict=True)
                if of == task
            )
            for budget in range(len(protocol.budgets))
        )
        for task in tasks
    )
    return Evaluation(protocol, runner.about, found, tuple(tunings))


_Plan = tuple[int, Contender]


def _run(runner: Runner, protocol: Protocol, plans: Sequence[_Plan]) -> list[list[Result]]:
    """For each task and contender the results within each budget."""
    made = iter(
        runner.run(
            [
                Run(task, contender, seed, steps, protocol.readings(steps), protocol.timed)
                for task, contender in plans
                for steps in _lengths(contender.decay, protocol)
                for seed in range(protocol.seeds)
            ]
        )
    )
    found = []
    for task, contender in plans:
        lengths = _lengths(contender.decay, protocol)
        by_length = {steps: [next(made) for _ in range(protocol.seeds)] for steps in lengths}
        found.append(
            [
                Result(
                    contender.name,
                    runner.about[task].name,
                    tuple(
                        curve.until(steps) if protocol.timed else curve.until(steps).untimed()
                        for curve in by_length.get(steps, by_length[lengths[-1]])
                    ),
                    contender.kind,
                    contender.decay,
                    contender.settings,
                    steps,
                )
                for steps in protocol.steps
            ]
        )
    return found


def _lengths(decay: str, protocol: Protocol) -> tuple[int, ...]:
    """Steps of the runs that a contender makes."""
    return protocol.steps[-1:] if decay == "constant" else protocol.steps


def _steps_of_task(decays: Sequence[str], protocol: Protocol, one_setting: bool) -> int:
    """Steps of all runs on one task, given the decays of the contenders that are not baselines."""
    reported = [*decays, *(decay for _ in protocol.grids for decay in protocol.decays)]
    if one_setting:
        # Its decay is yet to be found; the costlier one is expected.
        reported += ["linear", "constant"]
    points = sum(map(len, protocol.grids.values())) * len(protocol.decays)
    return (
        sum(sum(_lengths(decay, protocol)) for decay in reported) * protocol.seeds
        + points * protocol.tuning_seeds * protocol.horizon
    )


def _check_differ(what: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{what}' names must differ, and {name!r} is there twice")


_Cell = tuple[int, str, str]  # a task's index, a baseline's name, and a decay


def _tune(runner: Runner, protocol: Protocol) -> list[tuple[Tuning, Setting]]:
    """Every grid's results, task by task, and the settings that are the best."""
    cells = [
        (task, optimizer, decay)
        for task in range(len(runner.about))
        for optimizer in protocol.grids
        for decay in protocol.decays
    ]
    if not protocol.falling_rates:
        found = _tune_cells(runner, protocol, {c: protocol.grids[c[1]] for c in cells})
        return [found[cell] for cell in cells]
    constant = {c: protocol.grids[c[1]] for c in cells if c[2] == "constant"}
    found = _tune_cells(runner, protocol, constant)
    left = {}
    for cell in cells:
        if cell not in found:
            task, optimizer, _ = cell
            grid = protocol.grids[optimizer]
            least = _least_falling(found.get((task, optimizer, "constant")))
            if protocol.one_setting and optimizer == "AdamW":
                least = -math.inf  # its settings are ranked over all tasks
            left[cell] = tuple(one for one in grid if dict(one).get("lr", math.inf) >= least)
            spared = (len(grid) - len(left[cell])) * protocol.tuning_seeds * protocol.horizon
            runner.total -= runner.cost(task, spared)
    found |= _tune_cells(runner, protocol, left)
    return [found[cell] for cell in cells]


def _least_falling(constant: tuple[Tuning, Setting] | None) -> float:
    """The smallest rate to tune with a decay, of what tuning without one found."""
    if constant is None or math.isinf(min(constant[0].losses)):
        return -math.inf
    return dict(constant[1]).get("lr", -math.inf)


def _tune_cells(
    runner: Runner, protocol: Protocol, grids: Mapping[_Cell, Sequence[Setting]]
) -> dict[_Cell, tuple[Tuning, Setting]]:
    """The results of these grids, and the settings that are the best."""
    runs = [
        Run(
            task,
            baseline(optimizer, setting, decay),
            TUNING_SEED + seed,
            protocol.horizon,
            protocol.tuning_readings(),
            timed=False,
        )
        for (task, optimizer, decay), settings in grids.items()
        for setting in settings
        for seed in range(protocol.tuning_seeds)
    ]
    made = iter(runner.run(runs))
    found = {}
    for (task, optimizer, decay), settings in grids.items():
        losses = []
        for _ in settings:
            curves = [next(made) for _ in range(protocol.tuning_seeds)]
            diverged = any(curve.diverged for curve in curves)
            losses.append(math.inf if diverged else fmean(curve.final for curve in curves))
        chosen = min(range(len(losses)), key=losses.__getitem__)
        tuning = Tuning(
            runner.about[task].name,
            optimizer,
            decay,
            tuple(baseline(optimizer, setting, decay).settings for setting in settings),
            tuple(losses),
            chosen,
            _at_edge((settings, protocol.grids[optimizer]), settings[chosen]),
            len(settings) * protocol.tuning_seeds,
            protocol.horizon,
        )
        found[task, optimizer, decay] = tuning, settings[chosen]
    return found


def _at_edge(grids: Sequence[Sequence[Setting]], chosen: Setting) -> tuple[str, ...]:
    """Names of arguments whose chosen value is the smallest or the largest of several in a grid."""
    found = []
    for name, value in chosen:
        each = [sorted({dict(setting)[name] for setting in grid}) for grid in grids]
        if any(len(values) > 1 and value in (values[0], values[-1]) for values in each):
            found.append(name)
    return tuple(found)


def _best_over_tasks(tunings: Sequence[Tuning], protocol: Protocol) -> Contender:
    """AdamW at the setting and decay whose mean rank over the tasks, in tuning, is the smallest."""
    from scipy.stats import rankdata

    grid = protocol.grids["AdamW"]
    of_task: dict[str, list[float]] = {}
    for tuned in tunings:
        if tuned.optimizer == "AdamW":
            of_task.setdefault(tuned.task, []).extend(tuned.losses)
    # Ranks bear losses of any sign and scale, and diverged runs.
    ranks = np.mean([rankdata(losses) for losses in of_task.values()], axis=0)
    points = [(setting, decay) for decay in protocol.decays for setting in grid]
    found = baseline("AdamW", *points[int(np.argmin(ranks))])
    settings = f"{found.settings}, {found.decay}"
    return replace(found, name=ONE_SETTING, settings=settings)


def reference_of(results: Sequence[Result]) -> Result | None:
    """The tuned Adam that others are measured against on a task: the better of its decays.

    Args:
        results: The task's results within one budget.
    """
    return _best(
        [result for result in results if result.name in (REFERENCE, f"{REFERENCE}, linear")]
    )


def oracle_of(results: Sequence[Result]) -> Result | None:
    """The best of all tuned baselines on a task, in hindsight: by the reported runs themselves.

    Args:
        results: The task's results within one budget.
    """
    return _best([r for r in results if r.kind == "baseline" and r.name not in _UNTUNED])


def _best(results: Sequence[Result]) -> Result | None:
    def key(result: Result) -> tuple[bool, float]:
        mean = fmean(result.scores)
        return not math.isfinite(mean), mean

    return min(results, key=key, default=None)


def leader(results: Sequence[Result]) -> Result:
    """The result with the smallest mean final loss; one with diverged runs only if all have them.

    Args:
        results: Results of one task within one budget, at least one.
    """
    found = _best(results)
    if found is None:
        raise ValueError("results must not be empty")
    return found


def spread(replicates: Sequence[Result]) -> float:
    """Standard deviation over replicates of the mean log final validation loss (meta-stability).

    Args:
        replicates: Results of two or more replicates on one task.

    Returns:
        The deviation; NaN where there are fewer than two, or a loss has no logarithm.
    """
    finals = np.array([replicate.values("final") for replicate in replicates])
    if len(finals) < 2 or not np.isfinite(finals).all() or (finals < 0).any():
        return math.nan
    return float(np.std(np.log(finals + 1e-10).mean(1), ddof=1))
