"""Several devices and several processes give the gradients of one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def output(*command, **environment):
    """The output of Python in a separate process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def numbers(*command):
    """The number that a script prints for each label."""
    return {label: float(number) for label, number in (line.rsplit(" ", 1) for line in output(*command).splitlines())}


@pytest.mark.slow
def test_numpyro_on_eight_devices():
    """RP, LR with leave-one-out over the particles of all devices, Flow, a learned estimator and an exact sum."""
    found = numbers("tests/sharded.py")
    assert found["particles"] < 1e-12
    assert found["data"] < 1e-12
    assert found["other draws"] > 1e-3  # the test can fail


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
def test_pyro_in_two_processes():
    """The same estimators under DistributedDataParallel, each process with half of the data."""
    found = numbers("tests/distributed.py", str(free_port()))
    assert found["mean of the halves"] < 1e-12
    assert found["another half"] > 1e-3  # the test can fail


@pytest.mark.slow
def test_examples():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    assert output("examples/numpyro_devices.py", "--smoke", XLA_FLAGS=flags).startswith("8 devices, 16 particles")
    launched = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "examples/pyro_processes.py", "--smoke")
    assert output(*launched).startswith("2 processes, loss ")
