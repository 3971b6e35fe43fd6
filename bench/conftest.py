from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from amalgam.backends import build_info


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["amalgam"] = build_info()
    # PyTorch then asks for pages of 2 MiB: fresh tensors cost it far less.
    machine_info["huge_pages"] = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"
    if importlib.util.find_spec("triton") is not None:
        machine_info["triton"] = importlib.metadata.version("triton")


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list, output_json: dict
) -> None:
    """Every round's time makes files of megabytes, and nothing reads it."""
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
