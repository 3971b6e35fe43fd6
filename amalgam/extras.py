"""Packages that only some calls need; pip installs them by the name of an extra."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtra(ImportError):
    """A package that an extra of this one would install is absent."""


def import_extra(module: str, extra: str, what: str) -> ModuleType:
    """Import a module of a package that an extra installs.

    Args:
        module: The module.
        extra: The extra, which has the name of the package that it installs, or stands for it.
        what: What needs it, for the error.

    Raises:
        MissingExtra: A module is absent. A package that is there and fails to be imported raises
            its own error.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{what} needs the module {error.name!r}, which is not installed: "
            f"pip install 'amalgam-optim[{extra}]'"
        ) from error
