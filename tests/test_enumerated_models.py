"""A site that the model asks the host to sum out is refused: drawn from its prior, the program would mean something else."""

import pyro
import pytest
from hosts import HOSTS


@pytest.fixture(params=["parallel", "sequential"])
def how(request):
    return request.param


def program(host, how):
    def model():
        x = host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)))
        z = host.sample("z", host.dist.Bernoulli(host.array(0.3)), infer={"enumerate": how})
        host.sample("y", host.dist.Normal(x + 3 * z, host.array(1.0)), obs=host.array(2.0))

    def guide():
        host.sample("x", host.dist.Normal(host.array(0.5), host.array(1.0)))

    return model, guide


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
@pytest.mark.parametrize("objective", ["TraceFlow_ELBO", "TraceFlow_RenyiELBO"])
def test_refused(host, how, objective):
    model, guide = program(host, how)
    if host.name == "pyro" and how == "sequential":
        with pytest.raises(NotImplementedError, match="model-side sequential enumeration"):  # by Pyro itself
            host.flow.TraceFlow_ELBO().describe(model, guide)
        return
    elbo = getattr(host.flow, objective)()
    with pytest.raises(ValueError, match="site 'z': .* infer\\['enumerate'\\] in the model"):
        elbo.describe(model, guide)


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
def test_pyro_config_enumerate():
    model, guide = program(HOSTS["pyro"], "parallel")
    marked = pyro.infer.config_enumerate(lambda: model(), "parallel")
    with pytest.raises(ValueError, match="site 'z'"):
        HOSTS["pyro"].flow.TraceFlow_ELBO().describe(marked, guide)
