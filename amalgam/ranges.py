"""The kinds of arguments and the ranges of settings' numbers, checked where they are given.

Numbers end up in float32. So a *finite* number is one that float32 holds, up to 3.4e38, and a
*positive* one is 1.2e-38 or more.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

MOST = torch.finfo(torch.float32).max
LEAST = torch.finfo(torch.float32).tiny
_LONGEST = 200  # characters of an object in an error; a task shows its data


@dataclass(frozen=True)
class _Range:
    words: str
    least: float
    most: float
    whole: bool = False

    def fault(self, value: Any) -> str | None:
        """What a value must be that is out of the range; ``None`` for one within it."""
        kind = type(value)
        if kind is bool or not issubclass(kind, numbers.Real):
            return "a number"
        if self.whole and not issubclass(kind, numbers.Integral):
            return "a whole number"
        if self.least <= value <= self.most:
            return None
        if 1 < self.most < value < math.inf:
            return f"at most {self.most:.10g}"
        return f"at least {self.least:.2g}" if 0 < value < self.least < 1 else self.words


_COUNT = _Range("1 or more", 1, 2**31 - 1, whole=True)
_UNITS = _Range("1 or more", 1, 4096, whole=True)
_LAYERS = _Range("1 or more", 1, 100, whole=True)
_WHOLE = _Range("0 or more", 0, 2**31 - 1, whole=True)
_DECAY = _Range("in [0, 1)", 0, math.nextafter(1, 0))
_SHARE = _Range("in [0, 1]", 0, 1)
_POSITIVE = _Range("positive and finite", LEAST, MOST)
_EXPONENT = _Range("from -30 to 30", -30, 30)
_NOT_NEGATIVE = _Range("0 or more and finite", 0, MOST)


def check_fields(
    settings: Any,
    *,
    counts: Sequence[str] = (),
    units: Sequence[str] = (),
    layers: Sequence[str] = (),
    whole: Sequence[str] = (),
    decays: Sequence[str] = (),
    shares: Sequence[str] = (),
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
    exponents: Sequence[str] = (),
    or_infinite: Sequence[str] = (),
) -> None:
    """Raise a ValueError that names the field, unless the numbers of a dataclass are in range.

    A field whose default is ``None`` may be ``None``. A field that holds a list or tuple must hold
    one number or more, all of them in range; a list becomes a tuple, and NumPy's numbers Python's.

    Args:
        settings: An instance of a dataclass.
        counts: Fields that must be whole numbers, 1 or more.
        units: Fields that must be whole numbers from 1 to 4096: sizes of a network's layers.
        layers: Fields that must be whole numbers from 1 to 100: how many layers it has.
        whole: Fields that must be whole numbers, 0 or more.
        decays: Fields that must be in [0, 1).
        shares: Fields that must be in [0, 1].
        positive: Fields that must be positive and finite.
        not_negative: Fields that must be 0 or more and finite.
        exponents: Fields that must be from -30 to 30: exponents of ten.
        or_infinite: Those of ``positive`` and ``not_negative`` that may be infinite, too.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for names, allowed in (
        (counts, _COUNT),
        (units, _UNITS),
        (layers, _LAYERS),
        (whole, _WHOLE),
        (decays, _DECAY),
        (shares, _SHARE),
        (positive, _POSITIVE),
        (not_negative, _NOT_NEGATIVE),
        (exponents, _EXPONENT),
    ):
        for name in names:
            value = getattr(settings, name)
            if value is None and defaults[name] is None:
                continue
            if isinstance(value, np.generic):
                object.__setattr__(settings, name, value := value.item())
            several = value if isinstance(value, list | tuple) else ()
            if isinstance(value, list) or any(isinstance(one, np.generic) for one in several):
                plain = (one.item() if isinstance(one, np.generic) else one for one in several)
                object.__setattr__(settings, name, value := tuple(plain))
            if value == ():
                raise ValueError(f"{name} must be a number, or one or more, not none")
            for number in value if isinstance(value, tuple) else (value,):
                fault = allowed.fault(number)
                if fault and not (name in or_infinite and number == math.inf):
                    raise ValueError(f"{name} must be {fault}, not {number!r}")


def check_kind(name: str, given: object, kinds: Any, words: str) -> None:
    """Raise a TypeError that names the argument, unless it is of a kind.

    Args:
        name: The argument's name.
        given: What was given.
        kinds: What :func:`isinstance` takes.
        words: What it must be, in words, with an example.
    """
    # A class has all members that a protocol asks its instances for.
    if isinstance(given, type) or not isinstance(given, kinds):
        said = repr(given)
        if len(said) > _LONGEST:
            said = f"an object of {type(given).__qualname__}"
        raise TypeError(f"{name} must be {words}, not {said}")


def several_of(name: str, given: Any, kinds: Any, words: str) -> list[Any]:
    """What was given, one or several, as a list; as :func:`check_kind` for each of them."""
    if isinstance(given, kinds | str) or not isinstance(given, Iterable):
        check_kind(name, given, kinds, f"{words}, or several")
        return [given]
    several = list(given)
    for index, one in enumerate(several):
        check_kind(f"{name}[{index}]", one, kinds, words)
    return several
