"""Windows as graphs: on the CPU by a graph that repeats PyTorch's operations, then on a GPU."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from elsewhere import READS
from runs import linear_task, tiny_student
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from amalgam.meta import Amalgamation, Conditions, Memory, OnPolicy, Unroll, cuda_graph
from amalgam.meta.conditions import StepConditions
from amalgam.meta.cuda_graph import CudaGraph, WindowGraphs
from amalgam.meta.perturbation import Gaussian
from amalgam.meta.teaching import Teaching
from amalgam.meta.window import WindowInputs
from amalgam.policies import (
    Choice,
    ChoiceConfig,
    NominalConfig,
    NominalStudent,
    Policy,
    Pool,
)
from amalgam.policies.fused_student import ContextConstants
from amalgam.seeding import generator_for
from amalgam.tasks import Task
from amalgam.tasks.task import Batches

STEPS = 5
# The reference of the nominal form asks for the last one, and no kernel does.
REFUSED = READS - {torch.ops.aten.repeat_interleave}


class Repeated(TorchDispatchMode):
    """A graph of the CPU: the operations in it, on the tensors that they were asked of.

    As a CUDA graph would, it does nothing while it is captured but to lay out its memory, and it
    refuses to be read from.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []

    @contextmanager
    def capture(self) -> Iterator[None]:
        with self:
            yield
        for _, _, _, outs in self._calls:
            for out in outs:  # what the captured work left is not to be found
                if out.is_floating_point():
                    out.fill_(float("nan"))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket in REFUSED:
            raise RuntimeError(f"{func} reads from a stream that is capturing\nand so on")
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            given = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            made = [leaf for leaf in outs if id(leaf) not in given]
            self._calls.append((func, args, kwargs or {}, made))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self._calls:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            if made:
                for out, new in zip(made, again, strict=True):
                    out.copy_(new)


def network_task() -> Task:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 1, 4, 4, generator=generator), torch.arange(64) % 3

    def build() -> nn.Module:
        layers = (nn.Conv2d(1, 2, 2), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3))
        return nn.Sequential(*layers)

    return Task("network", build, (x[:48], y[:48]), (x[48:], y[48:]), batch_size=16)


def paper(seed: int) -> Policy:
    return tiny_student(seed)


def nominal(seed: int, **settings: Any) -> Policy:
    config = NominalConfig(
        hidden=3,
        rate_warmup=3,
        pacing=0.03,
        orthogonal=True,
        inputs=("time", "fan_in", "rms"),
        **settings,
    )
    student = NominalStudent(config, generator=generator_for(seed))
    with torch.no_grad():
        for weight in student.weights()[-2:]:
            weight.add_(0.1)
    return student


CASES: dict[str, dict[str, Any]] = {
    "second order": {},
    "replicates": {"students": 3, "optimizees": 2},
    "stacked": {"students": 3, "task": linear_task, "how": {"stack": True}},
    "autocast": {"how": {"autocast": "bfloat16"}},
    "first order": {"how": {"second_order": False, "mechanism": "mean"}},
    "nominal": {"student": nominal, "how": {"scale_spread": 0.0}},
    "nominal, first order": {
        "student": nominal,
        "how": {"scale_spread": 0.0, "second_order": False},
        "conditions": True,
    },
    "conditions": {"conditions": True},
    "perturbed": {"noise": True, "students": 2},
    "perturbed, first order": {"noise": True, "how": {"second_order": False}},
    "held out": {"held_out": True, "how": {"objective": "final"}},
    "every batch": {"how": {"normaliser": "every-batch", "log_objective": False}},
    "decaying teachers": {"pool": Pool(["adam", "sgd"], ["linear", "cosine"])},
    "on-policy": {"how": {"on_policy": OnPolicy(fade=0.0), "second_order": False}},
    "no teachers": {"pool": Pool([])},
    "segments": {"memory": Memory(segment=2)},
    "budget": {"memory": Memory(budget="100KB")},
}


