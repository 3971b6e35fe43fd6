"""What a student is worth on a model larger than any that it was meta-trained on.

GPTs of 10.9 and of 85.6 million parameters learn to predict the bytes of the sources of Python's
standard library, in bfloat16 autocast. AdamW and PyTorch's Muon run at a grid of rates, the
students that ship at ``lr=1``, untouched, and the default one at others, too, which shows whether
that is its rate; all with a constant rate and with linear decay to zero. A row has the loss of
files held out, after a quarter of the steps and at the end. Loss and gradients are a CUDA graph,
the optimizer's step is not. ``bench/gpt.py`` trains a smaller one on a CPU.
"""

from __future__ import annotations

import functools
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from gpu.model import BATCH, CONTEXT, HEADS, LAYERS, WIDTH, build
from gpu.place import Case, Place, Row, graph_of, start
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from amalgam import AmalgamatedOptimizer
from amalgam.digest import digest_of
from amalgam.evaluation.contenders import muon

HELD_OUT = 20  # of so many files one is held out


class Size(NamedTuple):
    """A GPT, and how it is trained."""

    width: int
    layers: int
    heads: int
    context: int
    batch: int
    steps: int
    readings: int  # batches of what is held out
    files: int | None = None  # of the library; all


SMALL = Size(WIDTH, LAYERS, HEADS, CONTEXT, BATCH, steps=600, readings=16)
WIDE = Size(768, 12, 12, CONTEXT, BATCH, steps=300, readings=16)  # GPT-2 small's
STAND_IN = Size(24, 1, 6, 8, 2, steps=4, readings=1, files=60)
MAKERS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": functools.partial(torch.optim.AdamW, fused=True),
    "Muon": muon,
    "standard": functools.partial(AmalgamatedOptimizer, student="standard"),
    "compact": functools.partial(AmalgamatedOptimizer, student="compact"),
}


@functools.cache
def text(device: str, count: int | None) -> tuple[Tensor, Tensor]:
    """Bytes of sources to train on, and of files held out, each shape (bytes,)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.rglob("*.py"))
    files = [f for f in files if not {"site-packages", "dist-packages"} & {*f.parts}]
    read = [f.read_bytes() for f in files[:count]]
    held_out = b"".join(read[::HELD_OUT])
    train = b"".join(one for i, one in enumerate(read) if i % HELD_OUT)
    both = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (train, held_out))
    first, second = (part.to(device).long() for part in both)
    return first, second


def pieces(characters: Tensor, count: int, context: int, seed: int) -> Tensor:
    """So many pieces of a text from random places, each with what follows, (count, context + 1)."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(characters) - context, (count, 1), generator=generator)
    places = starts + torch.arange(context + 1)
    return characters[places.to(characters.device)]


class Run:
    """A model, and its loss and gradients on a batch that is copied to where they read it."""

    def __init__(self, place: Place, seed: int, size: Size) -> None:
        self.place = place
        self.model, self.x, self.y = build(place.device, seed, *size[:5])
        self.params: list[nn.Parameter] = list(self.model.parameters())
        self.slopes: Callable[[], object] = self._slopes
        if place.real:
            self.slopes = graph_of(self._slopes, before=3).replay

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(self.place.device, torch.bfloat16):
            return functional.cross_entropy(self.model(x).flatten(0, 1).float(), y.flatten())

    def _slopes(self) -> None:
        for param in self.params:
            param.grad = None
        self.loss(self.x, self.y).backward()

    def take(self, batch: Tensor) -> None:
        """Compute loss and gradients of a batch (samples, context + 1)."""
        self.x.copy_(batch[:, :-1])
        self.y.copy_(batch[:, 1:])
        self.slopes()

    @torch.no_grad()
    def held_out(self, batches: Tensor) -> float:
        """The mean loss of batches (batches, samples, context + 1)."""
        losses = [self.loss(batch[:, :-1], batch[:, 1:]) for batch in batches]
        return torch.stack(losses).mean().item()


def training_case(place: Place, size: Size, name: str, lr: float, decay: str, seed: int) -> Row:
    run = Run(place, seed, size)
    steps, samples, context = size.steps, size.batch, size.context
    train, rest = text(place.device, size.files)

    def batches_of(whole: Tensor, count: int, seed: int) -> Tensor:
        return pieces(whole, count * samples, context, seed).unflatten(0, (count, samples))

    batches = batches_of(train, steps, seed + 1)
    held_out = batches_of(rest, size.readings, 0)
    optimizer = MAKERS[name](run.params, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: 1 - t / steps if decay == "linear" else 1.0
    )
    read = {0: run.held_out(held_out)}
    place.wait()
    begin, reading = time.perf_counter(), 0.0
    for t in range(steps):
        run.take(batches[t])
        optimizer.step()
        schedule.step()
        if t + 1 in (steps // 4, steps // 2, steps):
            place.wait()
            before = time.perf_counter()
            read[t + 1] = run.held_out(held_out)
            reading += time.perf_counter() - before
    place.wait()
    spent = time.perf_counter() - begin - reading
    return {
        "operation": "training of a GPT on Python's sources",
        "optimizer": name,
        "lr": lr,
        "decay": decay,
        "seed": seed,
        "steps": steps,
        "parameters": sum(p.numel() for p in run.params),
        "epochs": round(steps * samples * context / len(train), 3),
        "text": digest_of([train, rest]),
        "held_out_losses": {step: round(loss, 5) for step, loss in read.items()},
        "ms_per_step": round(1e3 * spent / steps, 3),
        **paces_of(optimizer),
    }


def paces_of(optimizer: Optimizer) -> Row:
    """The least, the median and the largest logarithm of the tensors' paces, if they have any."""
    found = [entry["pace"] for entry in optimizer.state.values() if "pace" in entry]
    if not found:
        return {}
    paces = torch.stack([pace.reshape(()).float() for pace in found])
    return {"log_paces": [round(x.item(), 3) for x in (paces.min(), paces.median(), paces.max())]}


def cases(place: Place) -> Iterator[tuple[str, Case]]:
    def case(name: str, lr: float, decay: str, seed: int, wide: bool) -> tuple[str, Case]:
        label = f"{'wide ' if wide else ''}{name} lr={lr:g} {decay} seed={seed}"
        size = (WIDE if wide else SMALL) if place.real else STAND_IN
        return label, functools.partial(training_case, place, size, name, lr, decay, seed)

    decays = ("linear", "constant")
    ours = [(name, 1.0, decay) for name in ("standard", "compact") for decay in decays]
    adamw = [("AdamW", lr, decay) for lr in (1e-3, 3e-3) for decay in decays]
    muons = [("Muon", lr, "linear") for lr in (3e-3, 1e-2)]
    further = [("AdamW", lr, decay) for lr in (3e-4, 1e-2) for decay in decays]
    for contender in (*ours, *adamw, *further):
        yield case(*contender, 0, False)
    for contender in (ours[0], ours[2], adamw[0], further[0], muons[0]):
        yield case(*contender, 0, True)
    for contender in muons:
        yield case(*contender, 0, False)
    for seed in (1, 2):
        for contender in (*ours, *adamw):
            yield case(*contender, seed, False)
    for lr in (0.25, 0.5, 2.0, 4.0):
        for decay in decays:
            yield case("standard", lr, decay, 0, False)
    for lr in (0.25, 0.5, 2.0):
        yield case("standard", lr, "linear", 0, True)


def main() -> None:
    place = start("training")
    place.run_cases(cases(place))


if __name__ == "__main__":
    main()
