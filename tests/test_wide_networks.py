"""Students that ship on a network wider than any that they were meta-trained on."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from amalgam import AmalgamatedOptimizer
from amalgam.policies import load_policy

WIDTH, SYMBOLS = 256, 32


@pytest.mark.parametrize("student", ["standard", "compact"])
def test_a_wide_transformer_learns_at_the_default_rate(student: str) -> None:
    """Whole steps took its loss of 3.5 to 52 and to 5."""
    assert load_policy(student).config.full_width < WIDTH
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        model = nn.Sequential(
            nn.Embedding(SYMBOLS, WIDTH),
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            nn.Linear(WIDTH, SYMBOLS),
        )
        batches = torch.randint(SYMBOLS, (26, 4, 16))
    optimizer = AmalgamatedOptimizer(model.parameters(), student=student)
    losses = []
    for x in batches:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x).flatten(0, 1), (5 * x + 3).flatten() % SYMBOLS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses[7:]) < losses[0] / 10