class Windows:
    """One engine, and what its windows are run with: each on other numbers than the one before."""

    def __init__(
        self,
        make: Callable[[], Any] | None,
        device: str = "cpu",
        backend: str = "reference",
        *,
        student: Callable[[int], Policy] = paper,
        students: int = 1,
        optimizees: int = 1,
        task: Callable[[], Task] = network_task,
        pool: Pool | None = None,
        how: dict[str, Any] | None = None,
        memory: Memory | None = None,
        conditions: bool = False,
        held_out: bool = False,
        noise: bool = False,
    ) -> None:
        self.students = [student(seed).to(device) for seed in range(students)]
        self.pool = Pool(["adam", "powersign"]) if pool is None else pool
        settings = Amalgamation(**{"backend": backend, "scale_spread": 1.0, **(how or {})})
        self.unroll = Unroll(
            task().to(device), self.students, self.pool, settings, memory=memory,
            optimizees=optimizees,
        )  # fmt: skip
        if make is not None:
            vars(self.unroll)["cuda_graphs"] = WindowGraphs(self.unroll, make)
        self.rows = range(students * optimizees)
        self.begin = self.unroll.begin(*(generator_for(row, "episode") for row in self.rows))
        self._conditions = conditions
        self._held_out = held_out
        self._noise = noise

    def batches(self, window: int, *purpose: str) -> Batches:
        generators = (generator_for(row, "batches", window, *purpose) for row in self.rows)
        return Batches.stack([self.unroll.task.batches(each, STEPS) for each in generators])

    def given(self, window: int) -> WindowInputs:
        like = self.begin.params
        conditions = None
        if self._conditions:
            drawn = Conditions(
                weight_decay=(1e-3, 0.1), lr=(0.5, 2.0), lr_decays=("linear",), loss_scale=(-1, 1)
            )
            rows = [drawn.draw(generator_for(row, window)) for row in self.rows]
            conditions = StepConditions.of(rows, STEPS * window, STEPS, 50, like)
        return WindowInputs(
            self.begin,
            self.batches(window),
            [student.weights() for student in self.students],
            noise=functools.partial(self.noise, window) if self._noise else None,
            conditions=conditions,
            teaching=Teaching.of(self.pool, STEPS * window, STEPS, 50, like),
            held_out=self.batches(window, "held out") if self._held_out else None,
        )

    def noise(self, window: int, step: int) -> list[list[Tensor]]:
        return [
            Gaussian(0.05).draw(student.weights(), generator_for(row, "noise", window, step))
            for row, student in enumerate(self.students)
        ]

    def take(self, window: int, given: WindowInputs | None = None) -> list[Tensor]:
        """A window, and a step of the weights against its meta-gradient; all that came of it."""
        ran, loss, grads = self.unroll.meta_gradient(
            given or self.given(window), (1.0, 0.1 * (window + 1))
        )
        self.begin, self.skipped = ran.end, int(ran.skipped.sum())
        assert grads is not None
        flat = [grad for ours in grads for grad in ours]
        with torch.no_grad():
            for weight, grad in zip(
                (w for student in self.students for w in student.weights()), flat, strict=True
            ):
                weight -= 0.01 * grad.sign()
        found: list[Tensor] = []
        ran.map(lambda part: found.extend(x for x in _tensors(part)))
        return [*found, loss, *flat]


def _tensors(nest: Any) -> list[Tensor]:
    if isinstance(nest, Tensor):
        return [nest.clone()]
    return [x for part in nest for x in _tensors(part)] if isinstance(nest, tuple) else []


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


