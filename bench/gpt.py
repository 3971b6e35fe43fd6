"""What a student is worth on a GPT larger than any network that it was meta-trained on, on a CPU.

python bench/gpt.py FILE.jsonl [CASE...]   # rows; what is there is not computed again

GPTs of 0.5 and of 4.9 million parameters learn to predict the bytes of the sources of Python's
standard library. Contenders and rows are as in ``bench/gpu/training.py``, which trains larger ones
on a GPU. Everything runs in one thread.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu.place import Case, Place
from gpu.training import Size, training_case
from unrolls import processor

from amalgam.version import describe

SIZE = Size(128, 2, 2, context=64, batch=16, steps=600, readings=32)
STUDENTS = "standard", "compact"
RATES = {"AdamW": (0.001, 0.003, 0.01), "Muon": (0.003, 0.01, 0.03)}
DECAYS = "constant", "linear"
# Four times as long, by what did best in the shorter runs: whether steps stay long enough.
LONG = SIZE._replace(steps=2400)
LONGER = (
    *(("standard", 1.0, decay) for decay in DECAYS),
    *(("compact", 1.0, decay) for decay in DECAYS),
    ("AdamW", 0.003, "constant"),
    ("AdamW", 0.003, "linear"),
    ("Muon", 0.003, "constant"),
    ("Muon", 0.01, "linear"),
)
# Six hundred times as large as any network of meta-training.
WIDE = Size(256, 6, 4, context=128, batch=16, steps=300, readings=16)
WIDER = (
    *(("standard", 1.0, decay) for decay in DECAYS),
    *(("compact", 1.0, decay) for decay in DECAYS),
    *(("Muon", lr, "linear") for lr in (0.003, 0.01, 0.03)),
    *(("AdamW", lr, "linear") for lr in (0.001, 0.003, 0.01)),
)


class Cpu(Place):
    """The machine at hand."""

    def __init__(self, rows: Path, only: list[str]) -> None:
        self.phase, self.rows, self.only = "training", rows, only
        self.real, self.device = False, "cpu"
        self.told = {**describe(), "torch": torch.__version__, "processor": processor()}


def cases(place: Place) -> Iterator[tuple[str, Case]]:
    def case(size: Size, name: str, lr: float, decay: str, seed: int) -> tuple[str, Case]:
        which = {LONG: "long ", WIDE: "wide "}.get(size, "")
        label = f"{which}{name} lr={lr:g} {decay} seed={seed}"
        return label, functools.partial(training_case, place, size, name, lr, decay, seed)

    rates = dict.fromkeys(STUDENTS, (1.0,)) | RATES
    for seed in (0, 1):
        for name, lrs in rates.items():
            for lr in lrs:
                for decay in DECAYS:
                    yield case(SIZE, name, lr, decay, seed)
    for name, lr, decay in LONGER:
        yield case(LONG, name, lr, decay, 0)
    for name, lr, decay in WIDER:
        yield case(WIDE, name, lr, decay, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="of rows of JSON")
    parser.add_argument(
        "cases", nargs="*", help="names of cases, as shell patterns; all by default"
    )
    asked = parser.parse_args()
    torch.set_num_threads(1)
    place = Cpu(asked.file, asked.cases)
    place.run_cases(cases(place))


if __name__ == "__main__":
    main()
