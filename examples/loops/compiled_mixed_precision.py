"""AmalgamatedOptimizer in a plain loop: compiled model, autocast, GradScaler, clipped gradients.

python examples/loops/compiled_mixed_precision.py [float16|bfloat16]
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR

from amalgam import AmalgamatedOptimizer, tasks


def train(steps: int = 100, precision: str = "bfloat16", compiler: str = "inductor") -> list[float]:
    """Train an MLP on scikit-learn's digits.

    Args:
        steps: How many to take.
        precision: What ``autocast`` computes in. Gradients are scaled for float16 alone, as
            bfloat16 has float32's range.
        compiler: A backend of ``torch.compile``.

    Returns:
        The loss of every batch.
    """
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = (each.to(device) for each in tasks.load("digits-mlp").train)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).to(device)
    optimizer = AmalgamatedOptimizer(model.parameters())
    scheduler = LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
    scaler = torch.amp.GradScaler(device, enabled=precision == "float16")
    compiled = torch.compile(model, backend=compiler)
    losses = []
    for _ in range(steps):
        drawn = torch.randint(len(y), (64,), device=device)
        with torch.autocast(device, getattr(torch, precision)):
            loss = nn.functional.cross_entropy(compiled(x[drawn]), y[drawn])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else "bfloat16"
    print(f"the last batch's loss: {train(precision=chosen)[-1]:.4f}")
