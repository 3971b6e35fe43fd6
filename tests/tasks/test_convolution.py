"""Convolutions with derivatives of their own: PyTorch's numbers, wherever they are used."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from places import needs_gpu
from torch import Tensor, nn
from torch.nn import functional

from amalgam import tasks
from amalgam.seeding import generator_for
from amalgam.tasks import Task, convolution

CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
SETTINGS = {
    "plain": {},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "dilation": {"dilation": 2},
    "same": {"padding": "same"},
    "valid": {"padding": "valid"},
    "same-dilated": {"padding": "same", "dilation": 2},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4},
    "all": {"stride": (2,), "padding": (1,), "dilation": [2], "groups": 2},
}


Within = Callable[[], AbstractContextManager[Any]]
WITHIN = [partial(convolution.fast, True), partial(convolution.fast, None), convolution.products]


def paper_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def paper_task(dtype: torch.dtype = torch.float32, fast: bool | None = None) -> Task:
    generator = generator_for(0)
    x = torch.rand(64, 1, 28, 28, generator=generator).to(dtype)
    y = torch.randint(10, (64,), generator=generator)
    return Task(
        "paper", lambda: paper_cnn().to(dtype), (x, y), (x, y),
        batch_size=64, fast_convolutions=fast,
    )  # fmt: skip


def draw(dims: int, channels: int, groups: int = 1, dtype=torch.float64) -> tuple[Tensor, ...]:
    generator = generator_for(dims)
    sizes = (
        (2, channels, *(7, 6, 5)[:dims]),
        (4, channels // groups, *(3, 2, 3)[:dims]),
        (4,),
    )
    return tuple(
        torch.randn(size, generator=generator, dtype=dtype).requires_grad_() for size in sizes
    )


def derivatives(task: Task, flat: Tensor, vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient, and the Hessian's product with a vector."""
    leaf = flat.detach().requires_grad_()
    loss = task.objective(leaf, tuple(tensor[: task.batch_size] for tensor in task.train))
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    (product,) = torch.autograd.grad(grad, leaf, vector)
    return loss.detach(), grad.detach(), product


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_two_derivatives_are_pytorchs(dims: int, setting: str, channels: int, biased: bool) -> None:
    how = SETTINGS[setting]
    groups = how.get("groups", 1)
    if channels < groups:
        pytest.skip("no groups of one channel")
    x, weight, bias = draw(dims, channels, groups)
    inputs = [x, weight, bias] if biased else [x, weight]
    found = []
    for within in (convolution.fast(True), convolution.products(), convolution.fast(False)):
        with within:
            out = CONVOLUTIONS[dims - 1](*inputs, **how)
        grads = torch.autograd.grad(out.tanh().square().sum(), inputs, create_graph=True)
        twice = torch.autograd.grad(sum((g.sin() * g).sum() for g in grads), inputs)
        found.append((out, *grads, *twice))
    for *ours, theirs in zip(*found, strict=True):
        for one in ours:
            assert one.shape == theirs.shape
            atol = 1e-12 * theirs.abs().max().item()
            torch.testing.assert_close(one, theirs, rtol=1e-12, atol=atol)


@pytest.mark.parametrize("kept", ["x", "weight", "bias"])
@pytest.mark.parametrize("dims", [1, 2])
def test_whatever_needs_a_gradient(dims: int, kept: str) -> None:
    """Each input alone, and a linear function's second derivative that is none."""
    inputs = dict(zip(("x", "weight", "bias"), draw(dims, 4), strict=True))
    for name, tensor in inputs.items():
        tensor.requires_grad_(name == kept)

    def function(tensor: Tensor) -> Tensor:
        with convolution.fast(True):
            out = CONVOLUTIONS[dims - 1](*(inputs | {kept: tensor}).values(), stride=2)
        return out.square()

    assert torch.autograd.gradcheck(function, inputs[kept])
    assert torch.autograd.gradgradcheck(function, inputs[kept])


def test_derivatives_of_any_order() -> None:
    x, weight, bias = draw(2, 2)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with convolution.fast(True):
            out = functional.conv2d(x, weight, bias, padding=1)
        grads = torch.autograd.grad(out.sin().sum(), (x, weight, bias), create_graph=True)
        return sum((g * g).sum() for g in grads)

    small = tuple(t.detach()[:1, ..., :3].requires_grad_() for t in (x, weight))
    assert torch.autograd.gradgradcheck(function, (*small, bias.detach()[:1].requires_grad_()))


def test_double_precision_is_pytorchs() -> None:
    ours, plain = (paper_task(torch.float64, fast) for fast in (True, False))
    flat = ours.init_params(generator_for(1))
    vector = torch.randn(flat.shape, generator=generator_for(2), dtype=flat.dtype)
    for mine, theirs in zip(
        derivatives(ours, flat, vector), derivatives(plain, flat, vector), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12 * theirs.abs().max().item())


