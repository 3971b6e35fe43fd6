"""AmalgamatedOptimizer keeps torch.optim's contract and computes what the student computes."""

import copy
import io
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from amalgam import AmalgamatedOptimizer, Student, StudentConfig, Teacher, TeacherOptimizer
from amalgam.ops import KINDS


@pytest.fixture
def student() -> Student:
    config = StudentConfig(hidden=6, warmup_steps=3, warmup_lr=0.1)
    return Student(config, generator=torch.Generator().manual_seed(5))


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (), (5,), (2, 3, 2, 2), (0, 3), (1, 2, 1, 2, 3)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        scale = 10.0 ** torch.randint(-6, 2, p.shape, generator=generator)
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("warmup_steps", [None, 0, 2])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_computes_the_student(student, dtype, warmup_steps, weight_decay) -> None:
    params, lr = tensors(dtype=dtype), 0.5
    optimizer = AmalgamatedOptimizer(
        params, lr, student, warmup_steps=warmup_steps, weight_decay=weight_decay
    )
    flat = torch.cat([p.detach().flatten() for p in params])
    policy = copy.deepcopy(student).to(dtype)
    state = policy.initial_state(flat)
    warm = 3 if warmup_steps is None else warmup_steps
    for step in range(6):
        set_grads(params, step)
        grad = torch.cat([p.grad.flatten() for p in params])
        with torch.no_grad():
            if step < warm:
                update, state = 0.1 * grad, policy.warm_up(grad, state)
            else:
                update, state = policy.step(grad, state, backend="reference")
            flat = flat * (1 - lr * weight_decay) - lr * update
        optimizer.step()
        got = torch.cat([p.detach().flatten() for p in params])
        assert torch.allclose(got, flat, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-7)
    assert optimizer.skipped_steps == 0


def test_memory_format_does_not_matter(student) -> None:
    plain = [nn.Parameter(torch.randn(4, 3, 5, 2))]
    strided = [nn.Parameter(plain[0].detach().clone(memory_format=torch.channels_last))]
    assert not strided[0].is_contiguous()
    for params in (plain, strided):
        optimizer = AmalgamatedOptimizer(params, student=student, warmup_steps=1)
        for step in range(3):
            set_grads(plain, step)
            params[0].grad = plain[0].grad.clone()
            optimizer.step()
    assert torch.equal(plain[0], strided[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_keep_float32_state(student, dtype) -> None:
    params, twins = tensors(dtype=dtype), tensors(dtype=dtype)
    optimizer = AmalgamatedOptimizer(params, student=student)
    run(optimizer, params, range(4))
    assert {v.dtype for s in optimizer.state.values() for v in s.values()} == {torch.float32}
    other = AmalgamatedOptimizer(twins, student=student)
    other.load_state_dict(optimizer.state_dict())
    assert {v.dtype for s in other.state.values() for v in s.values()} == {torch.float32}


def test_state_dict_round_trip(student) -> None:
    params, twins = tensors(), tensors()
    optimizer = AmalgamatedOptimizer(params, student=student)
    run(optimizer, params, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    before = copy.deepcopy(saved)
    for p, q in zip(twins, params, strict=True):
        p.data.copy_(q)
    resumed = AmalgamatedOptimizer(twins, student=student)
    resumed.load_state_dict(saved)
    run(optimizer, params, range(5, 9))
    run(resumed, twins, range(5, 9))
    assert all(map(torch.equal, params, twins))
    assert torch.equal(saved["state"][0]["h"], before["state"][0]["h"])
    assert saved["param_groups"] == before["param_groups"]


def test_state_of_another_student_is_refused(student) -> None:
    optimizer = AmalgamatedOptimizer(tensors(), student=student)
    other = AmalgamatedOptimizer(tensors(), student=Student(student.config))
    with pytest.raises(ValueError, match="another student"):
        other.load_state_dict(optimizer.state_dict())


def test_the_student_is_taken_once(student) -> None:
    params, twins = tensors(), tensors()
    one = AmalgamatedOptimizer(params, student=student, warmup_steps=0)
    two = AmalgamatedOptimizer(twins, student=student, warmup_steps=0)
    run(one, params, range(2))
    with torch.no_grad():
        student.head.weight.zero_()
    run(two, twins, range(2))
    assert all(map(torch.equal, params, twins))


def test_groups_and_schedulers(student) -> None:
    params = tensors()
    start = [p.detach().clone() for p in params]
    optimizer = AmalgamatedOptimizer(
        [{"params": params[:2]}, {"params": params[2:4], "lr": 0.0}],
        student=student,
        warmup_steps=0,
    )
    optimizer.add_param_group({"params": params[4:], "lr": 0.25})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    set_grads(params, 0)
    optimizer.step()
    moved = [(p - s).abs().sum().item() for p, s in zip(params, start, strict=True)]
    assert moved[0] > 0
    assert moved[1] > 0
    assert moved[2] == moved[3] == 0
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.0, 0.125]
    with pytest.raises(ValueError, match="lr must be 0 or more, not -1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": -1})
    assert len(optimizer.param_groups) == 3


def test_the_learning_rate_scales_the_update(student) -> None:
    moves = []
    for lr in (1.0, 0.25, torch.tensor(0.25)):
        param = nn.Parameter(torch.zeros(7, dtype=torch.float64))
        param.grad = torch.linspace(-1, 1, 7, dtype=torch.float64)
        AmalgamatedOptimizer([param], lr, student, warmup_steps=0).step()
        moves.append(param.detach())
    assert torch.allclose(moves[0] * 0.25, moves[1], rtol=1e-12)
    assert torch.equal(moves[1], moves[2])


def test_closure(student) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = AmalgamatedOptimizer([param], student=student)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert optimizer.step() is None
    assert not torch.equal(param, torch.ones(3))


def test_parameters_without_gradient_stay(student) -> None:
    params = tensors()
    before = [p.detach().clone() for p in params]
    set_grads(params[:2], 0)
    optimizer = AmalgamatedOptimizer(params, student=student)
    optimizer.step()
    assert all(map(torch.equal, params[2:], before[2:]))
    assert set(optimizer.state) == set(params[:2])


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 3e19])
@pytest.mark.parametrize("step", [1, 4])
def test_unusable_gradients_touch_nothing(student, poison, step) -> None:
    """The authors' guard zeroes the parameters here; ours skips the step, whole."""
    params, twins = tensors(), tensors()
    optimizer = AmalgamatedOptimizer(params, student=student)
    clean = AmalgamatedOptimizer(twins, student=student)
    run(optimizer, params, range(step))
    set_grads(params, step)
    params[3].grad.view(-1)[5] = poison
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert optimizer.skipped_steps == 2
    run(optimizer, params, range(step, 7))
    run(clean, twins, range(7))
    assert all(map(torch.equal, params, twins))


