"""The examples run: a short form of each, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [
    *("examples/demo.py", "examples/numpyro_sites.py", "examples/pyro_sites.py"),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke(script):
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", script, "--smoke"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
