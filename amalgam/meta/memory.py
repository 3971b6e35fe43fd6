"""Memory of a window's way back: how much there is, and which points to keep in it.

Going back through T steps needs every step's starting point, the last one first. Some points are
kept; the others are computed again from the nearest kept one before them. With c kept points, the
first step's included, C(c + r, r) steps can be reversed so that none is computed again more than
r - 1 times, and no other choice of points needs fewer (Griewank and Walther, Algorithm 799, 2000).
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

# (steps to reverse from a kept point on, points that may be kept beside it) -> how many steps there
# are from it to the next point to keep, 1 or more.
NextKept = Callable[[int, int], int]


@dataclass(frozen=True)
class Memory:
    """What a window may keep for its way back; it computes the rest again.

    First-order meta-gradients need none of it: they keep 8 bytes a coordinate and step.

    Attributes:
        budget: Bytes for points and optimizees' graphs, as in ``"4GiB"``. Where ``None``, half of
            what is free when a window begins, or up to nine tenths if less is too little. The bits
            of the meta-gradient do not depend on it.
        segment: Instead of a budget: keep the point of every so many steps, and all points of the
            segment that is being reversed.
        cells: Dtype in which kept points hold the student's h and c. ``"bfloat16"`` halves them
            and rounds them. Then the meta-gradient depends on which points are kept, so that
            ``budget`` or ``segment`` must be given.
    """

    budget: str | int | None = None
    segment: int | None = None
    cells: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Refuse what can't be done."""
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
        """The budget in bytes, or half of what is free on a device now, or more for ``least``."""
        if self.budget is not None:
            return parse_bytes(self.budget)
        free = free_bytes(device)
        return max(int(_SHARE_OF_FREE * free), min(least, int(_MOST_OF_FREE * free)))


@dataclass(frozen=True)
class Plan:
    """What one window keeps.

    Attributes:
        points: How many points beside the first, at most.
        graphs: Of how many steps, the last ones, the optimizees' graphs are kept; the others are
            built again.
        next_kept: Which points.
    """

    points: int
    graphs: int
    next_kept: NextKept


def plan(steps: int, memory: Memory, budget: int, point_bytes: int, graph_bytes: int) -> Plan:
    """Share a budget among points, which come first, and graphs.

    Args:
        steps: Steps of the window.
        memory: Says whether to keep segments.
        budget: Bytes to share.
        point_bytes: Size of a point.
        graph_bytes: Size of the graph of an optimizee's loss and gradient.

    Raises:
        ValueError: The budget is too small for the one point that reversing needs.
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
    """The next point to keep so that the fewest steps are computed again; see the module.

    Args:
        steps: Steps to reverse from a kept point on.
        free: Points that may be kept beside it.
    """
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
    """How many bytes of a device are free, of the CPU's within this process's control group."""
    if device.type == "cuda":
        # What PyTorch's allocator holds unused is free for this process, too.
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
