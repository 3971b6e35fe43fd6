"""AmalgamatedOptimizer in a loop as TorchTitan's: FSDP2, a warm-up, distributed checkpoints.

torchrun --nproc-per-node 2 examples/loops/sharded_pretraining.py --folder runs/sharded

The same command goes on from the last checkpoint, with another number of processes, too. Without
GPUs the processes meet by gloo, on the CPU.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

from amalgam import AmalgamatedOptimizer, tasks

WARMUP = 5


def rate(step: int, steps: int) -> float:
    """Up in some steps, then down to zero along a line; of the student's own rate."""
    return min(1.0, (step + 1) / WARMUP) * (1 - step / steps)


def train(folder: str, until: int, steps: int = 40) -> list[float]:
    """Train an MLP of sharded layers on scikit-learn's digits.

    Args:
        folder: Where checkpoints are, each in a folder named by its steps; the last one is gone on
            from.
        until: After how many steps to write one and stop.
        steps: How many the schedule has.

    Returns:
        This process's losses since the checkpoint.
    """
    where = "cuda" if torch.cuda.is_available() else "cpu"
    if where == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if where == "cuda" else "gloo")
    mesh = init_device_mesh(where, (dist.get_world_size(),))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU())
    model.append(nn.Linear(32, 10)).to(where)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = AmalgamatedOptimizer(model.parameters())
    scheduler = LambdaLR(optimizer, lambda step: rate(step, steps))

    def state() -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments, "scheduler": scheduler.state_dict()}

    first = max((int(path.name) for path in Path(folder).glob("[0-9]*")), default=0)
    if first:
        saved = state()
        dcp.load(saved, checkpoint_id=Path(folder) / str(first))
        set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
        )
        scheduler.load_state_dict(saved["scheduler"])

    x, y = (tensor.to(where) for tensor in tasks.load("digits-mlp").train)
    losses = []
    for step in range(first, until):
        whole = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:64]
        own = whole[dist.get_rank() :: dist.get_world_size()].to(where)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[own]), y[own])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    dcp.save(state(), checkpoint_id=Path(folder) / str(until))
    dist.barrier()  # who leaves first closes connections that others may still read
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True)
    parser.add_argument("--until", type=int, default=40)
    arguments = parser.parse_args()
    found = train(arguments.folder, arguments.until)
    if os.environ["RANK"] == "0":
        print(f"{len(found)} steps, the last batch's loss: {found[-1]:.4f}", flush=True)
    if not torch.cuda.is_available():
        # Gloo's threads may hold tensors of the last barrier, and abort the process where they let
        # go of them while the interpreter ends. So the process ends without that.
        os._exit(0)
