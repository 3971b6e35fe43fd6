"""Perturbations do what the authors' code does, or the paper says, each by its name."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import perturbation_of
from torch import Tensor

from amalgam.meta.perturbation import (
    FGSM,
    PGD,
    AdaptivePGD,
    AdversarialPerturbation,
    Gaussian,
    InputNoise,
    RandomPerturbation,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "losses_and_perturbations.npz"


def golden(prefix: str) -> list[Tensor]:
    data = np.load(GOLDEN)
    return [torch.from_numpy(data[f"{prefix}.{index}"]).double() for index in range(3)]


@pytest.mark.parametrize(
    ("key", "made"),
    [
        ("fgsm_0.001", FGSM(0.001)),
        ("pgd_l2_0.01_lr0.1", PGD(1, 0.01, "l2", 0.1)),
        ("pgd_inf_0.01_lr0.1", PGD(1, 0.01, "inf", 0.1)),
        ("adaptive_pgd_0.001", AdaptivePGD(1, 0.001, normalise=False)),
    ],
)
def test_ascent_matches_the_authors(key: str, made: AdversarialPerturbation) -> None:
    psi = made.ascend(golden("perturb.base"), golden("agc.weight"), golden("agc.grad"))
    for ours, theirs in zip(psi, golden(f"perturb.{key}"), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


W = [torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([1.0, 0.0, 0.0])]
G = [torch.tensor([[0.0, -2.0], [0.0, 0.0]]), torch.tensor([0.0, 0.03, -0.04])]


def test_the_papers_steps_are_as_long_as_the_weights() -> None:
    made = AdaptivePGD(2, 0.1)
    psi = made.ascend(made.start(W), W, G)
    assert torch.allclose(psi[0], torch.tensor([[0.0, -0.5], [0.0, 0.0]]))
    assert torch.allclose(psi[1], torch.tensor([0.0, 0.06, -0.08]))
    twice = made.ascend(psi, W, G)
    assert torch.allclose(twice[0], 2 * psi[0])


def test_the_codes_steps_are_no_longer_than_that() -> None:
    made = AdaptivePGD(1, 0.1, normalise=False)
    psi = made.ascend(made.start(W), W, G)
    assert torch.allclose(psi[0], torch.tensor([[0.0, -0.5], [0.0, 0.0]]))
    assert torch.equal(psi[1], G[1])


def test_a_gradient_of_zero_moves_nothing() -> None:
    zeros = [torch.zeros_like(w) for w in W]
    for made in (AdaptivePGD(), AdaptivePGD(normalise=False), FGSM(), PGD(), PGD(norm="inf")):
        for ours in made.ascend(made.start(W), W, zeros):
            assert torch.equal(ours, torch.zeros_like(ours))
    (kept,) = AdaptivePGD(normalise=False).ascend([W[0]], zeros[:1], G[:1])
    assert torch.equal(kept, W[0])


def test_pgd_projects_what_has_gathered() -> None:
    made = PGD(5, 0.3, "l2", 0.1)
    psi = made.start(W)
    for _ in range(made.steps):
        psi = made.ascend(psi, W, G)
    assert psi[0].norm().item() == pytest.approx(0.3)
    assert torch.allclose(psi[1], 5 * 0.1 * G[1])
    scaled = PGD(1, 0.3, "scale", 10.0)
    assert scaled.ascend(scaled.start(W), W, G)[0].norm().item() == pytest.approx(4 * 0.3)


def test_the_papers_pgd_clips_each_gradient() -> None:
    made = PGD(3, 1.0, "l2", 0.5, clip_gradient=True)
    psi = made.start(W)
    for _ in range(made.steps):
        psi = made.ascend(psi, W, G)
    assert psi[0].norm().item() == pytest.approx(3 * 0.5 * 1.0)
    assert torch.allclose(psi[1], 3 * 0.5 * G[1])
    inf = PGD(1, 0.035, "inf", 1.0, clip_gradient=True)
    clipped = inf.ascend(inf.start(W), W, G)[1]
    assert torch.allclose(clipped, torch.tensor([0.0, 0.03, -0.035]))


def test_adversaries_leave_their_arguments_and_the_graph_alone() -> None:
    weights = [w.clone().requires_grad_() for w in W]
    for made in (FGSM(), PGD(), AdaptivePGD()):
        psi = made.start(weights)
        again = made.ascend(psi, weights, [w * 2 for w in weights])
        assert not any(p.requires_grad for p in (*psi, *again))
        assert all(not p.any() for p in psi)
        assert all(p.any() for p in again)


def draws(made: Gaussian, weight: Tensor, count: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([made.draw([weight], generator)[0] for _ in range(count)])


@pytest.mark.parametrize("relative", [False, True])
def test_gaussian_noise_has_its_deviation(relative: bool) -> None:
    weight = torch.randn(20, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = 3 * weight
    made = Gaussian(0.02, relative=relative)
    drawn = draws(made, weight)
    std = 0.02 * (weight.norm().item() / math.sqrt(weight.numel()) if relative else 1.0)
    n = drawn.numel()
    assert abs(drawn.mean().item()) <= 5 * std / math.sqrt(n)
    # A normal sample's variance has the relative standard error sqrt(2 / n).
    assert drawn.var().item() == pytest.approx(std**2, rel=5 * math.sqrt(2 / n))
    fourth = (drawn / std).pow(4).mean().item()
    assert fourth == pytest.approx(3.0, abs=5 * math.sqrt(96 / n))
    across = (drawn[0] * drawn[1]).mean().item() / std**2
    assert abs(across) <= 5 / math.sqrt(weight.numel())


def test_relative_noise_is_per_tensor_and_has_a_floor() -> None:
    weights = [torch.full((4000,), 10.0), torch.full((4000,), 0.1), torch.zeros(4000)]
    drawn = Gaussian(0.1, relative=True).draw(weights, torch.Generator().manual_seed(0))
    stds = [d.std().item() for d in drawn]
    assert stds == pytest.approx([1.0, 0.01, 1e-5], rel=5 / math.sqrt(8000))
    paper = Gaussian(0.1, relative=True, floor=0.0)
    assert not paper.draw(weights, torch.Generator().manual_seed(0))[2].any()


def test_the_generator_decides_the_draw() -> None:
    made = Gaussian(0.1)
    weights = [w.clone().requires_grad_() for w in W]
    before = torch.get_rng_state()
    first, same, other = (
        made.draw(weights, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert all(map(torch.equal, first, same))
    assert not any(map(torch.equal, first, other))
    assert not any(d.requires_grad for d in first)
    assert torch.equal(torch.get_rng_state(), before)
    assert [d.shape for d in first] == [w.shape for w in weights]


def test_input_noise() -> None:
    grad = torch.zeros(100_000, dtype=torch.float64, requires_grad=True)
    noisy = InputNoise(0.3).add(grad, torch.Generator().manual_seed(0))
    assert noisy.var().item() == pytest.approx(0.09, rel=5 * math.sqrt(2 / 100_000))
    (through,) = torch.autograd.grad(noisy.sum(), grad)
    assert torch.equal(through, torch.ones_like(grad))
    same = InputNoise(0.3).add(grad, torch.Generator().manual_seed(0))
    assert torch.equal(noisy, same)
    with pytest.raises(ValueError, match="std must be positive and finite, not 0.0"):
        InputNoise(0.0)


@pytest.mark.parametrize(
    ("kind", "fields", "made"),
    [
        ("gaussian", {"std": 1e-3}, Gaussian(0.001)),
        ("gaussian_rel", {"std": 5e-4}, Gaussian(0.0005, relative=True)),
        ("fgsm", {"step_size": 1e-3}, FGSM(0.001)),
        (
            "pgd",
            {"steps": 1, "magnitude": 1e-4, "norm": "inf", "lr": 0.1},
            PGD(1, 1e-4, "inf", 0.1),
        ),
        ("cgd", {"steps": 1, "magnitude": 1e-3}, AdaptivePGD(1, 1e-3, normalise=False)),
        ("persistent_gaussian", {}, Gaussian(0.01, fresh_each_step=False)),
        (
            "persistent_gaussian_rel",
            {"std": 0.2, "floor": 0.0},
            Gaussian(0.2, relative=True, fresh_each_step=False, floor=0.0),
        ),
        ("pgd_clipped_gradient", {"norm": "scale"}, PGD(norm="scale", clip_gradient=True)),
        ("adaptive_pgd", {"steps": 3}, AdaptivePGD(3)),
    ],
)
def test_kinds(kind: str, fields: dict[str, Any], made: Any) -> None:
    found = perturbation_of(kind, **fields)
    assert found == made
    random = isinstance(made, Gaussian)
    assert isinstance(found, RandomPerturbation) == random
    assert isinstance(found, AdversarialPerturbation) != random


@pytest.mark.parametrize(
    ("kind", "fields", "why"),
    [
        ("fgsm", {"step_size": 0.0}, "step_size must be positive and finite, not 0.0"),
        ("pgd", {"steps": 0}, "steps must be 1 or more, not 0"),
        ("pgd", {"norm": "l1"}, "norm must be one of .*, not 'l1'"),
        ("pgd", {"lr": math.inf}, "lr must be positive and finite, not inf"),
        ("adaptive_pgd", {"magnitude": math.nan}, "magnitude must be positive"),
        ("gaussian_rel", {"floor": -1.0}, "floor must be 0 or more and finite, not -1.0"),
    ],
)
def test_fields_out_of_range_are_refused(kind: str, fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        perturbation_of(kind, **fields)
