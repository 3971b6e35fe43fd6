"""The memory of a window's backward pass: how much there is, and which points to keep in it.

A *point* is where the students stand before a step. The backward pass through T steps needs the
point of every step, the last step's first. Some points are kept. The others are computed again,
from the nearest kept point before them.

:func:`binomial` chooses the points. Say that c points may be kept at a time, the first step's among
them. Let C be the binomial coefficient. Then C(c + r, r) steps can be reversed while no step is
computed again more than r - 1 times. No other choice computes fewer steps again (Griewank and
Walther, Algorithm 799, 2000).
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

from amalgam.ranges import check_fields

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SHARE_OF_FREE, _MOST_OF_FREE = 0.5, 0.9

# Called with the number of steps to reverse from a kept point on, and with the number of further
# points that may be kept. Returns how many steps after that point the next kept one is, at least 1.
NextKept = Callable[[int, int], int]


@dataclass(frozen=True)
class Memory:
    """How much a window may keep for its backward pass; it computes the rest again.

    Every window of which a meta-gradient is wanted records a tape: in float32, 4 bytes per
    coordinate and step for the gradients, 4 more where there are teachers, 4 more where samples are
    held out (``Amalgamation.held_out``), 4 more while on-policy teachers have a part in the
    executed steps, and 4 more where the student orthogonalises its updates, whose backward pass
    takes some 12 more for one optimizee at a time. Points and graphs come on top. A window keeps no
    point, and these settings have no effect on it, where all of this holds: meta-gradients are
    first-order, the policy is a student (its steps have ``PolicySteps.by_coordinates``), and
    neither its weights nor its input get noise that is drawn at every step.

    Attributes:
        budget: Bytes for all that the backward pass holds, as in ``"4GiB"``: the tape, three points
            to compute with, and with the rest the kept points, then optimizees' graphs. Where
            ``None``, half of the memory that is free when a window begins; more, up to nine tenths,
            only where half can't hold one kept point. The meta-gradient is the same for any budget,
            bit for bit.
        segment: In place of a budget: keep the point of every ``segment``-th step, and all points
            of the segment that is being reversed.
        cells: Dtype of the recurrent state (h and c) in kept points. ``"bfloat16"`` halves its size
            and rounds it. The meta-gradient then depends on which points are kept, so ``budget``
            or ``segment`` must be given.
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
        check_fields(self, counts=("segment",))
        if self.cells not in ("float32", "bfloat16"):
            raise ValueError(f"cells must be 'float32' or 'bfloat16', not {self.cells!r}")
        if self.cells == "bfloat16" and self.budget is None and self.segment is None:
            raise ValueError("cells='bfloat16' needs a budget or a segment: they decide the bits")

    def budget_bytes(self, device: torch.device, least: int) -> int:
        """The budget in bytes.

        Args:
            device: Whose free memory counts where no budget is set: half of it.
            least: Bytes that are needed. Where half of the free memory is less, the result is this,
                up to nine tenths of the free memory.
        """
        if self.budget is not None:
            return parse_bytes(self.budget)
        free = free_bytes(device)
        return max(int(_SHARE_OF_FREE * free), min(least, int(_MOST_OF_FREE * free)))


@dataclass(frozen=True)
class Plan:
    """What one window keeps.

    Attributes:
        points: How many points may be kept at a time beside the first step's.
        graphs: The optimizees' graphs of this many last steps are kept; the backward pass builds
            those of the other steps again.
        next_kept: Chooses the points. From a kept point with ``steps`` steps to reverse after it
            and room for ``free`` further points, the next one to keep is ``next_kept(steps, free)``
            steps later. :func:`binomial` and what :func:`segments` returns are such functions.
    """

    points: int
    graphs: int
    next_kept: NextKept


def plan(
    steps: int, memory: Memory, budget: int, point_bytes: int, graph_bytes: int, *, fixed: int = 0
) -> Plan:
    """Decide which points and graphs a window keeps.

    The budget goes to points first. Graphs get what is left once there is room for all points. With
    ``memory.segment`` the budget plays no part, and no graph is kept.

    Args:
        steps: Steps of the window.
        memory: The settings, of which only ``segment`` is read.
        budget: Bytes for all that the backward pass holds.
        point_bytes: Size of a point.
        graph_bytes: Size of the graph of all rows' losses and gradients in one step.
        fixed: Bytes of the budget that are held in any case. Points and graphs get the rest.

    Raises:
        ValueError: The budget is too small for the one point that reversing needs.
    """
    if steps < 1:
        return Plan(0, 0, binomial)
    if memory.segment is not None:
        segment = min(memory.segment, steps)
        return Plan(steps // segment + segment, 0, segments(segment))
    left = max(budget - fixed, 0)
    points = min(steps - 1, left // max(point_bytes, 1))
    if steps > 1 and not points:
        raise ValueError(
            f"budget must be {fixed + point_bytes} bytes or more for this unroll of {steps} steps, "
            f"not {budget}"
        )
    left -= points * point_bytes
    graphs = min(steps, left // max(graph_bytes, 1)) if points >= steps - 1 else 0
    return Plan(points, graphs, binomial)


def segments(length: int) -> NextKept:
    """The choice of every ``length``-th point, and of all in the segment being reversed.

    Raises:
        ValueError: ``length`` is less than 1.
    """
    if length < 1:
        raise ValueError(f"length must be 1 or more, not {length}")

    def next_kept(steps: int, free: int) -> int:
        return length if steps > length else 1

    return next_kept


def binomial(steps: int, free: int) -> int:
    """The choice of points with which the fewest steps are computed again (see this module's text).

    Args:
        steps: Steps to reverse from a kept point on, 1 or more.
        free: How many further points may be kept, 0 or more; of one step, any number.

    Returns:
        How many steps after that point the next kept one is.

    Raises:
        ValueError: One of the two is less than that.
    """
    if steps == 1:
        return 1
    if steps < 1 or free < 0:
        raise ValueError(f"steps must be 1 or more and free 0 or more, not {steps} and {free}")
    kept = free + 1
    repeats = 1
    while math.comb(kept + repeats, repeats) < steps:
        repeats += 1

    def reach(kept: int, repeats: int) -> int:
        return math.comb(kept + repeats, repeats) if repeats >= 0 else 0

    return max(1, reach(kept, repeats - 2), steps - reach(kept - 1, repeats))


def parse_bytes(amount: str | int) -> int:
    """The number of bytes that ``"4GiB"``, ``"500 MB"`` or a plain number stands for.

    Raises:
        ValueError: ``amount`` reads otherwise, or is less than one byte or 2^63 bytes or more.
    """
    read = str(amount).strip().upper() if isinstance(amount, str | int) else ""
    found = re.fullmatch(r"([0-9]{1,30}(?:\.[0-9]{1,30})?) ?([KMG]I?B|B)?", read)
    size = int(float(found[1]) * _UNITS[found[2] or "B"]) if found else 0
    if not 1 <= size < 2**63:
        raise ValueError(f"budget must read as in '4GiB', '500MB' or 1048576, not {amount!r}")
    return size


def free_bytes(device: torch.device) -> int:
    """How many bytes of a device are free; on the CPU, within this process's control group."""
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
