"""promtool, which knows Prometheus' own rules for metrics, queries and alerts."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def promtool(*args: str, text: str = "") -> None:
    """Run it; it has to be content."""
    found = shutil.which("promtool")
    if found is None:
        pytest.fail("promtool is missing: apt-get install prometheus (Debian), or put Prometheus' release on the PATH")
    run = subprocess.run([found, *args], input=text, capture_output=True, text=True, timeout=60)
    said = run.stdout + run.stderr
    assert run.returncode == 0, said
    assert not run.stderr.strip(), said
