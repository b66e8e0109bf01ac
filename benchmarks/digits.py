"""An autoencoder of digits with Bernoulli latents: the ELBO against the time of training, with two objectives.

The library's own objective is TraceGraph_ELBO in NumPyro. In Pyro it is Trace_ELBO, the faster of Pyro's two here. flowvi's
TraceFlow_ELBO has the same arguments, five particles. benchmarks/vae.py trains the same program. The two fits train in turn, some steps
at a time. The ELBO is over all images, with twenty particles, in nats per image. The seconds are the CPU time of training. The command
also draws docs/figures/digits.png. About two minutes:

    python benchmarks/digits.py
    python benchmarks/digits.py --smoke
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from time import process_time
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import numpyro.infer
import pyro
import pyro.infer
import torch
from programs import HOSTS, IMAGES, NumPyro, autoencoder
from tables import figure, options, table
from timing import STEPS, particles, use_one_thread

from flowvi import plot

FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "digits.png"


def objectives(h: Any) -> dict[str, Any]:
    name, own = ("TraceGraph_ELBO", numpyro.infer) if h is NumPyro else ("Trace_ELBO", pyro.infer)
    five = particles(h, 5)
    return {
        f"{h.name}'s {name}": getattr(own, name)(**five),
        "TraceFlow_ELBO": h.flow.TraceFlow_ELBO(**five),
    }


class Fit:
    """The training of one autoencoder: the seconds spent and the ELBO reached after each part."""

    def __init__(self, h: Any, elbo: Any):
        self.h, self.store = h, {"params": {}, "constraints": {}}
        with self.parameters():
            self.program = autoencoder(h, h.dist.Normal, "Bernoulli")
            self.side = STEPS[h](self.program, elbo, rate=3e-3)
            self.side.run(0 if h is NumPyro else 1)  # compiles the loop in NumPyro, creates the parameters in Pyro
            all_images = h.flow.TraceFlow_ELBO(**particles(h, 20))
            model, guide, (images, _) = self.program

            def loss(*first):
                return all_images.loss(*first, model, guide, images, len(images))

            self.loss = jax.jit(loss) if h is NumPyro else loss
            self.seconds, self.elbos = [0.0], [self.elbo()]

    def parameters(self) -> Any:
        """In Pyro, a parameter store for this fit alone."""
        return nullcontext() if self.h is NumPyro else pyro.get_param_store().scope(self.store)

    def elbo(self) -> float:
        if self.h is NumPyro:
            return -float(self.loss(jax.random.key(1), self.side.svi.get_params(self.side.state))) / len(IMAGES)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return -self.loss() / len(IMAGES)

    def train(self, steps: int) -> None:
        with self.parameters():
            start = process_time()
            self.side.run(steps)
            self.seconds.append(self.seconds[-1] + process_time() - start)
            self.elbos.append(self.elbo())

    def seconds_to(self, elbo: float) -> float:
        """When the ELBO was first reached, by linear interpolation between evaluations; infinity if never."""
        if max(self.elbos) < elbo:
            return math.inf
        i = next(i for i, reached in enumerate(self.elbos) if reached >= elbo)
        return float(np.interp(elbo, self.elbos[i - 1 : i + 1], self.seconds[i - 1 : i + 1]))


def draw(fits: dict[str, dict[str, Fit]]) -> None:
    with plt.rc_context({**plot.STYLE, "font.size": 10.0}):
        picture, axes = plt.subplots(len(fits), 1, figsize=(4.6, 4.6))  # stacked, so that a phone shows it large enough
        for ax, (host, of_host) in zip(axes, fits.items(), strict=True):
            for (label, fit), style in zip(of_host.items(), ("--", "-"), strict=True):
                ax.plot(fit.seconds, fit.elbos, style, label=label)
            ax.set(title=host, ylabel="ELBO in nats per image", ylim=(-26.5, -16.5))
            ax.legend(loc="lower right")
        axes[-1].set_xlabel("seconds of training")
        picture.savefig(FIGURE, dpi=150)


def main(argv: list[str] | None = None) -> None:
    options_given = options(__file__, __doc__, argv)
    use_one_thread()
    about = "An autoencoder of digits with 20 Bernoulli latents: the ELBO after 3000 steps with five particles, in nats per image."
    columns = ("library", "objective", "seconds of training", "ELBO", "seconds to the final ELBO of the library's own", "times as fast")
    fits: dict[str, dict[str, Fit]] = {}
    with table("digits", options_given, columns, about) as row:
        for h in HOSTS:
            fits[h.name] = {label: Fit(h, elbo) for label, elbo in objectives(h).items()}
            for part in (5, 5) if options_given.smoke else (50,) * 10 + (100,) * 25:
                for fit in fits[h.name].values():
                    fit.train(part)
            own, *_ = fits[h.name].values()
            for label, fit in fits[h.name].items():
                sooner = fit.seconds_to(own.elbos[-1])
                times = figure(own.seconds_to(own.elbos[-1]) / sooner, ".2g")
                row(h.name, label, figure(fit.seconds[-1]), figure(fit.elbos[-1], ".2f"), figure(sooner), times)
    if not options_given.smoke and not options_given.only:
        draw(fits)


if __name__ == "__main__":
    main()
