"""What people have for optimizees: meta-training runs on it, or says in one line what to set."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import tiny_student, trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from amalgam.evaluation.runs import Readings, train
from amalgam.meta import Amalgamation, MetaBatch, Stage, Stages, Training
from amalgam.meta.objective import meta_terms
from amalgam.meta.validation import by_final_loss
from amalgam.policies import PolicyTeacher
from amalgam.seeding import generator_for
from amalgam.tasks import Task

SAMPLES, TIME, WIDTH = 24, 3, 4


class Through(nn.Module):
    """Some module between two linear layers, its output pooled over time."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.head, self.call = inner, nn.Linear(WIDTH, 2), call

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.inner, x).mean(1))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x.mean(1))
        return out if out.sum().item() > 0 else 2 * out


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(1)
        return self.layer(x + 0.1 * torch.randn_like(x)) * (1 + torch.rand(()))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.mean(1)).tanh())[:, :2]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.layer, x.mean(1), use_reentrant=False)
        return out


def recurrent(kind: type[nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: Through(
        kind(WIDTH, WIDTH, batch_first=True, **options), lambda inner, x: inner(x)[0]
    )


def attention(need_weights: bool) -> Callable[[], nn.Module]:
    return lambda: Through(
        nn.MultiheadAttention(WIDTH, 2, batch_first=True),
        lambda inner, x: inner(x, x, x, need_weights=need_weights)[0],
    )


def plain(inner: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Through(inner(), lambda inner, x: inner(x))


def frozen() -> nn.Module:
    module = nn.Sequential(nn.Flatten(), nn.Linear(TIME * WIDTH, 5), nn.Tanh(), nn.Linear(5, 2))
    module[1].requires_grad_(False)
    return module


MODULES: dict[str, Callable[[], nn.Module]] = {
    "dropout": plain(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5))),
    "alpha-dropout": plain(lambda: nn.AlphaDropout(0.3)),
    "random-relu": plain(nn.RReLU),
    "noise": Noisy,
    "checkpointed-dropout": Checkpointed,
    "lstm": recurrent(nn.LSTM),
    "gru": recurrent(nn.GRU),
    "gru-dropout": recurrent(nn.GRU, num_layers=2, dropout=0.5),
    "rnn": recurrent(nn.RNN),
    "attention": attention(False),
    "attention-weights": attention(True),
    "transformer": plain(lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True)),
    "batch-norm": plain(lambda: nn.BatchNorm1d(TIME)),
    "instance-norm": plain(lambda: nn.InstanceNorm1d(TIME, affine=True)),
    "spectral-norm": plain(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))),
    "weight-norm": plain(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
    "item": Branching,
    "tied": Tied,
    "frozen": frozen,
}

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": functional.mse_loss,
    "l1": functional.l1_loss,
    "smooth-l1": functional.smooth_l1_loss,
    "huber": functional.huber_loss,
    "bce": functional.binary_cross_entropy_with_logits,
    "multilabel": functional.multilabel_soft_margin_loss,
    "poisson": functional.poisson_nll_loss,
    "item": lambda out, target: functional.mse_loss(out, target) * (1 if out.sum() > 0 else 2),
    "random": lambda out, target: functional.mse_loss(out + torch.randn_like(out), target),
}


