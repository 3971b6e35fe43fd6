"""Which steps of an unroll to keep for the way back, when not all of them fit into memory.

To go back through T steps, every step's starting point is needed, the last one first. Kept points
are taken as they are; others are computed again from the nearest kept one before them. With c kept
points, the first step's included, C(c + r, r) steps can be reversed so that none is computed again
more than r - 1 times, and no schedule needs fewer (Griewank and Walther, Algorithm 799, 2000).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SHARE_OF_FREE, _MOST_OF_FREE = 0.5, 0.9

# Of a kept point: (steps to reverse from it on, points that may be kept beside it) -> how many
# steps to go to the next point to keep, 1 or more.
NextKept = Callable[[int, int], int]


@dataclass(frozen=True)
class Memory:
    """What an unroll may keep for its way back, at the price of computing the rest again.

    First-order meta-gradients need none of it: they keep 8 bytes a coordinate and step.

    Attributes:
        budget: Bytes for points and optimizees' graphs, as in ``"4GiB"``; where ``None``, half of
            what is free when a window begins, or up to nine tenths where less does not do.
            Whatever it is, the bits are the same.
        segment: By hand instead: keep every such step, and within a segment all.
        cells: Dtype in which kept points hold the student's h and c. ``"bfloat16"`` halves them
            and rounds them, so what the meta-gradient is then depends on the other two; one of
            them must be given.
    """

    budget: str | int | None = None
    segment: int | None = None
    cells: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Refuse what can't be kept to."""
        if self.budget is not None:
            parse_bytes(self.budget)
            if self.segment is not None:
                raise ValueError(
                    f"budget ({self.budget!r}) and segment ({self.segment}) can't both decide; "
                    f"give one"
                )
        if self.segment is not None and self.segment < 1:
            raise ValueError(f"segment must be 1 or more, not {self.segment}")
        if self.cells not in ("float32", "bfloat16"):
            raise ValueError(f"cells must be 'float32' or 'bfloat16', not {self.cells!r}")
        if self.cells == "bfloat16" and self.budget is None and self.segment is None:
            raise ValueError("cells='bfloat16' needs a budget or a segment: they decide the bits")

    def bytes(self, device: torch.device, least: int) -> int:
        """The budget, or half of what is free on a device now; more, where ``least`` needs it."""
        if self.budget is not None:
            return parse_bytes(self.budget)
        free = free_bytes(device)
        return max(int(_SHARE_OF_FREE * free), min(least, int(_MOST_OF_FREE * free)))


@dataclass(frozen=True)
class Plan:
    """What one window keeps.

    Attributes:
        points: Points beside the first one's, at most.
        graphs: Optimizees' graphs, of the last steps; those of others are built again.
        next_kept: Which points.
    """

    points: int
    graphs: int
    next_kept: NextKept


def plan(steps: int, memory: Memory, budget: int, point_bytes: int, graph_bytes: int) -> Plan:
    """Share a budget among points, which come first, and graphs.

    Args:
        steps: Steps of the window.
        memory: How.
        budget: Bytes that it amounts to.
        point_bytes: Size of a point.
        graph_bytes: Size of the graph of an optimizee's loss and gradient.

    Raises:
        ValueError: The budget does not hold what reversing takes at least.
    """
    if memory.segment is not None:
        segment = min(memory.segment, steps)
        return Plan(steps // segment + segment, 0, segments(segment))
    points = min(steps - 1, budget // max(point_bytes, 1))
    if steps > 1 and not points:
        raise ValueError(
            f"budget must hold at least one point of this unroll, {point_bytes} bytes, not {budget}"
        )
    left = budget - points * point_bytes
    graphs = min(steps, left // max(graph_bytes, 1)) if points >= steps - 1 else 0
    return Plan(points, graphs, binomial)


def segments(length: int) -> NextKept:
    """Keep every ``length``-th point, and in a segment that is being reversed all of them."""

    def next_kept(steps: int, free: int) -> int:
        return length if steps > length else 1

    return next_kept


def binomial(steps: int, free: int) -> int:
    """The next point to keep so that the fewest steps are computed again; see the module."""
    kept = free + 1
    repeats = 1
    while math.comb(kept + repeats, repeats) < steps:
        repeats += 1

    def reach(kept: int, repeats: int) -> int:
        return math.comb(kept + repeats, repeats) if repeats >= 0 else 0

    return max(1, reach(kept, repeats - 2), steps - reach(kept - 1, repeats))


def parse_bytes(amount: str | int) -> int:
    """Bytes of ``"4GiB"``, ``"500 MB"`` or a number of them.

    Raises:
        ValueError: It is neither, or not positive.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMG]I?B|B)?", str(amount).strip().upper())
    size = int(float(found[1]) * _UNITS[found[2] or "B"]) if found else 0
    if size < 1:
        raise ValueError(f"budget must read as in '4GiB', '500MB' or 1048576, not {amount!r}")
    return size


def free_bytes(device: torch.device) -> int:
    """Memory that a device has free, within what this process's control group leaves it."""
    if device.type == "cuda":
        # What PyTorch's allocator holds of it and nobody uses is free for this process, too.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    report = Path("/proc/meminfo")
    if report.exists():
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", report.read_text(), re.MULTILINE)
        free = 1024 * int(found[1]) if found else free
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no control group of version 2 here
    return max(free, 0)