def test_single_precision_is_as_exact_as_pytorchs() -> None:
    flat = paper_task().init_params(generator_for(1))
    vector = torch.randn(flat.shape, generator=generator_for(2))
    exact = derivatives(paper_task(torch.float64, False), flat.double(), vector.double())
    ours = derivatives(paper_task(fast=None), flat, vector)
    plain = derivatives(paper_task(fast=False), flat, vector)
    assert not torch.equal(ours[2], plain[2])
    for mine, theirs, true in zip(ours[1:], plain[1:], exact[1:], strict=True):
        assert (mine - true).norm() <= 2 * (theirs - true).norm()


def test_bits_repeat() -> None:
    task = paper_task()
    flat = task.init_params(generator_for(1))
    vector = torch.randn(flat.shape, generator=generator_for(2))
    first = derivatives(task, flat, vector)
    for _ in range(3):
        assert all(map(torch.equal, first, derivatives(task, flat, vector)))
    with torch.no_grad():
        assert torch.equal(task.objective(flat, task.train), first[0])


@pytest.mark.parametrize("fast", [None, False])
def test_a_module_is_trained_as_an_unroll_trains_it(fast: bool | None) -> None:
    task = paper_task(fast=fast)
    module = task.init_module(generator_for(1))
    task.backward(module, task.train, generator_for(2))
    flat = task.layout.flatten(dict(module.named_parameters())).detach().requires_grad_()
    (grad,) = torch.autograd.grad(task.objective(flat, task.train), flat)
    ours = task.layout.flatten({name: p.grad for name, p in module.named_parameters()})
    assert torch.equal(ours, grad)


@pytest.mark.parametrize(("name", "fast"), [("digits-mlp", True), ("digits-cnn", None)])
def test_what_is_no_faster_keeps_its_bits(name: str, fast: bool | None) -> None:
    task = tasks.load(name)
    flat = task.init_params(generator_for(1))
    vector = torch.randn(flat.shape, generator=generator_for(2))
    task.fast_convolutions = False
    plain = derivatives(task, flat, vector)
    task.fast_convolutions = fast
    assert all(map(torch.equal, plain, derivatives(task, flat, vector)))


def test_modules_that_ask_for_views() -> None:
    """As half the world's do, of a convolution's output; also by its method's keywords."""

    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernels = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.kernels(x)
            return out.view(len(x), -1) + out.view(size=(len(x), -1))

    x, y = torch.rand(5, 3, 6, 6), torch.randint(64, (5,))
    losses = []
    for fast in (True, False):
        task = Task("view", Viewing, (x, y), (x, y), batch_size=5, fast_convolutions=fast)
        losses.append(task.objective(task.init_params(generator_for(0)), (x, y)))
    torch.testing.assert_close(*losses)
    with convolution.fast(True), pytest.raises(RuntimeError, match="invalid for input of size"):
        x.view(7)


def test_transforms_are_pytorchs() -> None:
    """vmap, a gradient by torch.func, and forward over reverse: as without."""
    task = paper_task()
    flats = torch.stack([task.init_params(generator_for(s)) for s in (1, 2)])
    batch = tuple(tensor[:32] for tensor in task.train)
    vector = torch.randn(flats[0].shape, generator=generator_for(3))

    def objective(flat: Tensor) -> Tensor:
        return task.objective(flat, batch)

    def product() -> Tensor:
        return torch.func.jvp(torch.func.grad(objective), (flats[0],), (vector,))[1]

    def forward_mode() -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(flats[0], vector)
            return torch.autograd.forward_ad.unpack_dual(objective(dual)).tangent

    found = []
    for task.fast_convolutions in (True, False):
        found.append((torch.func.vmap(objective)(flats), product(), forward_mode()))
    assert all(map(torch.equal, *found))


def test_autocast_is_pytorchs() -> None:
    x, weight, bias = draw(2, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), convolution.fast(True):
        assert functional.conv2d(x, weight, bias).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(4, 3, 3, 2)}, "expected input"),
        ({"weight": torch.ones(4, 4, 3)}, "expected"),
        ({"weight": torch.ones(4, 4, 9, 9)}, "Kernel size can't be greater"),
        ({"bias": torch.ones(4).double()}, "type"),
        ({"padding": "other"}, "padding"),
        ({"stride": (1, 1, 1)}, "stride"),
    ],
)
@pytest.mark.parametrize("within", WITHIN)
def test_pytorch_refuses(within: Within, changes: dict, message: str) -> None:
    x, weight, _ = draw(2, 4, dtype=torch.float32)
    with within(), pytest.raises(RuntimeError, match=message):
        functional.conv2d(**({"input": x, "weight": weight} | changes))


@pytest.mark.parametrize("within", WITHIN)
def test_what_is_left_to_pytorch(within: Within) -> None:
    """One image without a batch, no images, padding that is not the same on both sides."""
    x, weight, bias = draw(2, 4, dtype=torch.float32)
    for images, how in ((x[0], {}), (x[:0], {}), (x, {"padding": "same", "dilation": (2, 3)})):
        with within():
            ours = functional.conv2d(images, weight, bias, **how)
        assert torch.equal(ours, functional.conv2d(images, weight, bias, **how))


