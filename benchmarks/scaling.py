"""Steps of NumPyro's SVI with the particles on several devices: the same number of particles, or one that grows with the devices.

The program is the logistic regression of benchmarks/programs.py. Without accelerators, eight devices are forced on the CPU. They share
its cores. So the times show the overhead of dividing the work, and not the gain of real devices. About a minute:

    python benchmarks/scaling.py
    python benchmarks/scaling.py --smoke
"""

from __future__ import annotations

import os
import sys

if "jax" not in sys.modules:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
from jax.sharding import Mesh, PartitionSpec
from programs import NumPyro, logistic_regression
from tables import figure, options, table
from timing import NumPyroSteps, repeat

PARTICLES = 64
DEVICES = [n for n in (1, 2, 4, 8) if n <= len(jax.devices())]


def on_devices(number: int):
    """How to map a particle over the keys on several devices."""
    split = PartitionSpec("devices")
    mesh = Mesh(jax.devices()[:number], ("devices",))

    def vectorize(particle, keys):
        return jax.shard_map(jax.vmap(particle), mesh=mesh, in_specs=split, out_specs=split, check_vma=False)(keys)

    return vectorize


def main(argv: list[str] | None = None) -> None:
    options_given = options(__file__, __doc__, argv)
    rounds, duration = (2, 0.002) if options_given.smoke else (60, 0.05)
    program = logistic_regression(NumPyro, NumPyro.dist.Normal)
    kind = "forced on the cores of one CPU" if jax.devices()[0].platform == "cpu" else jax.devices()[0].device_kind
    about = f"The least time of a step of a logistic regression by the number of devices ({kind})."
    columns = ("scaling", "devices", "particles", "ms a step", "time / one device's")
    with table("scaling", options_given, columns, about) as row:
        for scaling, particles_on in (("strong", lambda n: PARTICLES), ("weak", lambda n: PARTICLES * n)):
            base = None
            for number in DEVICES:
                elbo = NumPyro.flow.TraceFlow_ELBO(particles_on(number), on_devices(number))
                least = 1e3 * repeat(NumPyroSteps(program, elbo), rounds, duration).min()  # the rest is other processes
                base = base or least
                row(scaling, number, particles_on(number), figure(least), figure(least / base))


if __name__ == "__main__":
    main()
