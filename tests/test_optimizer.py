"""AmalgamatedOptimizer keeps torch.optim's contract and computes what the student computes."""

import copy
import io
import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from amalgam import (
    AmalgamatedOptimizer,
    NominalConfig,
    NominalStudent,
    Student,
    StudentConfig,
    Teacher,
    TeacherOptimizer,
)
from amalgam.ops import KINDS

# Decay that shows within a few steps, and rates of any size, are those that users are warned of.
pytestmark = pytest.mark.filterwarnings("ignore:weight_decay=", "ignore:lr=")


def student_of(hidden: int) -> Student:
    config = StudentConfig(hidden=hidden, warmup_steps=3, warmup_lr=0.1)
    return Student(config, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def student() -> Student:
    return student_of(6)


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
    with pytest.raises(ValueError, match="lr must be 0 or more and finite, not -1"):
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
    optimizer = AmalgamatedOptimizer(embedding.parameters(), student=student)
    with pytest.raises(RuntimeError, match="dense gradients"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="dense gradients"):
        optimizer.stats()


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        ({"lr": -1.0}, ValueError, "lr must be 0 or more and finite, not -1"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps"),
        ({"warmup_lr": math.nan}, ValueError, "warmup_lr"),
        ({"backend": "referense"}, ValueError, "did you mean 'reference'"),
        ({"backend": None}, TypeError, "backend must be a string, one of .* not None"),
        ({"rounding": "up"}, ValueError, "rounding must be 'nearest' or 'stochastic', not 'up'"),
        ({"seed": -1}, ValueError, "seed must lie in"),
        ({"student": "no-such-student"}, FileNotFoundError, "no-such-student"),
    ],
)
def test_bad_settings_are_named(student, settings, error, named) -> None:
    with pytest.raises(error, match=named):
        AmalgamatedOptimizer([nn.Parameter(torch.ones(2))], **{"student": student} | settings)


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


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.int8])
def test_cells_in_less_memory(student, kept) -> None:
    params, twins = tensors(), tensors()
    narrow = AmalgamatedOptimizer(params, student=student, cells_dtype=kept)
    wide = AmalgamatedOptimizer(twins, student=student)
    run(narrow, params, range(6))
    run(wide, twins, range(6))
    assert {s["h"].dtype for s in narrow.state.values()} == {kept}
    assert {s["m"].dtype for s in narrow.state.values()} == {torch.float32}
    for ours, theirs in zip(params, twins, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.01)
    resumed = AmalgamatedOptimizer(tensors(), student=student, cells_dtype=kept)
    resumed.load_state_dict(narrow.state_dict())
    assert {s["h"].dtype for s in resumed.state.values()} == {kept}
    with pytest.raises(ValueError, match="cells_dtype"):
        AmalgamatedOptimizer(params, student=student, cells_dtype=torch.float16)


def settings_of_precision(name: str) -> dict[str, object]:
    kinds = {"narrow": torch.bfloat16, "codes": torch.int8}
    return {"cells_dtype": kinds[name], "rounding": "stochastic"} if name in kinds else {}


