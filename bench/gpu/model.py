"""A real model's training step, by AdamW and by ours, eager and in a CUDA graph.

The model is a GPT of 10.9 million parameters in bfloat16 autocast, on random tokens: what is timed
does not depend on what the tokens say. ``optimizer_us`` is the optimizer's step alone. Then, of the
parameters of well-known models with random gradients, steps alone, and what their state takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu.place import Case, Place, Row, graph_of, replayed, start, timed
from model_shapes import MODELS
from torch import Tensor, nn
from torch.nn import functional

from amalgam import AmalgamatedOptimizer

VOCABULARY, WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 256, 384, 6, 6, 256, 32
IN_BFLOAT16: dict[str, Any] = {
    "cells_dtype": torch.bfloat16,
    "moments_dtype": torch.bfloat16,
    "rounding": "stochastic",
    "backend": "auto:bf16,approximate",
}


class GPT(nn.Module):
    """PyTorch's own encoder layers behind a causal mask."""

    def __init__(self, width: int, layers: int, context: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Parameter(0.02 * torch.randn(context, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(x) + self.places, mask=self.mask, is_causal=True))


def build(
    device: str, seed: int, width: int, layers: int, heads: int, context: int, batch: int
) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, and random tokens with what follows them."""
    torch.manual_seed(seed)
    model = GPT(width, layers, context, heads).to(device)
    x, y = (torch.randint(VOCABULARY, (batch, context), device=device) for _ in "xy")
    return model, x, y


# The paper's student: its steps are timed, and not meant for such a model.
PAPERS: dict[str, Any] = {"student": "digits", "warmup_steps": 0, "lr": 0.1}
OURS: dict[str, dict[str, Any]] = {
    "standard": {},
    "standard, bfloat16": IN_BFLOAT16,
    "standard, coordinatewise": {"orthogonal": False},
    "compact": {"student": "compact"},
    "compact, bfloat16": {"student": "compact", **IN_BFLOAT16},
    "paper's": PAPERS,
    "paper's, tf32": {**PAPERS, "backend": "auto:tf32,approximate"},
    "paper's, bfloat16": {
        **PAPERS,
        "backend": "auto:bf16,approximate",
        "cells_dtype": torch.bfloat16,
    },
}
ADAMWS = {"AdamW": "fused", "AdamW foreach": "foreach"}


def optimizer_of(name: str, params: list[nn.Parameter], place: Place) -> torch.optim.Optimizer:
    if name in ADAMWS:
        how = {ADAMWS[name]: True, "capturable": place.real}
        return torch.optim.AdamW(params, lr=1e-3, **how)
    return AmalgamatedOptimizer(params, capturable=True, **OURS[name])


def training_case(place: Place, name: str, captured: bool) -> Row:
    """Loss, gradients and step of one batch, over and over."""
    size = (WIDTH, LAYERS, HEADS, CONTEXT, BATCH) if place.real else (24, 1, HEADS, 8, 2)
    model, x, y = build(place.device, 0, *size)
    params = list(model.parameters())
    optimizer = optimizer_of(name, params, place)

    def loss_and_gradients() -> Tensor:
        with torch.autocast(place.device, torch.bfloat16):
            loss = functional.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())
        loss.backward()
        return loss.detach()

    end: Tensor

    def step() -> None:
        nonlocal end
        optimizer.zero_grad(set_to_none=not captured)
        end = loss_and_gradients()
        optimizer.step()

    step()
    begin = end.item()
    optimizer_alone = timed(place, optimizer.step)
    call: Callable[[], object] = step
    if captured and place.real:
        call = graph_of(step, before=3).replay
    times = timed(place, call)
    if call is step:
        step()
    return {
        "operation": "training step of a GPT",
        "optimizer": name,
        "graph": captured,
        "parameters": sum(p.numel() for p in params),
        **times.row(),
        **optimizer_alone.row("optimizer_"),
        "first_loss": round(begin, 4),
        "last_loss": round(end.item(), 4),
    }


def steps_case(place: Place, model: str, name: str) -> Row:
    """Steps alone on a well-known model's parameters, eager and in a CUDA graph."""
    make, numbers, _ = MODELS[model]
    shapes = make() if place.real else make()[:12]
    params = [nn.Parameter(torch.randn(s, device=place.device)) for s in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = optimizer_of(name, params, place)
    before = torch.cuda.memory_allocated() if place.real else 0
    optimizer.step()
    row: Row = {"operation": f"step of {model}", "optimizer": name, "parameters": numbers}
    if place.real:
        row["state_bytes"] = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
    row |= timed(place, optimizer.step).row()
    row |= replayed(place, optimizer.step, 1).row("graph_")
    if place.real:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


def cases(place: Place) -> Iterator[tuple[str, Case]]:
    part = functools.partial
    for name in ("AdamW", *OURS):
        for captured in (False, True):
            label = f"GPT {name} {'graph' if captured else 'eager'}"
            yield label, part(training_case, place, name, captured)
    for model in ("ViT-B/16", "GPT-2 small") if place.real else ("ViT-B/16",):
        for name in ("AdamW", "AdamW foreach", *OURS):
            yield f"step of {model} {name}", part(steps_case, place, model, name)


def main() -> None:
    place = start("model")
    place.run_cases(cases(place))


if __name__ == "__main__":
    main()
