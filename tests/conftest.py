"""Double precision, a ``host`` fixture that runs a test in both hosts, and the choice of NumPyro's slow rows."""

import os
from collections import defaultdict
from importlib.metadata import version

# The tests spend most of their time in compilation. These flags and `jax_disable_most_optimizations` halve it.
QUICK_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):  # other versions do not know these flags and end the process
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
    """If a test has more than four rows, NumPyro runs every fourth one; the others are slow tests.

    In NumPyro a row is mostly compilation. The rows test mostly the core, and Pyro runs all of them.
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