@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_weight_norms_second_derivatives_are_right(norm: Any, dim: int | None, stack: bool) -> None:
    """PyTorch's own are not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(16, 2, generator=generator, dtype=torch.float64)
    task = Task(
        "normed",
        lambda: norm(nn.Linear(3, 2).double(), dim=dim),
        (x, y),
        (x, y),
        loss=functional.mse_loss,
        batch_size=16,
    )
    flat = task.init_params(generator).double()

    def gradient(at: Tensor) -> tuple[Tensor, Tensor]:
        leaf = at.detach().requires_grad_()
        with task.second_order.kernels():
            loss = task.objectives(leaf[None, None], (x[None], y[None]), stack).sum()
            (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return leaf, grad

    along = torch.randn(flat.shape, generator=generator, dtype=torch.float64)
    leaf, grad = gradient(flat)
    (found,) = torch.autograd.grad(grad, leaf, along)
    step = 1e-5
    ends = [gradient(flat + sign * step * along)[1].detach() for sign in (1, -1)]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)


def test_validation_data_that_cannot_be_run_are_named_at_once() -> None:
    """And modules stay in the modes that they were in."""
    x, y = torch.randn(16, 3), torch.randn(16, 2)

    def build() -> nn.Module:
        made = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
        made[1].eval()
        return made

    for validation in ((x[:, :2], y), (x,), (x, y[:, :1].long()), (x.double(), y)):
        with pytest.raises(ValueError, match="task 'odd' can't be validated on its first valid"):
            Task("odd", build, (x, y), validation, functional.cross_entropy, 8)
    made = Task("odd", build, (x, y), (x[:1], y[:1]), functional.mse_loss, 8)
    assert [part.training for part in made._module.modules()] == [True, True, False]


def sequences(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> Task:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, TIME, WIDTH, generator=generator)
    y = (x[:, 0, 0] > 0).long()
    x = x.to(dtype)
    return Task("sequences", build, (x[:16], y[:16]), (x[16:], y[16:]), batch_size=8)


def regression(loss: Callable[[Tensor, Tensor], Tensor]) -> Task:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, WIDTH, generator=generator)
    y = (x @ torch.randn(WIDTH, 2, generator=generator) > 0).float()
    build = lambda: nn.Linear(WIDTH, 2)  # noqa: E731
    return Task("regression", build, (x[:16], y[:16]), (x[16:], y[16:]), loss, batch_size=8)


def meta_train(folder: Path, task: Task, **changes: Any) -> tuple[list[Tensor], list[dict]]:
    """Two windows of one episode on two optimizees with two teachers: weights and metrics."""
    settings = {
        "training": Training(
            optimizees=2, validate_every=2, validation_steps=2, validation_seeds=1
        ),
        "strategy": Stages((Stage(1, 2, 0.2),), 3),
        **changes,
    }
    rows: list[dict] = []
    student = trainer(folder, tasks=task, **settings).run(report=rows.append)
    return student.weights(), rows


def learns(rows: list[dict]) -> None:
    assert len(rows) == 2
    for row in rows:
        assert row["skipped_meta_steps"] == 0
        assert row["grad_norm"] > 0
        assert row["meta_loss"] is not None
    assert rows[-1]["validation"] is not None


@pytest.mark.parametrize("name", MODULES)
def test_modules_that_people_have(name: str, tmp_path: Path) -> None:
    """And they leave torch's global generator alone, and do not depend on it."""
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        task = sequences(MODULES[name])
        found, rows = meta_train(tmp_path / str(seed), task)
        learns(rows)
        weights.append(found)
        assert torch.equal(torch.get_rng_state(), before)
        if task.unstackable != "its optimizees draw random numbers":
            return
    assert all(map(torch.equal, *weights))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_people_have(name: str, tmp_path: Path) -> None:
    learns(meta_train(tmp_path, regression(LOSSES[name]))[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """Of modules and data; the student stays in float32."""
    task = sequences(lambda: plain(lambda: nn.Linear(WIDTH, WIDTH))().to(dtype), dtype)
    weights, rows = meta_train(tmp_path, task)
    learns(rows)
    assert {weight.dtype for weight in weights} == {torch.float32}


def negative(out: Tensor, target: Tensor) -> Tensor:
    return -functional.cosine_similarity(out, target).mean()


def test_losses_below_zero_need_no_logs(tmp_path: Path) -> None:
    """They fall further, by the meta-loss and by the validation's score."""
    amalgamation = Amalgamation(log_objective=False, scale_spread=1.0, backend="reference")
    task = regression(negative)
    learns(meta_train(tmp_path, task, amalgamation=amalgamation)[1])
    losses = torch.tensor([[-0.5], [-0.6]])
    terms, slopes = meta_terms(amalgamation, losses, losses[0])
    assert terms[1] < terms[0]
    assert (slopes > 0).all()
    scores = [
        by_final_loss(
            lambda params, lr=lr: torch.optim.SGD(params, lr=lr),
            [task],
            Training(validation_steps=30, validation_seeds=1),
            log_objective=False,
            warmup_steps=0,
            seed=0,
            device=torch.device("cpu"),
        )
        for lr in (0.0, 0.3)
    ]
    assert scores[1] < scores[0]


@pytest.mark.parametrize("strategy", ["stages", "meta-batch"])
def test_losses_below_zero_are_refused_by_logs_at_once(strategy: str, tmp_path: Path) -> None:
    rows: list[dict] = []
    changes: dict[str, Any] = {}
    if strategy == "meta-batch":
        changes["strategy"] = MetaBatch(meta_steps=3, slots=2, unroll=2, shortest=2, longest=4)
    run = trainer(
        tmp_path, tasks=[regression(lambda out, target: -out.square().mean() - 1)], **changes
    )
    with pytest.raises(ValueError, match="log_objective must be False for task 'regression'.*-1"):
        run.run(report=rows.append)
    assert rows == []


def test_a_validation_of_a_loss_below_zero_says_what_to_set() -> None:
    task = regression(lambda out, target: -out.square().mean() - 1)
    with pytest.raises(ValueError, match="log_objective must be False"):
        by_final_loss(
            lambda params: torch.optim.SGD(params, lr=0.1),
            [task],
            Training(validation_steps=2, validation_seeds=1),
            log_objective=True,
            warmup_steps=0,
            seed=0,
            device=torch.device("cpu"),
        )


def test_a_loss_without_a_second_derivative_says_what_to_set(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(16, 4, generator=generator), torch.randint(2, (16,), generator=generator)
    task = Task("margin", lambda: nn.Linear(4, 2), (x, y), (x, y), functional.multi_margin_loss, 8)
    with pytest.raises(ValueError, match="second_order must be False for task 'margin'.*multi_mar"):
        meta_train(tmp_path / "second", task)
    first = Amalgamation(second_order=False, scale_spread=1.0, backend="reference")
    learns(meta_train(tmp_path / "first", task, amalgamation=first)[1])


@pytest.mark.parametrize(
    ("name", "why"), [("dropout", "draw random numbers"), ("gru", "gru"), ("item", "item")]
)
def test_what_cannot_run_as_one_is_refused_at_once(name: str, why: str, tmp_path: Path) -> None:
    stacked = Amalgamation(stack=True, backend="reference")
    with pytest.raises(ValueError, match=f"stack must be None or False for task 'seq.*{why}"):
        trainer(tmp_path, tasks=sequences(MODULES[name]), amalgamation=stacked)


def test_frozen_layers_stay_in_meta_training_and_evaluation(tmp_path: Path) -> None:
    """What is frozen at random is the task's, and the same for all optimizees."""
    task = sequences(frozen)
    assert set(task.layout.shapes) == {"3.weight", "3.bias"}
    modules = [task.init_module(generator_for(seed)) for seed in (1, 2)]
    assert torch.equal(modules[0][1].weight, modules[1][1].weight)
    assert not torch.equal(modules[0][3].weight, modules[1][3].weight)
    x, y = task.train
    for module in modules:
        flat = task.layout.flatten(dict(module.named_parameters()))
        assert torch.equal(task.objective(flat, (x, y)), task.loss(module(x), y))
    seen: list[nn.Parameter] = []

    def make(params):
        seen.extend(params)
        return torch.optim.SGD(seen, lr=0.1)

    train(task, make, steps=3, seed=0, readings=Readings())
    assert torch.equal(seen[0], modules[0][1].weight)
    assert seen[2].grad is not None
    learns(meta_train(tmp_path, task)[1])


def test_frozen_layers_of_one_model_stay_apart_from_it() -> None:
    """A backbone that all builds share, with running statistics that training moves."""
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4))
    backbone.requires_grad_(False)
    task = sequences(lambda: nn.Sequential(backbone, nn.Linear(4, 2)))
    curves = [
        train(
            task,
            lambda params: torch.optim.SGD(params, lr=0.1),
            steps=4,
            seed=0,
            readings=Readings(curve=(2,)),
        )
        for _ in range(2)
    ]
    assert curves[0].losses == curves[1].losses
    assert torch.equal(backbone[2].running_mean, torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_students_dtype_is_the_trajectories(dtype: torch.dtype, tmp_path: Path) -> None:
    """Whatever the optimizee's and a frozen teacher's are."""
    teacher = PolicyTeacher(tiny_student(3).to(torch.float32))
    task = sequences(plain(nn.Identity), torch.float32)
    run = trainer(
        tmp_path,
        tiny_student(7).to(dtype),
        tasks=task,
        pool=["adam", teacher],
        strategy=Stages((Stage(1, 2, 0.2),), 3),
    )
    rows: list[dict] = []
    assert run.run(report=rows.append).weights()[0].dtype == dtype
    assert all(row["grad_norm"] > 0 for row in rows)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["dropout", "checkpointed-dropout", "lstm", "gru-dropout", "attention", "transformer"]
)
def test_modules_that_people_have_on_a_gpu(name: str, tmp_path: Path) -> None:
    """The seed decides there, too, and the GPU's global generator stays as it was."""
    weights = []
    for seed in (1, 2):
        torch.cuda.manual_seed(seed)
        before = torch.cuda.get_rng_state()
        found, rows = meta_train(tmp_path / str(seed), sequences(MODULES[name]), device="cuda")
        learns(rows)
        weights.append(found)
        assert torch.equal(torch.cuda.get_rng_state(), before)
    for one, other in zip(*weights, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)
