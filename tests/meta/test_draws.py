"""What an optimizee draws while it runs is drawn again alike: dropout, against masks as data."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from runs import linear_task, resumes_to_the_same_bits, tiny_student, trainer
from torch import Tensor, nn
from torch.nn import functional

from amalgam.evaluation.runs import Readings, train
from amalgam.meta import (
    Amalgamation,
    Memory,
    MetaBatch,
    PersistentEvolution,
    Stage,
    Stages,
    Training,
    Unroll,
)
from amalgam.meta.reference import window as naive_window
from amalgam.policies import DM, DMConfig, Pool, Student, StudentConfig, TorchTeacher
from amalgam.seeding import generator_for
from amalgam.tasks import SeededBatch, Task
from amalgam.tasks.task import Batches

POOL = Pool(["adam", "rmsprop", "sgd"])
STEPS, BATCH, HIDDEN, P = 8, 6, 5, 0.4


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, HIDDEN), nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.dropout(self.first(x).tanh(), P)
        return self.second(hidden + 0.1 * torch.randn_like(hidden))


class Masked(Dropping):
    """The same, with what it draws as inputs."""

    def forward(self, x: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        return self.second(self.first(x).tanh() * mask + 0.1 * noise)


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    """What :class:`Dropping` draws by a seed: the factors of its hidden units, and their noise."""
    ones = torch.ones(BATCH, HIDDEN, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return functional.dropout(ones, P), torch.randn_like(ones)


def dropping_task(dtype: torch.dtype = torch.float64) -> Task:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, generator=generator).to(dtype)
    y = torch.randint(2, (40,), generator=generator)
    return Task("drop", lambda: Dropping().to(dtype), (x, y), (x, y), batch_size=BATCH)


def masked_task() -> Task:
    task = dropping_task()
    x, y = task.train
    extra = torch.ones(len(x), HIDDEN, dtype=x.dtype)
    data = (x, extra, extra, y)
    return Task("masked", lambda: Masked().double(), data, data, batch_size=BATCH)


def masked(batch: SeededBatch) -> tuple[Tensor, ...]:
    """A stacked batch with what its rows draw by their seeds."""
    x, y = batch
    masks, noise = zip(*map(drawn, batch.seeds), strict=True)
    return x, torch.stack(masks), torch.stack(noise), y


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize(
    "memory",
    [Memory(), Memory(segment=1), Memory(segment=3), Memory(budget=60_000)],
    ids=["free", "segment-1", "segment-3", "budget"],
)
def test_the_meta_gradient_is_plain_autograds_with_the_same_masks(
    second_order: bool, memory: Memory
) -> None:
    """Whatever is computed again, and whatever torch's global generator holds meanwhile."""
    how = Amalgamation(backend="reference", scale_spread=1.0, second_order=second_order)
    student = Student(StudentConfig(hidden=4, warmup_steps=2), generator=generator_for(2)).double()
    task = dropping_task()
    unroll = Unroll(task, student, POOL, how, memory=memory, optimizees=2)
    begin = unroll.begin(*(generator_for(row, "episode") for row in range(2)))
    batches = Batches.stack(
        [task.batches(generator_for(row, "batches"), STEPS + 3) for row in range(2)]
    )
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with torch.no_grad():
        begin = unroll.window(begin, batches[:3]).end
    window = unroll.window(begin, batches[3:])
    loss = window.meta_loss + 0.3 * window.imitation_loss
    ours = torch.autograd.grad(loss, student.weights())
    assert torch.equal(torch.get_rng_state(), before)

    weights = list(student.weights())
    given = [masked(batch) for batch in batches[3:]]
    rows = [
        naive_window(masked_task(), student, POOL, how, begin, given, [weights] * STEPS, row)
        for row in range(2)
    ]
    meta, imitation, _ = (sum(parts) / 2 for parts in zip(*rows, strict=True))
    theirs = torch.autograd.grad(meta + 0.3 * imitation, weights)
    assert torch.allclose(loss, meta + 0.3 * imitation, rtol=1e-9)
    for our, their in zip(ours, theirs, strict=True):
        assert (our - their).abs().max() <= 1e-9 * their.abs().max()


def test_other_masks_are_another_meta_gradient() -> None:
    """So the comparison above can fail."""
    how = Amalgamation(backend="reference", scale_spread=1.0)
    student = Student(StudentConfig(hidden=4), generator=generator_for(2)).double()
    unroll = Unroll(dropping_task(), student, POOL, how)
    begin = unroll.begin(generator_for(0, "episode"))
    batches = unroll.task.batches(generator_for(0, "batches"), STEPS)
    found = []
    for shift in (0, 1):
        moved = [
            SeededBatch((t[None] for t in batch), [batch.seeds[0] + shift]) for batch in batches
        ]
        window = unroll.window(begin, moved)
        found.append(torch.autograd.grad(window.meta_loss.sum(), student.weights())[0])
    assert not torch.allclose(*found, rtol=1e-3)


