"""Double precision everywhere, and a ``host`` fixture that runs a test in NumPyro and in Pyro."""

import jax
import numpyro
import pyro
import pytest
import torch
from hosts import HOSTS

numpyro.enable_x64()
torch.set_num_threads(1)
jax.config.update("jax_disable_most_optimizations", True)  # most of the time goes into compilation


@pytest.fixture(autouse=True)
def _fresh_state():
    torch.set_default_dtype(torch.float64)
    jax.config.update("jax_enable_x64", True)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


@pytest.fixture(params=HOSTS)
def host(request):
    return HOSTS[request.param]


# In NumPyro most of the time of a test is compilation. What these say of it is said in Pyro, and the hosts agree at the same x.
SLOW_IN_NUMPYRO = ("test_divergence_against_automatic", "test_divergence_of_vectors_against_automatic", "test_unbiased[")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if "numpyro-" in item.name and (item.name.startswith(SLOW_IN_NUMPYRO) or ",_graph-" in item.name):
            item.add_marker(pytest.mark.slow)
