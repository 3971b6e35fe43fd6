"""Backend ``cpu``: C++ on all cores, with the best instruction set of the machine."""

from __future__ import annotations

from amalgam.backends import core
from amalgam.operations.registry import register_backend


def _probe() -> str | None:
    return core.load()[1]


backend = register_backend(
    "cpu",
    rank=20,
    devices=frozenset({"cpu"}),
    probe=_probe,
    about="C++ on all cores; AVX-512, AVX2 or portable, chosen on this machine",
)
