"""Training a variational autoencoder of scikit-learn's digits, with Bernoulli and with Gaussian latents, in both hosts.

Minibatches have 64 of 1,500 images; 297 are held out. Encoder and decoder have one hidden layer of 100 units. Adam has the step size
0.003.

A row has the importance-weighted bound with 50 particles, in nats per image (larger is better): on the training images after a number
of steps, on the held-out images after all steps, and on the held-out images after the time that "LR + leave-one-out" or "RP" took for
all of its steps. The last column is the milliseconds of one step. The 200 latents run in NumPyro only. About eight minutes:

    python benchmarks/vae.py
    python benchmarks/vae.py --smoke
    python benchmarks/vae.py --only NumPyro Gaussian
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from programs import BATCH, HOSTS, IMAGES, PIXELS, NumPyro, Program, autoencoder
from tables import Options, figure, options, table
from timing import STEPS, particles, seconds, use_one_thread

import flowvi.numpyro
from flowvi import LR, Auto, Baseline, DisARM, Enumerate, ReinMax, StraightThrough, Surrogate

TRAINED, HELD_OUT = IMAGES[:1500], IMAGES[1500:]
SCALE = len(TRAINED) / BATCH  # of the costs, by the subsampling
STEPS_OF_TRAINING, PARTICLES = 3000, 50


@dataclass(frozen=True)
class Method:
    """An objective with its particles and options, and a function that gives the estimator of the latents."""

    objective: str = "TraceFlow_ELBO"
    particles: int = 1
    more: dict[str, Any] = field(default_factory=dict)
    estimator: Callable[..., Any] | None = None


def network_baseline(h, size, critic, images) -> LR:
    network = critic()
    return LR(baseline=Baseline(lambda x: SCALE * network(x)[..., 0], images))


def relax(h, size, critic, images) -> Surrogate:
    """A network with one hidden layer, from latents and image to a number."""
    rng, hidden = np.random.default_rng(0), 100
    initial = {
        "w": rng.normal(size=(size, hidden)) / 10,
        "m": rng.normal(size=(PIXELS, hidden)) / 10,
        "v": np.zeros(hidden),
        "a": np.zeros(()),
    }

    def c(z, params, images):
        return SCALE * (h.xp.tanh(z @ params["w"] + images @ params["m"]) @ params["v"] + params["a"])

    return Surrogate(c, {name: h.array(value) for name, value in initial.items()}, inputs=(images,))


BERNOULLI = {  # the time of the first is the "equal time" of the others
    "LR + leave-one-out, 5 particles": Method(particles=5),
    "LR + network baseline": Method(estimator=network_baseline),
    "DisARM": Method(estimator=lambda *_: DisARM()),
    "Enumerate, one lane at random": Method(estimator=lambda *_: Enumerate(lanes="random")),
    "RELAX": Method(estimator=relax),
    "VIMCO, 5 particles": Method("TraceFlow_RenyiELBO", 5),
    "ReinMax (biased)": Method(estimator=lambda *_: ReinMax()),
    "StraightThrough (biased)": Method(estimator=lambda *_: StraightThrough()),
}
GAUSSIAN = {
    "RP": Method(),
    "RP, 5 particles": Method(particles=5),
    "IWAE, 5 particles": Method("TraceFlow_RenyiELBO", 5),
    "DReG, 5 particles": Method("TraceFlow_RenyiELBO", 5, {"gradient": "dreg"}),
}
# For each table: the latents, their number, the methods and the hosts. The longest runs in one host.
TABLES: dict[str, list[tuple[str, int, dict[str, Method], tuple]]] = {
    "vae_bernoulli": [("Bernoulli", 20, BERNOULLI, HOSTS), ("Bernoulli", 200, BERNOULLI, HOSTS[:1])],
    "vae_gaussian": [("Gaussian", 10, GAUSSIAN, HOSTS)],
}


class Training:
    """A training run: the seconds so far, and the bound at some of these times."""

    def __init__(self, h: Any, kind: str, size: int, method: Method, number: int):
        estimator = method.estimator and (lambda critic, images: method.estimator(h, size, critic, images))
        self.h = h
        self.program = autoencoder(h, h.dist.Normal, kind, size, estimator)._replace(args=(h.array(TRAINED), BATCH))
        elbo = getattr(h.flow, method.objective)(**particles(h, method.particles), **method.more)
        model, guide, args = self.program
        learning = flowvi.numpyro.adaptive(guide, elbo) if h is NumPyro and method.estimator is relax else guide
        self.side = STEPS[h](Program(model, learning, args), elbo, rate=3e-3)
        self.side.run(0 if h is NumPyro else 1)  # compiles or warms up before the timing
        wide = h.flow.TraceFlow_RenyiELBO(estimators={"z": Auto()}, **particles(h, number))

        def loss(*first):
            images = first[-1]
            return wide.loss(*first[:-1], model, guide, images, len(images))

        self.loss = jax.jit(loss) if h is NumPyro else loss
        self.steps, self.spent, self.held_out = 0, 0.0, [(0.0, self.bound(HELD_OUT))]

    def bound(self, images: np.ndarray) -> float:
        """The importance-weighted bound, in nats per image."""
        first = (jax.random.key(1), self.side.svi.get_params(self.side.state)) if self.h is NumPyro else ()
        return -float(self.loss(*first, self.h.array(images))) / len(images)

    def run(self, steps: int) -> None:
        self.spent += seconds(self.side, steps)
        self.steps += steps
        self.held_out.append((self.spent, self.bound(HELD_OUT)))

    def held_out_after(self, time: float) -> float:
        """The bound on the held-out images after some seconds, by linear interpolation."""
        while self.spent < time:
            self.run(max(1, round(min(time - self.spent, time / 4) * self.steps / self.spent) + 1))
        return float(np.interp(time, *zip(*self.held_out, strict=True)))


def rows(options_given: Options, kind: str, size: int, methods: dict[str, Method], hosts: tuple, row: Callable[..., None]) -> None:
    steps, number = (20, 2) if options_given.smoke else (STEPS_OF_TRAINING, PARTICLES)
    for h in hosts:
        time = None
        for name, method in methods.items():
            if not options_given.wants(h.name, kind, size, name):
                continue
            training = Training(h, kind, size, method, number)
            bounds = []
            for n in (steps // 4, steps - steps // 4):
                for part in np.diff(np.linspace(0, n, 4).astype(int)):
                    training.run(int(part))
                bounds.append(training.bound(TRAINED))
            held_out, pace = training.held_out[-1][1], 1e3 * training.spent / steps
            time = training.spent if time is None else time
            after = training.held_out_after(time)
            row(f"{size} {kind}", name, h.name, *(figure(b, ".2f") for b in (*bounds, held_out, after)), f"{pace:.2f}")


def main(argv: list[str] | None = None) -> None:
    options_given = options(__file__, __doc__, argv)
    use_one_thread()
    n = STEPS_OF_TRAINING
    columns = ("Latents", "Gradient", "Host", f"{n // 4} steps", f"{n} steps", "held out", "in equal time", "ms a step")
    about = f"The importance-weighted bound with {PARTICLES} particles, in nats per image; larger is better. {n} steps, or equal time."
    for name, parts in list(TABLES.items())[1 if options_given.smoke else 0 :]:
        with table(name, options_given, columns, about) as row:
            for part in parts:
                rows(options_given, *part, row)


if __name__ == "__main__":
    main()
