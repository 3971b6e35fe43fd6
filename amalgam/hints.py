"""Suggestions for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """``"; did you mean 'name'?"`` for the known name nearest to what was given, or nothing."""
    near = difflib.get_close_matches(str(given), list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
