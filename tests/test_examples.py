"""A short form of each example runs in a separate process; those of the gallery run in this one."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import matplotlib
import pytest
import torch
from matplotlib import pyplot as plt

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


GALLERY = sorted((ROOT / "examples").glob("plot_*.py"))
QUICK = [f"plot_{name}.py" for name in ("adaptive", "importance", "lr_to_rp", "mixture_guide", "stratified", "vae", "velocity")]
matplotlib.use("agg")


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@pytest.mark.parametrize("script", [pytest.param(path.name, marks=[] if path.name in QUICK else pytest.mark.slow) for path in GALLERY])
def test_gallery(script, monkeypatch):
    """Each gallery script runs in single precision, like for a user, and ends with a figure and a sentence about it."""
    monkeypatch.setattr(sys, "argv", [script, "--smoke"])
    torch.set_default_dtype(torch.float32)
    jax.config.update("jax_enable_x64", False)
    plt.close("all")  # closes the figures of other tests
    with plt.rc_context():
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert plt.get_fignums()
    assert all(ax.has_data() for number in plt.get_fignums() for ax in plt.figure(number).axes)
    plt.close("all")
    *_, last = (ROOT / "examples" / script).read_text().split("# %%\n")
    assert all(line.startswith("# ") for line in last.splitlines())
