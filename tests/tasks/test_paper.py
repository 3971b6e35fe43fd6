"""The paper's tasks: its names, networks and parameter counts, batches, data named."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from amalgam import tasks
from amalgam.seeding import generator_for
from amalgam.tasks import glyphs, image_networks, paper, published

PARAMETERS = {
    "train": 18_122,
    "mlp": 15_910,
    "deeper": 75_242,
    "wider": 61_834,
    "fmnist": 18_122,
    "svhn": 21_290,
    "cifar": 68_170,
    "resnet": 370_506,
    "small-batch": 18_122,
    "dp": 18_122,
    "strided": 72_042,
    "average": 15_882,
    "kmnist": 18_122,
    "kmnist-dp": 18_122,
    "nas": 9_610,
    "cifar-train": 21_290,
    "cifar-deeper": 80_010,
    "cifar-strided": 75_530,
    "cifar-nas": 9_898,
    "resnet-52": 760_266,
    "wide-resnet": 5_853_098,
    "cifar100-resnet-52": 766_116,
    "cifar100-resnet-100": 1_545_636,
    "quadratic-10": 10,
    "quadratic-20": 20,
    "quadratic-100": 100,
    "rastrigin-2": 2,
    "rastrigin-10": 10,
    "rastrigin-20": 20,
}


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with as many images as one batch, and no published data."""
    monkeypatch.delenv("AMALGAM_DATA", raising=False)
    for name, of in list(glyphs._STAND_INS.items()):
        monkeypatch.setitem(glyphs._STAND_INS, name, replace(of, train=128, validation=8))


def test_every_task_has_a_count_here() -> None:
    assert PARAMETERS.keys() == paper.TASKS.keys()
    assert len(tasks.PAPER) == 10
    assert len(tasks.SHORT) == 8
    assert set(tasks.SHORT) - set(tasks.PAPER) == {"strided"}
    assert {*tasks.SHORT, *tasks.PAPER} <= tasks.TASKS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    assert tasks.load(name, 2).layout.numel == PARAMETERS[name]


def test_batch_sizes() -> None:
    sizes = {name: tasks.load(name).batch_size for name in tasks.PAPER if name != "resnet"}
    assert sizes.pop("small-batch") == 32
    assert set(sizes.values()) == {128}


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name != "wide-resnet"])
def test_a_step_has_a_gradient(name: str) -> None:
    task = tasks.load(name, 2)
    module = task.init_module(generator_for(0))
    (batch,) = task.batches(generator_for(0), 1)
    loss = task.backward(module, batch, generator_for(1))
    assert loss.isfinite()
    assert not loss.requires_grad
    for parameter in module.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.dim() < 2 or parameter.grad.abs().max() > 0


def test_names_tell_the_data_and_an_other_batch_size() -> None:
    assert tasks.load("train").name == "train-glyphs"
    assert tasks.load("train").stand_in
    assert tasks.load("train", data="glyphs").name == "train-glyphs"
    assert tasks.load("train", 64).name == "train-glyphs-batch-64"
    assert tasks.load("small-batch").batch_size == 32
    assert tasks.load("small-batch").name == "small-batch-glyphs"
    assert tasks.load("small-batch", 128).name == "small-batch-glyphs-batch-128"
    assert tasks.load("quadratic-20", 128).name == "quadratic-20"
    assert tasks.load("quadratic-20", 128).batch_size == 1
    assert not tasks.load("quadratic-20").stand_in


def test_published_data_have_another_name(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = glyphs.load("mnist")
    monkeypatch.setattr(published, "load", lambda name, folder: data)
    task = tasks.load("train", data=tmp_path)
    assert task.name == "train-published"
    assert not task.stand_in


def test_tasks_of_one_data_set_share_its_tensors() -> None:
    train, wider, dp = (tasks.load(name) for name in ("train", "wider", "dp"))
    assert train.train[0] is wider.train[0] is dp.train[0]
    assert tasks.load("cifar", 2).train[0] is tasks.load("resnet", 2).train[0]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="name must be one of .*, not 'resnet-53'; did you mean"):
        tasks.image_task("resnet-53")
    with pytest.raises(ValueError, match="'digits-mlp' can't be called with .*data='glyphs'"):
        tasks.load("digits-mlp", data="glyphs")
    with pytest.raises(ValueError, match="data must be 'auto', 'glyphs' or a folder"):
        tasks.load("train", arguments={"data": "/no/such"})
    with pytest.raises(ValueError, match="n must be 1 or more, not 0"):
        tasks.load("quadratic-10", arguments={"n": 0})


def test_inputs_are_divided_by_255() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert image_networks.Pixels()(images).tolist() == pytest.approx([0, 0.2, 1])
    assert image_networks.Pixels()(images.double()).dtype == torch.float64


def test_the_average_head_averages_probabilities() -> None:
    module = image_networks.convolutions((4, 3, 1), average=True)((1, 8, 8), 3)
    images = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    expected = module[:-1](images).softmax(1).mean((2, 3)).log()
    assert torch.allclose(module(images), expected, atol=1e-6)
    assert torch.allclose(module(images).log_softmax(1), expected, atol=1e-6)


def test_the_cells_average_counts_pixels_alone() -> None:
    """At the right and lower edges of 2 x 2 averages, as Keras's padding does it."""
    module = image_networks.cell(4)((1, 6, 6), 3)
    images = torch.rand(2, 1, 6, 6) * 255
    zero = module.node_0(images / 255)
    one = module.node_1(zero)
    ones = torch.ones_like(one)
    sums, counts = (
        functional.avg_pool2d(functional.pad(x, (0, 1, 0, 1)), 2, 1) for x in (one, ones)
    )
    nodes = zero + module.node_3b(module.node_3a(one)) + sums / counts + module.node_2(zero)
    expected = module.head(nodes.mean((2, 3)))
    assert torch.allclose(module(images), expected, atol=1e-5)


def test_batch_norm_trains_and_is_measured_by_its_statistics() -> None:
    task = tasks.load("resnet", 4)
    module = task.init_module(generator_for(0))
    norms = [part for part in module.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert len(norms) == 25
    assert all((norm.weight == 1).all() for norm in norms)
    (batch,) = task.batches(generator_for(0), 1)
    task.backward(module, batch, generator_for(0))
    assert all((norm.running_mean != 0).any() for norm in norms)
    assert all(norm.weight.grad.abs().max() > 0 for norm in norms)


def test_data_are_the_same_after_the_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMALGAM_CACHE", str(tmp_path))
    glyphs._load.cache_clear()
    first = tasks.load("cifar").describe()
    glyphs._load.cache_clear()
    monkeypatch.setattr(glyphs, "_drawn", lambda of: pytest.fail("it was drawn again"))
    assert tasks.load("cifar").describe() == first
