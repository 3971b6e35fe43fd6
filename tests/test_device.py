"""Which device a name stands for."""

import pytest
import torch
from elsewhere import ELSEWHERE, Census, Elsewhere

from amalgam.device import put, read, resolve


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Pretends so many GPUs, the second of which is PyTorch's current one."""

    def pretend(gpus: int, local_rank: int | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        if local_rank is not None:
            monkeypatch.setenv("LOCAL_RANK", str(local_rank))

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return pretend


@pytest.mark.parametrize(
    ("gpus", "local_rank", "given", "found"),
    [
        (0, None, "auto", "cpu"),
        (0, 3, "auto", "cpu"),
        (2, None, "auto", "cuda:1"),
        (2, None, "cuda", "cuda:1"),
        (2, None, torch.device("cuda"), "cuda:1"),
        (2, None, "cuda:0", "cuda:0"),
        (2, None, "cpu", "cpu"),
        (4, 3, "auto", "cuda:3"),
        (4, 3, "cuda", "cuda:3"),
        (4, 3, "cuda:2", "cuda:2"),
        (4, 3, "cpu", "cpu"),
        (0, None, torch.device("meta"), "meta"),
    ],
)
def test_names(gpus, local_rank, given, found, machine) -> None:
    machine(gpus, local_rank)
    assert resolve(given) == torch.device(found)


@pytest.mark.parametrize(
    ("gpus", "local_rank", "given", "named"),
    [
        (1, None, "gpu", "device must be 'auto', 'cpu', 'cuda' or 'cuda:NUMBER', not 'gpu'"),
        (1, None, "cuda:", "not 'cuda:'"),
        (0, None, "cuda", "one of 'auto', 'cpu', not 'cuda': PyTorch sees 0 CUDA GPUs here$"),
        (0, 0, "cuda", "one of 'auto', 'cpu', not 'cuda': PyTorch sees 0 CUDA GPUs here$"),
        (0, None, torch.device("cuda:3"), "one of 'auto', 'cpu', not 'cuda:3': .* sees 0 CUDA"),
        (
            2,
            None,
            "cuda:2",
            "one of 'auto', 'cpu', 'cuda:0', 'cuda:1', not 'cuda:2': PyTorch sees 2 CUDA GPUs",
        ),
        (
            1,
            1,
            "auto",
            "one of 'cpu', 'cuda:0', not 'auto': PyTorch sees 1 CUDA GPU here, and this process "
            "has LOCAL_RANK 1",
        ),
    ],
)
def test_what_is_not_there_is_named(gpus, local_rank, given, named, machine) -> None:
    machine(gpus, local_rank)
    with pytest.raises(ValueError, match=named):
        resolve(given)


def test_what_is_read_is_what_was_there() -> None:
    with Elsewhere(census := Census()):
        there = [
            torch.tensor([True, False]).to(ELSEWHERE),
            torch.tensor([[1, -(2**40)]]).to(ELSEWHERE),
            torch.tensor([0.1, torch.nan]).to(ELSEWHERE),
            torch.zeros(2, 0, dtype=torch.float64).to(ELSEWHERE),
        ]
        census.waits.clear()
        found = read(there)
        assert len(census.waits) == 1
    for one, like in zip(found, there, strict=True):
        assert one.device.type == "cpu"
        assert one.dtype == like.dtype
        assert one.shape == like.shape
    assert found[0].tolist() == [True, False]
    assert found[1].tolist() == [[1, -(2**40)]]
    assert found[2][0] == torch.tensor(0.1)
    assert found[2][1].isnan()


def test_nothing_is_put_on_a_gpu_while_a_graph_is_captured(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"a tensor of shape \(3,\) is copied from the CPU"):
        put(torch.zeros(3), torch.device("cuda:0"))
    assert put(torch.zeros(3), torch.device("cpu")).tolist() == [0.0] * 3
