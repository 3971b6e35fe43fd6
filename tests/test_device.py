"""Which device a name stands for."""

import pytest
import torch

from amalgam.device import resolve


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