@pytest.mark.parametrize("precision", ["wide", "narrow", "codes"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_capturable_is_the_same_optimizer(student, backend, precision) -> None:
    """Warm-up, a skipped step and a schedule included, to the bit."""
    how = settings_of_precision(precision) | {"weight_decay": 0.1, "backend": backend}
    dtype = torch.bfloat16 if precision == "narrow" else torch.float32
    params, twins = tensors(dtype=dtype), tensors(dtype=dtype)
    lr = torch.tensor(0.5)
    usual = AmalgamatedOptimizer(params, 0.5, student, **how)
    captured = AmalgamatedOptimizer(twins, lr, student, **how, capturable=True)
    for step in range(7):
        for those, optimizer in ((params, usual), (twins, captured)):
            set_grads(those, step)
            if step == 4:
                those[0].grad[0, 0] = math.inf
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                optimizer.step()
        usual.param_groups[0]["lr"] /= 2
        lr /= 2
    assert all(map(torch.equal, params, twins))
    assert usual.skipped_steps == captured.skipped_steps == 1
    for param, twin in zip(params, twins, strict=True):
        for name, tensor in usual.state[param].items():
            assert torch.equal(tensor, captured.state[twin][name]), name


def test_capturable_steps_do_not_wait(student, monkeypatch) -> None:
    """Of the reference, nothing is read on the host."""
    params = tensors()
    optimizer = AmalgamatedOptimizer(params, student=student, backend="reference", capturable=True)
    set_grads(params, 0)
    optimizer.step()

    def refuse(self: Tensor) -> None:
        raise AssertionError("a tensor was read on the host")

    for name in ("item", "__bool__", "__float__", "__int__", "tolist"):
        monkeypatch.setattr(Tensor, name, refuse)
    set_grads(params, 1)
    optimizer.step()
    monkeypatch.undo()
    assert {int(s["step"]) for s in optimizer.state.values()} == {2}


class _NothingReadBack(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # What a graph can't hold, and any other step would wait for.
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.equal.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("paced", [False, True])
def test_a_capturable_step_reads_nothing_back(student, paced, scaled) -> None:
    params = tensors()
    lr = torch.tensor(0.5)
    if paced:
        student = NominalStudent(NominalConfig(hidden=4, pacing=0.3, orthogonal=True))
    optimizer = AmalgamatedOptimizer(params, lr, student, capturable=True, backend="reference")
    if scaled:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    set_grads(params, 0)
    optimizer.step()
    set_grads(params, 1)
    with _NothingReadBack():
        optimizer.step()


def test_a_scaler_leaves_its_flag_and_scale_to_capturable_steps(student) -> None:
    params, twins = tensors(), tensors()
    scaled = AmalgamatedOptimizer(params, student=student, capturable=True)
    plain = AmalgamatedOptimizer(twins, student=student)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    for step in range(5):
        set_grads(params, step)
        set_grads(twins, step)
        for param in params:
            param.grad *= scaler.get_scale()
        if step == 2:
            params[1].grad.fill_(math.inf)
        else:
            plain.step()
        scaler.step(scaled)
        scaler.update()
    assert scaled.skipped_steps == 1
    assert scaler.get_scale() == 2.0
    assert all(map(torch.equal, params, twins))


def test_stochastic_rounding_resumes_to_the_same_bits(student) -> None:
    def make(seed: int) -> tuple[list[nn.Parameter], AmalgamatedOptimizer]:
        params = tensors(dtype=torch.bfloat16)
        how = settings_of_precision("narrow")
        return params, AmalgamatedOptimizer(params, student=student, seed=seed, **how)

    params, optimizer = make(7)
    run(optimizer, params, range(5))
    twins, resumed = make(8)
    for twin, param in zip(twins, params, strict=True):
        twin.data.copy_(param)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, range(5, 9))
    run(resumed, twins, range(5, 9))
    assert all(map(torch.equal, params, twins))
    others, other = make(8)
    run(other, others, range(9))
    assert not all(map(torch.equal, params, others))


def test_stochastic_rounding_keeps_small_updates(student) -> None:
    """Updates of a thousandth of a bfloat16's last bit: to nearest they vanish, all of them."""
    moves = {}
    for rounding in ("nearest", "stochastic"):
        exact = nn.Parameter(torch.ones(4000))
        param = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
        for p, how in ((param, rounding), (exact, "nearest")):
            optimizer = AmalgamatedOptimizer([p], 1e-4, student, warmup_steps=1000, rounding=how)
            for _ in range(100):
                p.grad = torch.ones_like(p)
                optimizer.step()
        moves[rounding] = (1 - param.double()).mean().item(), (1 - exact.double()).mean().item()
    assert moves["nearest"][0] == 0
    ours, theirs = moves["stochastic"]
    assert ours == pytest.approx(theirs, rel=0.2)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["wide", "narrow", "codes"])
@pytest.mark.parametrize("hidden", [4, 6, 20])  # of which backend "cuda" has all but 6
def test_a_step_in_a_cuda_graph(hidden, precision) -> None:
    """Replays count steps, end warm-up, skip, and follow the learning rate."""
    student = student_of(hidden)
    how = settings_of_precision(precision) | {"weight_decay": 0.1}
    dtype = torch.bfloat16 if precision == "narrow" else torch.float32
    params, twins = ([p.data.cuda().requires_grad_() for p in tensors(dtype=dtype)] for _ in "ab")
    lr = torch.tensor(0.5, device="cuda")
    usual = AmalgamatedOptimizer(params, 0.5, student, **how)
    captured = AmalgamatedOptimizer(twins, lr, student, **how, capturable=True)
    grads = []
    for step in range(8):
        drawn = tensors(dtype=dtype)
        set_grads(drawn, step)
        grads.append([p.grad.cuda() for p in drawn])
    grads[5][0][0, 0] = math.inf
    for twin, grad in zip(twins, grads[0], strict=True):
        twin.grad = grad.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step, drawn in enumerate(grads):
        for param, twin, grad in zip(params, twins, drawn, strict=True):
            param.grad = grad
            twin.grad.copy_(grad)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            usual.step()
        if step:
            graph.replay()
        usual.param_groups[0]["lr"] /= 2
        lr /= 2
    assert usual.skipped_steps == captured.skipped_steps == 1
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert int(captured.state[twin]["step"]) == 7


@pytest.mark.gpu
def test_a_cuda_graph_is_refused_what_it_would_reset(student) -> None:
    for capturable in (False, True):
        param = torch.ones(3, device="cuda", requires_grad=True)
        param.grad = torch.ones(3, device="cuda")
        optimizer = AmalgamatedOptimizer([param], student=student, capturable=capturable)
        with pytest.raises(RuntimeError, match="capturable=True|before capturing"):  # noqa: SIM117
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                optimizer.step()


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [4, 6, 20])
def test_a_cuda_graph_packs_no_weights(hidden, monkeypatch) -> None:
    """It reads what the steps before it have packed."""
    from amalgam.backends import student_step_in_place
    from amalgam.kernels import lstm_weights

    student = student_of(hidden)
    param = torch.ones(3, device="cuda", requires_grad=True)
    param.grad = torch.ones(3, device="cuda")
    optimizer = AmalgamatedOptimizer([param], student=student, capturable=True)
    optimizer.step()
    monkeypatch.setattr(lstm_weights, "pack", None)
    monkeypatch.setattr(student_step_in_place, "pack", None)
    monkeypatch.setattr(student_step_in_place, "pack_nominal", None)
    monkeypatch.setattr(student_step_in_place, "_pack_for_tensor_cores", None)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
