"""What people have for optimizees: meta-training runs on it, or says in one line what to set."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from meta.runs import trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from amalgam.meta import Stage, Stages, Training
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
