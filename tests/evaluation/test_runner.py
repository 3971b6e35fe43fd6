"""Runs are made once, kept, and the same wherever they are made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from amalgam.evaluation import Contender, Curve, NamedTask, Reading, Readings, Runner, train
from amalgam.evaluation.cache import RunCache, default_folder, fingerprint
from amalgam.evaluation.contenders import baseline
from amalgam.evaluation.runner import Progress, Run
from amalgam.tasks import Task

CURVE = Curve(
    (0, 3), (2.5, math.nan), (0.5, math.inf), (Reading(3, -math.inf, 0.5, 1.0, 0.0),), 0.01, 12
)
KEY = {"task": "x", "seed": 1, "steps": (1, 2)}


def linear(width: int = 4, samples: int = 40, **more) -> Task:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] > 0).long()
    more = {"batch_size": 8} | more
    return Task("linear", lambda: nn.Linear(width, 2), (x, y), (x[:9], y[:9]), **more)


def test_a_run_comes_back_as_it_was(tmp_path: Path) -> None:
    cache = RunCache(tmp_path / "deep" / "cache")
    assert cache.get(KEY) is None
    cache.put(KEY, CURVE)
    found = cache.get(KEY)
    assert found is not None
    assert found.as_dict() == CURVE.as_dict()
    assert math.isnan(found.losses[1])
    assert found.full[0].loss == -math.inf
    assert all(cache.get({**KEY, "seed": other}) is None for other in (2, None))


def test_a_file_is_no_folder_of_runs(tmp_path: Path) -> None:
    there = tmp_path / "file"
    there.touch()
    for given in (there, there / "below" / "it"):
        with pytest.raises(ValueError, match=f"cache must be a folder, not '{given}': '{there}'"):
            RunCache(given)


def test_a_damaged_file_is_no_run(tmp_path: Path) -> None:
    cache = RunCache(tmp_path)
    cache.put(KEY, CURVE)
    (path,) = tmp_path.rglob("*.json")
    whole = path.read_bytes()
    for damaged in (
        *(whole[:length] for length in range(0, len(whole) - 1, 17)),
        *(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole) - 1)),
        b"[]",
        b"{}",
        b'{"checksum": 3}',
        b"[" * 100_000,
    ):
        path.write_bytes(damaged)
        found = cache.get(KEY)
        # A flipped bit may leave what JSON means as it was.
        assert found is None or found.as_dict() == CURVE.as_dict(), damaged
    path.unlink()
    path.mkdir()
    assert cache.get(KEY) is None
    path.rmdir()
    cache.put(KEY, CURVE)
    assert cache.get(KEY) is not None


class Activated(nn.Module):
    """Does what neither its ``repr`` nor its parameters say."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.activation = nn.Linear(4, 2), activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.layer(x))


def test_fingerprints_tell_apart_what_has_one_name() -> None:
    def scaled(by: float) -> Task:
        return linear(loss=lambda out, target: by * nn.functional.cross_entropy(out, target))

    def activated(by: Callable[[torch.Tensor], torch.Tensor]) -> Task:
        return dataclasses.replace(linear(), build=lambda: Activated(by))

    def smoothed(by: float) -> Task:
        return linear(loss=nn.CrossEntropyLoss(label_smoothing=by))

    def attending(heads: int) -> Task:
        made = partial(nn.TransformerEncoderLayer, 4, heads, 2, dropout=0.0)
        return dataclasses.replace(linear(), build=lambda: nn.Sequential(made(), nn.Linear(4, 2)))

    assert fingerprint(smoothed(0.0)) != fingerprint(smoothed(0.1))
    assert fingerprint(attending(1)) != fingerprint(attending(2))
    for one, other in ((scaled(1.0), scaled(2.0)), (activated(torch.relu), activated(torch.tanh))):
        assert fingerprint(one) == fingerprint(one)
        assert fingerprint(one) != fingerprint(other)


def test_fingerprints_are_the_same_in_another_process() -> None:
    """Where functions lie in memory is not."""
    loss = partial(nn.functional.cross_entropy, label_smoothing=0.1)
    found = fingerprint(linear(loss=loss))
    assert "functools.partial(<function cross_entropy>, label_smoothing=0.1)" in found
    assert "0x" not in found
    # The gradients of a classifier's last layer sum to rounding.
    assert found.endswith(" 0")


def test_a_network_of_ones_own_may_have_its_own_gradient() -> None:
    def clipped(by: float) -> Task:
        def gradient(module, loss, batch, generator) -> torch.Tensor:
            found = loss(module(batch[0]), batch[1])
            found.backward()
            nn.utils.clip_grad_norm_(module.parameters(), by)
            return found.detach()

        build = partial(Activated, torch.relu)
        return dataclasses.replace(linear(), build=build, gradient=gradient)

    assert "gradient 0.01 " in fingerprint(clipped(0.01))
    assert fingerprint(clipped(0.01)) != fingerprint(clipped(0.02))


