"""Have pytest say why a test failed as soon as it did: ``-p at_once``.

Where a limit ends a run, what pytest says at its end is lost.
"""

from __future__ import annotations

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        print(f"\n{report.longreprtext}", flush=True)
