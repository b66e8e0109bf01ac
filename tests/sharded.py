"""A program with RP and several other estimators on eight forced CPU devices, which test_scaling.py runs in a separate process.

It prints the largest relative difference of the gradients from those on one device: with the particles on all devices, then the data.
"""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flowvi import LR, RP, Enumerate, Flow
from flowvi.numpyro import TraceFlow_ELBO, adaptive

numpyro.enable_x64()
jax.config.update("jax_disable_most_optimizations", True)
MESH = Mesh(jax.devices(), ("devices",))
OVER_DEVICES = PartitionSpec("devices")
DATA = jnp.linspace(-2.0, 2.0, 16)
NAMES = ("score", "flow", "control")
ESTIMATORS = {"k": Enumerate(), "score": LR(), "flow": Flow(loc=lambda x, p: 0.5), "control": RP(control_variate="quadratic")}


def model(y):
    k = numpyro.sample("k", dist.Bernoulli(0.4))
    mean = sum(numpyro.sample(name, dist.Normal(0.0, 1.0)) for name in NAMES)
    with numpyro.plate("data", len(y)):
        local = numpyro.sample("local", dist.Normal(mean, 1.0))
        numpyro.sample("y", dist.Normal(local + k, 0.5), obs=y)


def guide(y):
    numpyro.sample("k", dist.Bernoulli(logits=numpyro.param("logits", 0.3)))
    for i, name in enumerate(NAMES):
        numpyro.sample(name, dist.Normal(numpyro.param(f"{name}_loc", 0.1 * i), 0.7))
    with numpyro.plate("data", len(y)):
        numpyro.sample("local", dist.Normal(numpyro.param("locals", 0.1 * jnp.arange(16.0)), 0.6))


def particles_over_devices(particle, keys):
    """Each device maps its share of the particles. JAX's check is off, because it does not know flowvi's custom derivatives."""
    share = jax.shard_map(jax.vmap(particle), mesh=MESH, in_specs=OVER_DEVICES, out_specs=OVER_DEVICES, check_vma=False)
    return share(keys)


def gradients(vectorize_particles, place):
    elbo = TraceFlow_ELBO(16, vectorize_particles, estimators=ESTIMATORS)
    learning = adaptive(guide, elbo)
    with numpyro.handlers.seed(rng_seed=0), numpyro.handlers.trace() as trace:
        learning(DATA)
    parameters = {name: place(site["value"]) for name, site in trace.items() if site["type"] == "param"}

    @jax.jit
    def value_and_grad(key, y):
        return jax.value_and_grad(lambda p: elbo.loss(key, p, model, learning, y))(parameters)

    return lambda seed: value_and_grad(jax.random.key(seed), place(DATA))


def spread(x):
    """Spread an array over the devices if it has an element for each observation."""
    return jax.device_put(x, NamedSharding(MESH, OVER_DEVICES if jnp.shape(x)[:1] == DATA.shape else PartitionSpec()))


def difference(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(abs(a - b).max() / (1 + abs(b).max())) for a, b in pairs)


assert len(jax.devices()) == 8
one_device = gradients(True, jnp.asarray)
one = one_device(1)
assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(one))
print("particles", difference(gradients(particles_over_devices, jnp.asarray)(1), one))
print("data", difference(gradients(True, spread)(1), one))
print("other draws", difference(one_device(2), one))
