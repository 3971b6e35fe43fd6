"""A real model's training step, by AdamW and by ours, eager and in a CUDA graph.

The model is a GPT of 10.8 million parameters in bfloat16 autocast, on random tokens: what is timed
does not depend on what the tokens say. ``optimizer_us`` is the optimizer's step alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu.place import Case, Place, Row, start, timed
from torch import Tensor, nn
from torch.nn import functional

from amalgam import AmalgamatedOptimizer

VOCABULARY, WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 256, 384, 6, 6, 256, 32


class GPT(nn.Module):
    """PyTorch's own encoder layers behind a causal mask."""

    def __init__(self, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Parameter(0.02 * torch.randn(context, width))
        layer = nn.TransformerEncoderLayer(
            width, HEADS, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(x) + self.places, mask=self.mask, is_causal=True))


def build(place: Place) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    width, layers, context, batch = (WIDTH, LAYERS, CONTEXT, BATCH) if place.real else (48, 1, 8, 2)
    model = GPT(width, layers, context).to(place.device)
    x, y = (torch.randint(VOCABULARY, (batch, context), device=place.device) for _ in "xy")
    return model, x, y


def optimizer_of(name: str, params: list[nn.Parameter], place: Place) -> torch.optim.Optimizer:
    if name == "AdamW":
        return torch.optim.AdamW(params, lr=1e-3, fused=True, capturable=place.real)
    words, _, cells = name.partition(" ")
    # The paper's student, as in the rows of earlier commits.
    how: dict[str, Any] = {"backend": words, "capturable": True, "warmup_steps": 0, "lr": 0.1}
    how["student"] = "digits"
    if cells == "bfloat16":
        how["cells_dtype"] = torch.bfloat16
    return AmalgamatedOptimizer(params, **how)


def training_case(place: Place, name: str, captured: bool) -> Row:
    """Loss, gradients and step of one batch, over and over."""
    model, x, y = build(place)
    params = list(model.parameters())
    optimizer = optimizer_of(name, params, place)

    def loss_and_gradients() -> Tensor:
        with torch.autocast(place.device, torch.bfloat16):
            loss = functional.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())
        loss.backward()
        return loss.detach()

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=not captured)
        loss = loss_and_gradients()
        optimizer.step()
        return loss

    begin = step()
    optimizer_alone = timed(place, optimizer.step)
    call: Callable[[], object] = step
    if captured and place.real:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            end = step()
        call = graph.replay
    times = timed(place, call)
    end = end if captured and place.real else step()
    return {
        "operation": "training step of a GPT",
        "optimizer": name,
        "graph": captured,
        "parameters": sum(p.numel() for p in params),
        **times.row(),
        **optimizer_alone.row("optimizer_"),
        "first_loss": round(begin.item(), 4),
        "last_loss": round(end.item(), 4),
    }


def cases(place: Place) -> Iterator[tuple[str, Case]]:
    names = ["AdamW", "auto", "auto:tf32,approximate", "auto:bf16,approximate bfloat16"]
    for name in (*names, "triton:tf32,approximate"):
        for captured in (False, True):
            label = f"GPT {name} {'graph' if captured else 'eager'}"
            yield label, functools.partial(training_case, place, name, captured)


def main() -> None:
    place = start("model")
    place.run_cases(cases(place))


if __name__ == "__main__":
    main()
