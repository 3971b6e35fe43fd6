"""The nominal student as a policy: what it is told of tensors, and how that enters its weights."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from amalgam.layout import Layout
from amalgam.policies import NominalConfig, NominalStudent, load_policy
from amalgam.policies.nominal_student import INPUTS, PACE_BOUND

LAYOUT = Layout({"w": (3, 4), "b": (4,), "none": (0, 2), "k": (2, 3, 2, 2), "s": ()})
FILLED = [size for size in LAYOUT.sizes if size]


def made(**config: Any) -> NominalStudent:
    generator = torch.Generator().manual_seed(0)
    given = {"hidden": 3, "inputs": tuple(INPUTS), **config}
    student = NominalStudent(NominalConfig(**given), generator=generator).double()
    with torch.no_grad():
        student.head.weight.copy_(torch.randn((2, 3), generator=generator, dtype=torch.float64))
        student.head.bias.fill_(0.25)
    return student


def params() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(LAYOUT.numel, generator=generator, dtype=torch.float64)


def test_it_is_told_of_tensors() -> None:
    student, values = made(), params()
    state = student.initial_state(values, LAYOUT)
    assert state.t.tolist() == [0.0] * 4
    context = student.context(state._replace(t=state.t + 6), values, LAYOUT, values)
    assert list(context.sizes) == FILLED
    fan_ins, ranks = [4, 1, 12, 1], [2, 1, 4, 0]
    for tensor, part in enumerate(values.split(FILLED)):
        rms = part.square().mean().sqrt().item()
        expected = [
            *(math.tanh(7 / steps) for steps in (10, 100, 1000)),
            ranks[tensor] / 2,
            math.log(fan_ins[tensor]) / 4,
            math.log(rms + 1e-3) / 4,
        ]
        assert context.inputs[tensor].tolist() == pytest.approx(expected, rel=1e-12)
        corrections = [1 / (1 - 0.9**7), 1 / (1 - 0.999**7), 1.0]
        assert context.corrections[tensor].tolist() == pytest.approx(corrections, rel=1e-12)


def test_corrections_keep_float32_whole_at_the_first_step() -> None:
    student = NominalStudent()
    state = student.initial_state(torch.zeros(2))
    context = student.context(state, torch.zeros(2), None, torch.zeros(2))
    assert context.corrections.dtype == torch.float32
    assert context.corrections[0].tolist() == pytest.approx([10.0, 1000.0, 1.0], rel=1e-7)


@pytest.mark.parametrize("pacing", [0.0, 0.1])
def test_wide_tensors_step_by_shares_and_their_paces_adapt_slower(pacing: float) -> None:
    """Of a matrix the smaller dimension counts, of a vector the root; numbers step whole."""
    layout = Layout(
        {"w": (6, 9), "b": (50,), "none": (0, 7), "k": (20, 1, 2, 2), "s": (), "few": (2,)}
    )
    values = torch.linspace(-1, 2, layout.numel, dtype=torch.float64)
    found = []
    for full_width in (None, 3):
        student = made(inputs=(), pacing=pacing, full_width=full_width)
        assert student.sees_shapes == (full_width is not None)
        state = student.initial_state(values, layout)._replace(m=values)
        found.append(student.context(state, values, layout, values))
    whole, shared = (context.corrections for context in found)
    shares = torch.tensor([3 / 6, math.sqrt(3 / 50), 3 / 4, 1, 1], dtype=torch.float64)
    paces = [context.pace for context in found]
    assert paces[0].tolist() == pytest.approx([pacing] * 5)
    torch.testing.assert_close(paces[1], shares.sqrt() * paces[0], rtol=1e-12, atol=0)
    expected = shares * whole[:, 2] * (paces[1] - paces[0]).exp()
    torch.testing.assert_close(shared[:, 2], expected, rtol=1e-12, atol=0)
    assert torch.equal(shared[:, :2], whole[:, :2])


def test_what_it_is_told_enters_as_further_inputs_would() -> None:
    """A bias a tensor is the first layer's kernel times inputs that are one for all coordinates."""
    student, values = made(), params()
    state = student.initial_state(values, LAYOUT)
    context = student.context(state, values, LAYOUT, values)
    folded, settings = student.folded(student.weights(), context)
    kernel, bias = student.cells[0].weight_ih, student.cells[0].bias
    for tensor in range(len(context.inputs)):
        expected = bias + kernel[:, 3:] @ context.inputs[tensor]
        assert torch.allclose(folded[2][tensor], expected, rtol=1e-12)
    assert torch.equal(folded[0], kernel[:, :3])
    assert torch.equal(
        folded[-2], torch.stack((2 * student.head.weight[0], student.head.weight[1]))
    )
    assert folded[-1].tolist() == [0.5, 0.25]
    assert settings.sizes == tuple(FILLED)


