"""How many coordinates a program takes and by how many warps: one fixed table, no trial runs.

Found by compiling for sm_80, sm_90 and sm_100 and comparing spills, registers and instructions;
those of two layers of 20 units are among the fastest that an H200 was given (bench/results/gpu). A
first call compiles the one configuration it uses, in one to ten seconds,
and Triton keeps it on disk.

``AMALGAM_TRITON="student_step_=128x8,choice_step=32x4"`` in the environment overrides the table for
operations it names, with BLOCK x num_warps for every architecture of theirs.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

VARIABLE = "AMALGAM_TRITON"
OPERATIONS = (
    "student_step",
    "student_step_",
    "student_step_backward",
    "choice_step",
    "choice_step_backward",
)


class Configuration(NamedTuple):
    """What a kernel is compiled with.

    Attributes:
        block: BLOCK, coordinates of a program at a time; a power of two.
        num_warps: Warps of 32 threads that compute them; a power of two.
    """

    block: int
    num_warps: int

    @property
    def options(self) -> dict[str, int | bool]:
        """For the launch. Fusion is named because Triton 3.10 turns it off by default."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": True}


PLAIN = "plain"  # a precision: ieee without tensor cores, a thread computing whole coordinates
# Units of all layers: no more, and steps are plain. Padded to the 16 that tensor cores take, fewer
# cost several times as much. Of the nominal form 16 are plain, too, where nothing is permitted:
# three products of 16 take more instructions than one of whole numbers.
FEW = 8
FEW_OF_NOMINAL = 16

_PLAIN = Configuration(512, 4)
# A thread takes eight coordinates, for which it loads weights and finds its tensor once.
_PLAIN_OF_NOMINAL = Configuration(512, 2)
_LARGE = Configuration(32, 4)  # of more than 32 units, whose matrices are four times the size
_STEP = {
    "ieee": Configuration(64, 4),
    "3xtf32": Configuration(128, 8),
    "tf32": Configuration(64, 4),
    "bf16": Configuration(64, 4),
}
_TABLE = {
    "student_step": _STEP,
    "student_step_": _STEP | {"tf32": Configuration(128, 4), "bf16": Configuration(128, 4)},
    "choice_step": dict.fromkeys(_STEP, Configuration(64, 4)),
}
# A backward's, by the most units it is for.
_BACKWARD = {16: Configuration(128, 8), 32: Configuration(64, 8), 64: Configuration(32, 8)}


def configuration(
    operation: str, layers: int, hidden: int, precision: str | None, nominal: bool = False
) -> Configuration:
    """What to compile an operation's kernel with.

    Args:
        operation: Its name, as in ``amalgam.ops``; in place with an underscore.
        layers: Of the LSTM.
        hidden: Units of a layer.
        precision: Of the matrix products, or ``PLAIN``.
        nominal: Whether it is a student's step of that form.

    Raises:
        ValueError: The environment's override is not one.
    """
    chosen = _overrides(os.environ.get(VARIABLE, "")).get(operation)
    if chosen is not None:
        return chosen
    if operation.endswith("_backward"):
        return next((row for most, row in _BACKWARD.items() if hidden <= most), _BACKWARD[64])
    if precision == PLAIN:
        return _PLAIN_OF_NOMINAL if nominal and layers * hidden <= FEW else _PLAIN
    return _LARGE if hidden > 32 else _TABLE[operation][precision or "ieee"]


@functools.cache
def _overrides(text: str) -> dict[str, Configuration]:
    found = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        numbers = value.split("x")
        powers = [int(n) for n in numbers if n.isdecimal() and int(n) and not int(n) & int(n) - 1]
        if name not in OPERATIONS or len(numbers) != 2 or len(powers) != 2 or powers[0] < 16:
            raise ValueError(
                f"{VARIABLE} must be OPERATION=BLOCKxWARPS,... with operations of "
                f"{OPERATIONS} and powers of two, BLOCK at least 16, not {part!r}"
            )
        found[name] = Configuration(*powers)
    return found
