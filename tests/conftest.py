"""Double precision everywhere, a ``host`` fixture that runs a test in both hosts, and what NumPyro leaves to the slow tests."""

import os
from collections import defaultdict
from importlib.metadata import version

# Most of the time of the tests goes into compilation: with these and `jax_disable_most_optimizations` it is half as long.
QUICK_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):  # a version that does not know a flag ends the process
    os.environ["XLA_FLAGS"] = f"{QUICK_TO_COMPILE} {os.environ.get('XLA_FLAGS', '')}"

import jax  # noqa: E402
import numpyro  # noqa: E402
import pyro  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hosts import HOSTS  # noqa: E402

numpyro.enable_x64()
torch.set_num_threads(1)
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def _fresh_state():
    torch.set_default_dtype(torch.float64)
    jax.config.update("jax_enable_x64", True)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


@pytest.fixture(params=HOSTS)
def host(request):
    return HOSTS[request.param]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test with more than four rows NumPyro runs every fourth one; the others are slow tests.

    In NumPyro a row is mostly compilation. It tests mostly the core, of which Pyro runs every row; the hosts agree at the same x.
    """
    rows = defaultdict(list)
    for item in items:
        host = item.callspec.params.get("host") if hasattr(item, "callspec") else None
        in_numpyro = getattr(host, "name", host) == "numpyro" or "numpyro" in getattr(item, "originalname", "")
        if in_numpyro and item.get_closest_marker("slow") is None:
            rows[item.parent.nodeid, item.originalname].append(item)
    for of_test in rows.values():
        if len(of_test) > 4:
            for i, item in enumerate(of_test):
                if i % 4:
                    item.add_marker(pytest.mark.slow)
