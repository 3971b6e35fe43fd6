"""Things that a user names by dotted path, such as ``"my.module.make_task"``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def find(path: str, name: str, what: str, example: str) -> Any:
    """Import what a dotted path names.

    Args:
        path: A module's dotted name, a dot, and the name of something in that module.
        name: What an error is to call the path, such as ``"optimizer"``.
        what: What the path must name, such as ``"a class"``; for the error.
        example: A path that would work; for the error.

    Raises:
        ValueError: There is no such module, it can't be imported, or it holds no such name.
    """
    module, _, attribute = path.rpartition(".")
    try:
        if not all(part.isidentifier() for part in path.split(".")) or not module:
            raise ImportError("that is no dotted path")
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{name} must be {what} that can be imported, such as {example!r}, "
            f"not {path!r} ({error})"
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