def test_unfolding_is_foldings_gradient() -> None:
    student, values = made(), params()
    context = student.context(student.initial_state(values, LAYOUT), values, LAYOUT, values)
    weights = student.weights()
    folded, _ = student.folded(weights, context)
    upstream = [torch.randn_like(each) for each in folded]
    expected = torch.autograd.grad(folded, weights, upstream)
    for ours, theirs in zip(student.unfolded(upstream, context), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12)


def test_the_rms_of_many_coordinates_is_not_summed_naively() -> None:
    """A running float32 sum of 2^24 equal squares would stop growing long before."""
    student = NominalStudent(NominalConfig(hidden=1, inputs=("rms",)))
    values = torch.full((2**24,), 0.02)
    state = student.initial_state(torch.zeros(1), None)
    constants = student.constants_of([values.shape], state.t)
    context = student.context_of(constants, state.t, [values])
    assert context.inputs.item() == pytest.approx(math.log(0.021) / 4, rel=1e-4)


def test_several_optimizees_lie_one_after_another() -> None:
    student, values = made(), params()
    state = student.initial_state(values, LAYOUT)
    both = type(state)(*(torch.cat((t, t), -1) for t in state))
    both = both._replace(t=torch.tensor([0.0, 0, 0, 0, 5, 5, 5, 5], dtype=torch.float64))
    context = student.context(both, torch.cat((values, 2 * values)), LAYOUT, values.repeat(2))
    first = student.context(state, values, LAYOUT, values)
    second = student.context(state._replace(t=state.t + 5), 2 * values, LAYOUT, values)
    assert torch.allclose(context.inputs, torch.cat((first.inputs, second.inputs)), rtol=1e-12)
    assert torch.equal(context.corrections, torch.cat((first.corrections, second.corrections)))


def test_the_pace_grows_by_the_agreement_of_signs() -> None:
    """Three of four signs agree, one does not; zeros and the first step say nothing."""
    student = made(pacing=0.5, inputs=())
    values = torch.zeros(LAYOUT.numel, dtype=torch.float64)
    state = student.initial_state(values, LAYOUT)
    assert state.pace.tolist() == [0.0] * 4
    grad = values.clone()
    grad[12:16] = torch.tensor([1.0, -2.0, 3.0, -4.0])
    first = student.context(state, None, LAYOUT, grad)
    assert first.corrections[:, 2].tolist() == [1.0] * 4
    _, state = student.step(grad, state, layout=LAYOUT)
    grad[12] = -1e-30
    second = student.context(state, None, LAYOUT, grad)
    assert second.corrections[:, 2].tolist() == pytest.approx([1.0, math.exp(0.25), 1.0, 1.0])
    update, after = student.step(grad, state, layout=LAYOUT)
    assert after.pace.tolist() == pytest.approx([0.0, 0.25, 0.0, 0.0])
    unpaced, _ = student.step(grad, state._replace(pace=state.pace - 0.25), layout=LAYOUT)
    assert torch.allclose(update[12:16], unpaced[12:16] * math.exp(0.25), rtol=1e-12)


def test_a_pace_is_steady_at_an_agreement() -> None:
    """Of the coordinates that have signs: zeros neither agree nor disagree."""
    student = made(pacing=0.5, inputs=(), steady_agreement=0.5)
    m = torch.zeros(LAYOUT.numel, dtype=torch.float64)
    grad = m.clone()
    m[:8], grad[:8] = 1.0, torch.tensor([1.0, 1, 1, 1, 1, 1, -1, -1])
    m[12:16], grad[12:16] = 1.0, torch.tensor([1.0, -1, 0, 0])
    m[16:28], grad[16:28] = 1.0, 1.0
    state = student.initial_state(grad, LAYOUT)._replace(m=m)
    pace = student.context(state, None, LAYOUT, grad).pace
    assert pace.tolist() == pytest.approx([0.0, 0.5 * (0 - 1) / 4, 0.5 * (12 - 6) / 24, 0.0])


def test_after_so_many_steps_a_pace_moves_by_less_and_less() -> None:
    """In step t by so many of t; so, where signs go on saying the same, by the logarithm of t."""
    student = made(pacing=0.5, inputs=(), pacing_steps=4)
    grad = torch.ones(LAYOUT.numel, dtype=torch.float64)
    state = student.initial_state(grad, LAYOUT)._replace(m=grad)
    before = torch.tensor([0.0, 2.0, 3.0, 5.0], dtype=torch.float64)
    pace = student.context(state._replace(t=before), None, LAYOUT, grad).pace
    assert pace.tolist() == pytest.approx([0.5, 0.5, 0.5, 0.5 * 4 / 6])


