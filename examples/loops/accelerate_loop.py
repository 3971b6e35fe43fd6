"""AmalgamatedOptimizer in a loop of Accelerate's, with accumulated and clipped gradients.

python examples/loops/accelerate_loop.py    (pip install accelerate)
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from amalgam import AmalgamatedOptimizer, tasks


def train(steps: int = 100, folder: str | None = None) -> list[float]:
    """Train an MLP on scikit-learn's digits.

    Args:
        steps: How many to take, of two batches each.
        folder: Where to save the state of everything after half of the steps, from which the rest
            goes on; ``None`` for nowhere.

    Returns:
        The loss of every batch.
    """
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = AmalgamatedOptimizer(model.parameters())
    scheduler = CosineAnnealingLR(optimizer, steps * accelerator.num_processes)
    data = TensorDataset(*tasks.load("digits-mlp").train)
    loader = DataLoader(data, batch_size=32, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    losses: list[float] = []
    taken = 0
    while taken < steps:
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if not accelerator.sync_gradients:
                continue
            taken += 1
            if folder is not None and taken == steps // 2:
                accelerator.save_state(folder)
                accelerator.load_state(folder)
            if taken == steps:
                break
    return losses


if __name__ == "__main__":
    print(f"the last batch's loss: {train()[-1]:.4f}")