def test_seeds_differ_from_step_to_step_and_row_to_row() -> None:
    task = dropping_task()
    batches = Batches.stack([task.batches(generator_for(row), 4) for row in range(3)])
    seeds = [batch.seeds for batch in batches]
    assert len({seed for of_step in seeds for seed in of_step}) == 12
    assert [batch.seeds for batch in batches[1:3]] == seeds[1:3]
    assert all(len(of_step) == 3 for of_step in seeds)


def test_students_and_teachers_draw_alike_on_a_row() -> None:
    """A teacher that stands still beside a student that does has its losses, step by step."""
    how = Amalgamation(backend="reference", scale_spread=0.0)
    student = Student(StudentConfig(hidden=4), generator=generator_for(2)).double()
    with torch.no_grad():
        for weight in student.weights():
            weight.zero_()
    task, pool = dropping_task(), Pool([teacher.at(0.0) for teacher in POOL.teachers])
    unroll = Unroll(task, student, pool, how, optimizees=2)
    begin = unroll.begin(*(generator_for(row) for row in range(2)))
    batches = Batches.stack([task.batches(generator_for(row, "b"), 4) for row in range(2)])
    with torch.no_grad():
        losses = unroll.window(begin, batches).losses
    assert torch.equal(losses[..., 1:], losses[..., :1].expand(-1, -1, len(pool)))
    assert all(not torch.equal(a, b) for a, b in pairwise(losses[:, 0, 0]))


def test_a_batch_without_seeds_is_refused() -> None:
    task = dropping_task()
    with pytest.raises(ValueError, match="batch must have a seed.*task 'drop' draw"):
        task.objective(task.init_params(generator_for(0)), tuple(task.train))


def dropout_task() -> Task:
    task = linear_task()
    build = lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))  # noqa: E731
    return Task("dropout", build, task.train, task.validation, batch_size=16)


@pytest.mark.parametrize("how", ["truncation", "first-order", "pes", "meta-batch"])
def test_killed_and_resumed_runs_draw_alike(how: str, tmp_path: Path) -> None:
    settings = {
        "strategy": MetaBatch(meta_steps=4, slots=2, unroll=3, shortest=3, longest=9)
        if how == "meta-batch"
        else Stages((Stage(2, 2, 0.2),), 3),
        "training": Training(
            optimizees=1 if how == "pes" else 2,
            validate_every=2,
            validation_steps=3,
            validation_seeds=1,
            checkpoint_every=2,
        ),
        "memory": Memory(segment=2),
    }
    if how == "pes":
        settings["estimator"] = PersistentEvolution(pairs=2)
    if how == "first-order":
        settings["amalgamation"] = Amalgamation(second_order=False, backend="reference")
    rows = resumes_to_the_same_bits(
        lambda folder: trainer(folder, tasks=dropout_task(), **settings), tmp_path
    )
    assert all(row["grad_norm"] > 0 for row in rows)


class Langevin(torch.optim.Optimizer):
    def __init__(self, params, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for p in self.param_groups[0]["params"]:
            p -= self.param_groups[0]["lr"] * p.grad + 0.01 * torch.randn_like(p)


def test_a_teacher_that_draws_does_so_by_the_seed(tmp_path: Path) -> None:
    pool = [TorchTeacher(Langevin), "adam"]
    losses = []
    for number, seed in enumerate((7, 7, 8)):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        rows: list[dict] = []
        settings = {"seed": seed, "strategy": Stages((Stage(1, 2, 0.2),), 3), "pool": pool}
        trainer(tmp_path / str(number), tiny_student(7), **settings).run(report=rows.append)
        assert torch.equal(torch.get_rng_state(), before)
        losses.append([row["imitation_loss"] for row in rows])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


class Restless(DM):
    def step(self, *args, **settings):
        update, state = super().step(*args, **settings)
        return update * torch.rand(()), state


def test_a_policy_that_draws_past_its_generator_is_refused(tmp_path: Path) -> None:
    student = Restless(DMConfig(layers=1, hidden=3), generator=generator_for(0))
    with pytest.raises(ValueError, match="Restless' draws by torch's global generator.*step"):
        trainer(tmp_path, student).run()


def test_the_seed_decides_dropout_in_evaluation_too() -> None:
    task, curves = dropout_task(), []

    def make(params):
        return torch.optim.SGD(params, lr=0.1)

    for seed, elsewhere in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(elsewhere)
        before = torch.get_rng_state()
        curves.append(train(task, make, steps=6, seed=seed, readings=Readings((2, 4))).losses)
        assert torch.equal(torch.get_rng_state(), before)
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]
