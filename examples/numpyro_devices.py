"""Particles and data on several devices, in NumPyro.

To try it on a machine without accelerators, force eight devices on the CPU. They share its cores:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/numpyro_devices.py [--smoke]
"""

import sys

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpyro.infer import SVI

from flowvi import Enumerate
from flowvi.numpyro import TraceFlow_ELBO

STEPS = 5 if "--smoke" in sys.argv else 500
MESH = Mesh(jax.devices(), ("devices",))
SPLIT, COPIED = PartitionSpec("devices"), PartitionSpec()
NUM_DATA, NUM_PARTICLES = 64 * len(jax.devices()), 2 * len(jax.devices())
DATA = jnp.where(jnp.arange(NUM_DATA) % 3 == 0, 2.0, -1.0) + 0.7 * jax.random.normal(jax.random.key(0), (NUM_DATA,))


def model(y):
    """A mixture of two Normals: each observation has a label."""
    means = numpyro.sample("means", dist.Normal(jnp.array([-1.0, 1.0]), 2.0).to_event(1))
    with numpyro.plate("data", NUM_DATA):
        label = numpyro.sample("label", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(means[label], 0.7), obs=y)


def guide(y):
    numpyro.sample("means", dist.Normal(numpyro.param("loc", jnp.array([-0.5, 0.5])), 0.1).to_event(1))
    with numpyro.plate("data", NUM_DATA):
        numpyro.sample("label", dist.Bernoulli(logits=numpyro.param("logits", jnp.zeros(NUM_DATA))))


def particles_on_devices(particle, keys):
    """Replaces ``jax.vmap``: each device computes its share of the particles."""
    return jax.shard_map(jax.vmap(particle), mesh=MESH, in_specs=SPLIT, out_specs=SPLIT, check_vma=False)(keys)


def fit(title, vectorize_particles, data):
    elbo = TraceFlow_ELBO(NUM_PARTICLES, vectorize_particles, estimators={"label": Enumerate()})
    svi = SVI(model, guide, numpyro.optim.Adam(0.05), elbo)
    result = svi.run(jax.random.key(1), STEPS, data, progress_bar=False)
    print(f"{title}: loss {result.losses[-1]:.2f}, means {', '.join(f'{mean:.2f}' for mean in result.params['loc'])}")


if __name__ == "__main__":
    print(f"{len(jax.devices())} devices, {NUM_PARTICLES} particles, {NUM_DATA} observations")
    fit("particles on all devices", particles_on_devices, DATA)
    fit("data on all devices", True, jax.device_put(DATA, NamedSharding(MESH, SPLIT)))