class Viewed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1).sigmoid()


class ViewedAs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view_as(torch.empty(len(x), x[0].numel())).sigmoid()


class ViewedByAten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.view(x, [len(x), x[0].numel()])


def small_task(
    *layers: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, **how: Any
) -> Task:
    """Images of 9 x 9 numbers in two channels, 6 a batch."""
    generator = generator_for(0)
    x = torch.rand(12, 2, 9, 9, generator=generator).to(dtype)
    y = torch.randint(3, (12,), generator=generator)

    def build() -> nn.Module:
        return nn.Sequential(*(layer() for layer in layers), nn.Flatten(), nn.LazyLinear(3))

    def called() -> nn.Module:
        module = build().to(dtype)
        module(x[:1])
        return module

    return Task("small", called, (x, y), (x, y), batch_size=6, **how)


SMALL = {
    "pooled": (partial(nn.Conv2d, 2, 8, 3), nn.ReLU, partial(nn.MaxPool2d, 2)),
    "seen whole": (partial(nn.Conv2d, 2, 5, 9, bias=False), nn.Tanh),
    "two": (partial(nn.Conv2d, 2, 4, (3, 2), 2, 1), nn.GELU, partial(nn.Conv2d, 4, 3, 2)),
    "viewed": (partial(nn.Conv2d, 2, 4, 3, dilation=2), Viewed),
    "viewed as": (partial(nn.Conv2d, 2, 4, 3), ViewedAs),
    "normed": (partial(nn.Conv2d, 2, 4, 3), partial(nn.GroupNorm, 2, 4), nn.ReLU),
    "grouped": (partial(nn.Conv2d, 2, 4, 3, groups=2), nn.ReLU),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_many_run_as_one_as_exactly_as_alone(device: str, name: str) -> None:
    """Losses, gradients and Hessian products of 4 times 2, each within PyTorch's own error."""
    like = small_task(*SMALL[name])
    flat = torch.stack([like.init_params(generator_for(s)) for s in range(8)]).view(4, 2, -1)
    vector = torch.randn(flat.shape, generator=generator_for(9))
    found = []
    for dtype, stack in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
        task = small_task(*SMALL[name], dtype=dtype, fast_convolutions=stack).to(device)
        batches = [task.batches(generator_for(row), 1)[0] for row in range(4)]
        batch = tuple(map(torch.stack, zip(*batches, strict=True)))
        leaf = flat.to(device, dtype).requires_grad_()
        losses = task.objectives(leaf, batch, stack)
        (grad,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
        (product,) = torch.autograd.grad(grad, leaf, vector.to(leaf))
        found.append([each.detach().double() for each in (losses, grad, product)])
    for together, alone, exact in zip(*found, strict=True):
        assert (together - exact).norm() <= 2 * (alone - exact).norm()


def test_what_runs_as_one_on_a_cpu_is_small_and_is_many() -> None:
    pooled = small_task(*SMALL["pooled"])
    assert [pooled.stacks(count) for count in (7, 8)] == [False, True]
    with torch.autocast("cpu", torch.bfloat16):
        assert not pooled.stacks(8)
        asked = small_task(*SMALL["pooled"])
        assert not asked.stacks(8)
    assert asked.stacks(8)
    assert not small_task(*SMALL["pooled"], fast_convolutions=False).stacks(8)
    assert not small_task(*SMALL["grouped"]).stacks(8)
    assert not small_task(partial(nn.ConvTranspose2d, 2, 4, 3)).stacks(8)
    assert not paper_task().stacks(8)
    assert tasks.load("digits-cnn").stacks(8)


def test_what_kernels_see_many_times_over_runs_one_after_another() -> None:
    """Gradients of it add up slowly: as one, these took twice as long."""
    widened = partial(nn.Conv2d, 2, 16, 1)
    assert small_task(widened, partial(nn.Conv2d, 16, 4, 2, padding=1)).stacks(8)
    assert not small_task(widened, partial(nn.Conv2d, 16, 4, 3, padding=1)).stacks(8)


def test_what_counts_on_an_order_in_memory_runs_one_after_another() -> None:
    assert not small_task(partial(nn.Conv2d, 2, 4, 3), ViewedByAten).stacks(8)


@pytest.mark.parametrize("name", ["viewed as", "normed"])
def test_what_runs_as_one_may_expect_another_order(name: str) -> None:
    assert small_task(*SMALL[name]).stacks(8)


def test_large_ones_are_fast_by_default() -> None:
    generator = generator_for(0)
    x, weight = (torch.rand(size, generator=generator) for size in ((64, 1, 28, 28), (16, 1, 3, 3)))
    orders = []
    for images in (x, x[:2], x.double()):
        with convolution.fast(None):
            out = functional.conv2d(images, weight.to(images))
        orders.append(out.is_contiguous(memory_format=torch.channels_last))
    assert orders == [True, False, False]
