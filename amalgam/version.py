"""What code this is: version and commit."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

__version__ = "0.1.0"


@cache
def describe() -> dict[str, str | None]:
    """Version, and the commit the package was built from or is checked out at, where known."""
    return {"amalgam_version": __version__, "commit": _commit()}


def _commit() -> str | None:
    built_from = Path(__file__).with_name("COMMIT")  # setup.py writes it where it installs
    if built_from.exists():
        return built_from.read_text(encoding="utf-8").strip()
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():
        try:
            done = subprocess.run(
                ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()
    return None