class Counted(Repeated):
    made: ClassVar[list[Counted]] = []
    replays = 0

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        Counted.made.append(self)

    def replay(self) -> None:
        Counted.replays += 1
        super().replay()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second window of a shape is captured: tests have few."""
    monkeypatch.setattr(cuda_graph, "BEFORE", 1)


@pytest.fixture
def counted() -> type[Counted]:
    Counted.made, Counted.replays = [], 0
    return Counted


@pytest.mark.parametrize("case", CASES)
def test_a_graph_gives_what_the_window_gives(case, counted) -> None:
    """Though trajectories, batches, weights, coefficients and conditions change."""
    plain, graphed = Windows(None, **CASES[case]), Windows(counted, **CASES[case])
    for window in range(6):
        assert_same(plain.take(window), graphed.take(window))
    assert graphed.unroll.cuda_graphs is not None
    assert graphed.unroll.cuda_graphs.obstacle is None
    # An episode's first window knows that all stand together, so it has another graph.
    assert len(counted.made) == 1
    assert counted.replays == 4


def test_a_window_has_come_some_times_before_it_is_captured(counted, monkeypatch) -> None:
    """An episode of few windows would pay for a capture and never replay it."""
    monkeypatch.setattr(cuda_graph, "BEFORE", 3)
    windows = Windows(counted)
    made = []
    for window in range(6):
        windows.take(window)
        made.append(len(counted.made))
    assert made == [
        0,
        0,
        0,
        0,
        1,
        1,
    ]  # the first one, which knows that all stand together, is apart


def test_each_shape_has_its_graph(counted) -> None:
    plain, graphed = Windows(None), Windows(counted)
    first = plain.begin
    for _ in range(3):
        for windows in (plain, graphed):
            windows.begin = first
        for window in range(3):
            assert_same(plain.take(window), graphed.take(window))
    assert len(counted.made) == 2


def test_what_a_graph_gave_stays(counted) -> None:
    graphed = Windows(counted)
    for window in range(3):
        graphed.take(window)
    given = graphed.given(3)
    ran, loss, grads = graphed.unroll.meta_gradient(given, (1.0, 0.1))
    before = [ran.end.params.clone(), ran.losses.clone(), loss.clone(), grads[0][0].clone()]
    graphed.take(4)
    for kept, now in zip(before, (ran.end.params, ran.losses, loss, grads[0][0]), strict=True):
        assert torch.equal(kept, now)


def test_a_window_with_something_to_skip_is_run_with_care(counted) -> None:
    plain, graphed = Windows(None), Windows(counted)
    skipped = []
    for window in range(7):
        both = []
        for windows in (plain, graphed):
            given = windows.given(window)
            data = windows.unroll.task.train[0]
            at = given.batches.chosen[2, 0, 0]
            before = data[at].clone()
            if window == 3:
                data[at] = torch.inf
            both.append(windows.take(window, given))
            data[at] = before
        assert_same(*both)
        skipped.append(graphed.skipped)
    assert [number > 0 for number in skipped] == [False] * 3 + [True] + [False] * 3
    # Windows 2, 3 (in vain), 5 and 6: the one after it is run with care.
    assert counted.replays == 4


def test_other_data_is_not_what_a_graph_reads(counted) -> None:
    plain, graphed = Windows(None), Windows(counted)
    for window in range(5):
        both = []
        for windows in (plain, graphed):
            given = windows.given(window)
            if window == 4:
                data = [-x if x.is_floating_point() else x for x in windows.unroll.task.train]
                given = given._replace(batches=Batches(data, given.batches.chosen, range(STEPS)))
            both.append(windows.take(window, given))
        assert_same(*both)


def test_without_gradients_there_is_a_graph_too(counted) -> None:
    plain, graphed = Windows(None), Windows(counted)
    for window in range(4):
        with torch.no_grad():
            (one, _, no_grads), (other, _, none) = (
                windows.unroll.meta_gradient(windows.given(window), (1.0, 0.0))
                for windows in (plain, graphed)
            )
        assert no_grads is none is None
        assert torch.equal(one.end.params, other.end.params)
        plain.begin, graphed.begin = one.end, other.end
    assert counted.replays == 2


def test_what_reads_from_the_device_has_no_graph_and_says_why(counted, monkeypatch, caplog) -> None:
    plain, graphed = Windows(None), Windows(counted)
    gradients = Unroll.gradients

    def reading(self: Unroll, params: Tensor, *rest: Any, **how: Any) -> Any:
        params.sum().item()
        return gradients(self, params, *rest, **how)

    monkeypatch.setattr(Unroll, "gradients", reading)
    for window in range(4):
        assert_same(plain.take(window), graphed.take(window))
    assert graphed.unroll.cuda_graphs is not None
    assert "reads from a stream that is capturing" in str(graphed.unroll.cuda_graphs.obstacle)
    assert "task 'network' run without a CUDA graph: it could not be captured: aten._local" in (
        caplog.text
    )
    assert counted.replays == 0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"how": {"cuda_graph": False}}, "cuda_graph=False"),
        ({"student": lambda seed: Choice(ChoiceConfig(hidden=3))}, "kernels"),
    ],
)
def test_an_obstacle_is_named(changes, why, counted) -> None:
    windows = Windows(counted, **changes)
    assert windows.unroll.cuda_graphs is not None
    assert why in str(windows.unroll.cuda_graphs.obstacle)
    for window in range(3):
        windows.take(window)
    assert not counted.made


def test_weights_that_want_no_gradients_have_a_graph_of_their_own(counted) -> None:
    """Not one that gives none to those that do."""
    windows = Windows(counted)
    given = windows.given(0)
    frozen = given._replace(weights=[[w.detach() for w in ours] for ours in given.weights])
    for _ in range(3):
        assert windows.unroll.meta_gradient(frozen, (1.0, 0.1))[2] is None
        assert windows.unroll.meta_gradient(given, (1.0, 0.1))[2] is not None


def test_a_graph_keeps_what_caches_gave_it(counted) -> None:
    """Or they might drop it, and something else be where a replay reads."""
    windows = Windows(counted, student=nominal, how={"scale_spread": 0.0})
    for window in range(3):
        windows.take(window)
    graphs = windows.unroll.cuda_graphs
    assert graphs is not None
    (captured,) = graphs._captured.values()
    assert {type(read) for read in captured.reads} == {WindowInputs, ContextConstants}


def test_an_engine_goes_with_its_graphs(counted) -> None:
    windows = Windows(counted)
    for window in range(3):
        windows.take(window)
    gone = weakref.ref(windows.unroll)
    gc.disable()
    try:
        del windows
        assert gone() is None
    finally:
        gc.enable()


def test_a_window_with_noise_has_another_graph(counted) -> None:
    windows = Windows(counted)
    given = windows.given(0)
    for _ in range(3):
        for noise in (None, functools.partial(windows.noise, 0)):
            windows.unroll.meta_gradient(given._replace(noise=noise), (1.0, 0.1))
    assert len(counted.made) == 2
    assert counted.replays == 4


def test_noise_on_gradients_has_no_graph(counted) -> None:
    windows = Windows(counted)
    for window in range(3):
        given = windows.given(window)._replace(
            input_noise=0.1, draws=lambda purpose, step, row: generator_for(purpose, step, row)
        )
        windows.take(window, given)
    assert not counted.made


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_cuda_graph_gives_what_the_window_gives(case) -> None:
    plain = Windows(None, "cuda", "auto", **CASES[case])
    vars(plain.unroll)["cuda_graphs"] = None
    graphed = Windows(CudaGraph, "cuda", "auto", **CASES[case])
    torch.backends.cudnn.deterministic = True
    try:
        for window in range(6):
            assert_same(plain.take(window), graphed.take(window))
    finally:
        torch.backends.cudnn.deterministic = False
    assert graphed.unroll.cuda_graphs is not None
    assert graphed.unroll.cuda_graphs.obstacle is None