@pytest.mark.parametrize("pacing", [0.0, 0.5])
def test_the_rate_rises_over_a_tensors_first_steps(pacing: float) -> None:
    """To t / rate_warmup in a tensor's step t, whatever else scales it."""
    settings = {"pacing": pacing, "inputs": (), "full_width": 2}
    student, whole = made(rate_warmup=4, **settings), made(**settings)
    grad = torch.ones(LAYOUT.numel, dtype=torch.float64)
    state = student.initial_state(grad, LAYOUT)._replace(m=grad)
    state = state._replace(t=torch.tensor([0.0, 2.0, 3.0, 9.0], dtype=torch.float64))
    update, after = student.step(grad, state, layout=LAYOUT)
    expected, whole_after = whole.step(grad, state, layout=LAYOUT)
    shares = [1 / 4, 3 / 4, 1.0, 1.0]
    for ours, theirs, share in zip(
        update.split(FILLED), expected.split(FILLED), shares, strict=True
    ):
        assert theirs.abs().min() > 0
        assert torch.allclose(ours, share * theirs, rtol=1e-12, atol=0)
    for name, ours, theirs in zip(after._fields, after, whole_after, strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("most", [None, 0.25])
def test_a_pace_stays_within_its_bounds(most: float | None) -> None:
    """The upper one is the configuration's; the lower one is every student's."""
    student = made(pacing=0.5, inputs=(), **({} if most is None else {"most_pace": most}))
    grad = torch.ones(LAYOUT.numel, dtype=torch.float64)
    state = student.initial_state(grad, LAYOUT)._replace(m=grad)
    for sign, bound in ((1, PACE_BOUND if most is None else most), (-1, -PACE_BOUND)):
        for _ in range(20):
            context = student.context(state, None, LAYOUT, sign * grad)
            state = state._replace(pace=context.pace)
        assert state.pace.tolist() == [bound] * 4
        assert context.corrections[:, 2].tolist() == pytest.approx([math.exp(bound)] * 4)


def test_a_pace_keeps_what_the_student_promises() -> None:
    """No step without gradients, the mirrored run, and no dependence on the loss's scale."""
    student = made(pacing=0.2, inputs=())
    generator = torch.Generator().manual_seed(3)
    grads = torch.randn((9, LAYOUT.numel), generator=generator, dtype=torch.float64) + 0.7
    grads[:, 20:] = 0

    def run(scale: float) -> tuple[list[torch.Tensor], torch.Tensor]:
        state, updates = student.initial_state(grads[0], LAYOUT), []
        for grad in grads:
            update, state = student.step(scale * grad, state, layout=LAYOUT)
            updates.append(update.detach())
        return updates, state.pace

    updates, pace = run(1.0)
    assert pace[:3].abs().min() > 0
    assert not torch.stack(updates)[:, 20:].any()
    for scale in (-1.0, 2.0**30, -(2.0**-10)):
        others, others_pace = run(scale)
        assert torch.equal(pace, others_pace)
        for ours, theirs in zip(updates, others, strict=True):
            assert torch.allclose(theirs, ours * math.copysign(1, scale), rtol=1e-9, atol=0)


def test_warm_up_counts_a_step() -> None:
    student, values = made(), params()
    state = student.initial_state(values, LAYOUT)
    warmed = student.warm_up(values, state, layout=LAYOUT)
    assert warmed.t.tolist() == [1.0] * 4
    assert torch.allclose(warmed.m, 0.1 * values)
    assert not warmed.h.any()


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"inputs": ("rsm",)}, "inputs must be of ['time', 'rank', 'fan_in', 'rms'], not 'rsm'; "),
        ({"inputs": ("rms", "rms")}, "inputs must be named once each"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"gain": math.inf}, "gain must be positive and finite"),
        ({"hidden": 0}, "hidden must be 1 or more"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"full_width": 0}, "full_width must be 1 or more"),
        ({"steady_agreement": 1.0}, "steady_agreement must be in [0, 1)"),
        ({"pacing_steps": 0}, "pacing_steps must be"),
        ({"rate_warmup": 0}, "rate_warmup must be 1 or more"),
        ({"most_pace": -0.5}, "most_pace must be 0 or more"),
        ({"most_pace": 4.5}, "most_pace must be at most 4.0, not 4.5"),
    ],
)
def test_bad_configurations_are_refused(config: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        NominalConfig(**config)


def test_parameters_are_asked_for_where_they_are_needed() -> None:
    grad = torch.ones(3, dtype=torch.float64)
    student = made()
    with pytest.raises(ValueError, match="params must be given to a nominal student"):
        student.step(grad, student.initial_state(grad))
    for wrong in (grad[:1], torch.cat((grad, grad)), grad.float()):
        with pytest.raises(ValueError, match="params must "):
            student.step(grad, student.initial_state(grad), params=wrong)
    state = student.initial_state(params(), LAYOUT)
    other = Layout({"w": (5, 9)})
    with pytest.raises(ValueError, match="layout must be the state's, of 4 tensors and 41"):
        student.step(params(), state, layout=other, params=params())
    without = made(inputs=("time",))
    assert without.step(grad, without.initial_state(grad))[0].shape == (3,)


def test_files_keep_the_inputs(tmp_path: Any) -> None:
    student = NominalStudent(NominalConfig(hidden=2, inputs=("rms", "time")))
    student.save(tmp_path / "a.safetensors")
    loaded = load_policy(tmp_path / "a.safetensors")
    assert isinstance(loaded, NominalStudent)
    assert loaded.config == student.config