def test_sparse_gradients_are_refused(student) -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="dense gradients"):
        AmalgamatedOptimizer(embedding.parameters(), student=student).step()


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        ({"lr": -1.0}, ValueError, "lr must be 0 or more, not -1"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps"),
        ({"warmup_lr": math.nan}, ValueError, "warmup_lr"),
        ({"backend": "referense"}, ValueError, "did you mean 'reference'"),
        ({"student": "no-such-student"}, FileNotFoundError, "no-such-student"),
    ],
)
def test_bad_settings_are_named(student, settings, error, named) -> None:
    with pytest.raises(error, match=named):
        AmalgamatedOptimizer([nn.Parameter(torch.ones(2))], **{"student": student} | settings)


def test_integer_parameters_are_refused(student) -> None:
    with pytest.raises(TypeError, match="floating-point"):
        AmalgamatedOptimizer([torch.ones(2, dtype=torch.long)], student=student)


def test_copies_and_pickles(student) -> None:
    params = tensors()
    optimizer = AmalgamatedOptimizer(params, student=student)
    run(optimizer, params, range(2))
    twin = copy.deepcopy(optimizer)
    copied = [p for group in twin.param_groups for p in group["params"]]
    run(optimizer, params, range(2, 5))
    run(twin, copied, range(2, 5))
    assert all(map(torch.equal, params, copied))


@pytest.mark.parametrize("kind", KINDS)
def test_teachers_train(kind) -> None:
    """Each goes downhill; Adam's first step is torch's, its later ones are not bias-corrected."""
    param = nn.Parameter(torch.tensor([[3.0, -2.0], [0.5, 1.0]]))
    optimizer = TeacherOptimizer([param], Teacher(kind, lr=0.05))
    for _ in range(50):
        optimizer.zero_grad()
        param.square().sum().backward()
        optimizer.step()
    assert param.square().sum() < 0.9 * 14.25


def test_adam_without_bias_correction() -> None:
    ours, torchs = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    optimizers = TeacherOptimizer([ours], Teacher("adam", 0.1)), torch.optim.Adam([torchs], 0.1)
    ratios = []
    for _ in range(1000):
        before = ours.item(), torchs.item()
        for param, optimizer in zip((ours, torchs), optimizers, strict=True):
            param.grad = torch.ones(1, dtype=torch.float64)
            optimizer.step()
        ratios.append((ours.item() - before[0]) / (torchs.item() - before[1]))
    for step in (1, 10, 100, 1000):
        expected = (1 - 0.9**step) / 0.1 / math.sqrt((1 - 0.999**step) / 0.001)
        assert ratios[step - 1] == pytest.approx(expected, rel=1e-6)


def test_cells_in_half_the_memory(student) -> None:
    params, twins = tensors(), tensors()
    narrow = AmalgamatedOptimizer(params, student=student, cells_dtype=torch.bfloat16)
    wide = AmalgamatedOptimizer(twins, student=student)
    run(narrow, params, range(6))
    run(wide, twins, range(6))
    assert {s["h"].dtype for s in narrow.state.values()} == {torch.bfloat16}
    assert {s["m"].dtype for s in narrow.state.values()} == {torch.float32}
    for ours, theirs in zip(params, twins, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.01)
    resumed = AmalgamatedOptimizer(tensors(), student=student, cells_dtype=torch.bfloat16)
    resumed.load_state_dict(narrow.state_dict())
    assert {s["h"].dtype for s in resumed.state.values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="cells_dtype"):
        AmalgamatedOptimizer(params, student=student, cells_dtype=torch.float16)
