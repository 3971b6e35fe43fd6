"""Things that a user names by dotted path, such as ``"my.module.make_task"``.

To import a module is to run its code. :func:`without_own_code` is for paths that a file names which
may come from somebody else.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

TRUSTED = ("torch.optim.", "amalgam.")
"""What the dotted paths begin with that :func:`find` always imports."""

_refusal: ContextVar[str | None] = ContextVar("_refusal", default=None)


@contextmanager
def without_own_code(why: str) -> Iterator[None]:
    """Within the block, refuse dotted paths outside of :data:`TRUSTED` before anything is imported.

    Args:
        why: Why, and what would help; ends the error's message.
    """
    token = _refusal.set(why)
    try:
        yield
    finally:
        _refusal.reset(token)


def find(path: str, name: str, what: str, example: str) -> Any:
    """Import what a dotted path names.

    Args:
        path: A module's dotted name, a dot, and the name of something in that module.
        name: What an error is to call the path, such as ``"optimizer"``.
        what: What the path must name, such as ``"a class"``; for the error.
        example: A path that would work; for the error.

    Raises:
        ValueError: There is no such module, it can't be imported, it holds no such name, or it may
            not be imported here.
    """
    module, _, attribute = path.rpartition(".")
    wrong = f"{name} must be {what} that can be imported, such as {example!r}, not {path!r}"
    if not all(part.isidentifier() for part in path.split(".")) or not module:
        raise ValueError(f"{wrong} (that is no dotted path)")
    refusal = _refusal.get()
    if refusal is not None and not path.startswith(TRUSTED):
        raise ValueError(f"{name} {path!r} would run the code of {module!r}; {refusal}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{wrong} ({error})") from error
    except Exception as error:
        raise ValueError(
            f"{wrong}: {module!r} fails where it is imported ({type(error).__name__}: {error})"
        ) from error


def check_arguments(
    function: Callable[..., Any], path: str, name: str, arguments: Mapping[str, Any]
) -> None:
    """Refuse keyword arguments that a function does not take.

    This is done before the call, so that a TypeError of the function's own keeps its traceback.

    Args:
        function: The function, or a class.
        path: Its dotted path; for the error.
        name: What an error is to call the path.
        arguments: The keyword arguments it is to be called with.

    Raises:
        ValueError: One of them is not among the function's parameters, or one is missing.
    """
    signature = inspect.signature(function)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ValueError(
            f"{name} {path!r} can't be called with ({given}): {error}; it takes {signature}"
        ) from error
