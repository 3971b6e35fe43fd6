"""Runs that are killed, or lose power, at any file operation go on to the same bits."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_points.py")
STRIDE = int(os.environ.get("AMALGAM_KILL_STRIDE", "16"))

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs /proc and fork, as Linux has them"
)


@pytest.mark.parametrize("recipe", ["stages", "replicates", "choice-then-periods"])
def test_every_kill_point_ends_in_the_same_bits(recipe, tmp_path) -> None:
    """Of all operations every so many-th, from one that is drawn; the whole takes minutes."""
    first = int(os.environ.get("AMALGAM_KILL_FIRST", random.SystemRandom().randint(1, STRIDE)))
    print(f"AMALGAM_KILL_FIRST={first} AMALGAM_KILL_STRIDE={STRIDE} kills there again")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), recipe, str(first), str(STRIDE)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=290,
    )
    assert done.returncode == 0, done.stderr
    assert "killed at" in done.stdout