def test_fingerprints_tell_tasks_apart() -> None:
    x = torch.zeros(40, 4)
    others = [
        linear(samples=39),
        linear(batch_size=9),
        linear(loss=nn.functional.multi_margin_loss),
        dataclasses.replace(linear(), name="other"),
        dataclasses.replace(linear(), train=(x, linear().train[1])),
        dataclasses.replace(linear(), build=lambda: nn.Sequential(nn.Linear(4, 2), nn.Tanh())),
    ]
    assert fingerprint(linear()) == fingerprint(linear())
    assert len({fingerprint(task) for task in (linear(), *others)}) == 1 + len(others)


def test_the_cache_lies_where_the_environment_says(monkeypatch) -> None:
    monkeypatch.setenv("AMALGAM_CACHE", "/some/where")
    assert default_folder() == Path("/some/where/evaluation")
    monkeypatch.delenv("AMALGAM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/users/cache")
    assert default_folder() == Path("/users/cache/amalgam/evaluation")


def runs(*contenders: Contender, seeds: int = 2, steps: int = 3) -> list[Run]:
    return [Run(0, one, seed, steps, Readings()) for one in contenders for seed in range(seeds)]


def test_runs_are_made_once(tmp_path: Path, monkeypatch) -> None:
    adam = baseline("Adam", (("lr", 0.1),), "constant")
    unknown = Contender("mine", partial(torch.optim.SGD, lr=0.1))
    reports: list[Progress] = []
    with Runner([linear()], cache=RunCache(tmp_path), report=reports.append) as runner:
        runner.total = 4 * runner.cost(0, 3)
        first = runner.run(runs(adam, unknown))
    assert [report.runs for report in reports] == [1, 2, 3, 4]
    assert reports[-1].done == pytest.approx(reports[-1].total)
    assert reports[-1].made == reports[-1].done
    assert reports[-1].what == "linear: mine"
    assert len(list(tmp_path.rglob("*.json"))) == 2
    reports.clear()
    with Runner([linear()], cache=RunCache(tmp_path), report=reports.append) as runner:
        again = runner.run(runs(adam, unknown))
    assert [report.cached for report in reports] == [1, 2, 2, 2]
    assert [report.made > 0 for report in reports] == [False, False, True, True]
    assert again[:2] == first[:2]
    assert [curve.losses for curve in again] == [curve.losses for curve in first]
    decaying = baseline("Adam", (("lr", 0.1),), "linear")
    other = baseline("Adam", (("lr", 0.2),), "constant")
    for changed in (runs(decaying), runs(other), runs(adam, steps=4), runs(adam, seeds=3)[2:]):
        reports.clear()
        with Runner([linear()], cache=RunCache(tmp_path), report=reports.append) as runner:
            runner.run(changed)
        assert reports[-1].cached == 0
    reports.clear()
    with Runner([linear(samples=39)], cache=RunCache(tmp_path), report=reports.append) as runner:
        runner.run(runs(adam))
    assert reports[-1].cached == 0


def test_contenders_with_the_same_runs_share_them(monkeypatch) -> None:
    trained = []
    monkeypatch.setattr(
        "amalgam.evaluation.runner.train",
        lambda *a, **o: trained.append(o["seed"]) or train(*a, **o),
    )
    adam = baseline("Adam", (("lr", 0.1),), "constant")
    reports: list[Progress] = []
    with Runner([linear()], report=reports.append) as runner:
        found = runner.run(runs(adam, dataclasses.replace(adam, name="other")))
    assert trained == [0, 1]
    assert found[:2] == found[2:]
    assert reports[-1].runs == 4


def test_a_failing_run_says_which_it_was_and_keeps_the_others(tmp_path: Path) -> None:
    def refuses(params):
        raise ValueError("no such thing")

    adam = baseline("Adam", (("lr", 0.1),), "constant")
    failing = Contender("failing", refuses, identity={})
    with (
        Runner([linear()], cache=RunCache(tmp_path)) as runner,
        pytest.raises(ValueError, match="no such thing") as raised,
    ):
        runner.run(runs(adam, failing))
    assert raised.value.__notes__ == ["in a run of failing, seed 0, 3 steps"]
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_threads_are_as_before_and_made_tasks_stay_here() -> None:
    before = torch.get_num_threads()
    with Runner([linear()]) as runner:
        runner.run(runs(baseline("SGD", (("lr", 0.1),), "linear"), seeds=1))
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="jobs must be 1 for tasks that are made already, not 2"):
        Runner([linear()], jobs=2)
    named = NamedTask("digits-mlp", (("batch_size", 64),))
    assert named.load("cpu").batch_size == 64
