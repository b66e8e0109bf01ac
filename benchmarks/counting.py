"""Attend, infer, repeat: an autoencoder that counts the digits in an image, in both hosts.

A canvas of 16 x 16 pixels has none, one or two of scikit-learn's digits. Two Bernoulli sites say whether there is a first and a second
object. Each object has a place and a code, both Normal, and a network paints it. The guide finds the places in the image, and the codes
in a glimpse at each place. The methods differ in their estimators. Sites that are not listed are reparameterized:

    LR + baseline    LR at the discrete sites, with a network of the image as its baseline
    Enumerate        the exact sum over both values of each discrete site
    MeasureValued    weak derivatives at the discrete sites; at a Bernoulli they are the exact sum
    hybrid           Enumerate at the discrete sites, MeasureValued at the places, one lane at random

A row has the share of held-out images whose number of digits is right, after a number of steps, and the CPU milliseconds of a step.
Batches have 64 images, and Adam has the step size 0.001. About fifteen minutes:

    python benchmarks/counting.py
    python benchmarks/counting.py --smoke
    python benchmarks/counting.py --only NumPyro Enumerate
"""

from __future__ import annotations

from time import process_time
from typing import Any

import numpy as np
import pyro.poutine
import torch
from numpyro import handlers
from programs import HOSTS, NumPyro, Program
from sklearn.datasets import load_digits
from tables import figure, options, table
from timing import STEPS, use_one_thread

from flowvi import LR, RP, Baseline, Enumerate, MeasureValued

CANVAS, PATCH, CODE, BATCH = 16, 8, 8, 64
TRAINED, HELD_OUT = 4096, 1024
NOISE = 0.25  # the standard deviation of a pixel

METHODS: dict[str, dict[str, Any]] = {
    "LR + baseline": {},  # its baseline network is made with the program
    "Enumerate": {"present": Enumerate()},
    "MeasureValued": {"present": MeasureValued()},
    "hybrid": {"present": Enumerate(), "place": MeasureValued(lanes="random")},
}


def canvases(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images with zero, one or two digits that overlap little, and the number of digits in each."""
    rng, digits = np.random.default_rng(seed), load_digits().images / 16
    counts = rng.integers(0, 3, number)
    images = np.zeros((number, CANVAS, CANVAS))
    for image, count in zip(images, counts, strict=True):
        first = rng.integers(0, CANVAS - PATCH + 1, 2)
        second = (first + rng.integers(4, 6, 2)) % (CANVAS - PATCH + 1)  # at least four pixels away in each direction
        for y, x in (first, second)[:count]:
            image[y : y + PATCH, x : x + PATCH] += digits[rng.integers(len(digits))]
    return images.clip(0, 1), counts


def program(h: Any, images: np.ndarray, method: str) -> Program:
    """Model and guide, and their arguments: the images and the batch size."""
    encoder, glimpse = h.network("encoder", CANVAS**2, 2 * 5, 0), h.network("glimpse", PATCH**2, 2 * CODE, 1)
    painter, critic = h.network("painter", CODE, PATCH**2, 2), h.network("critic", CANVAS**2, 1, 3)
    mask = handlers.mask if h is NumPyro else pyro.poutine.mask
    given = METHODS[method]

    def window(place):
        """For each axis, the canvas-by-patch weights that put a patch at its place, with linear interpolation between pixels."""
        start = (CANVAS - PATCH) / (1 + h.xp.exp(-2 * place))
        pixels = h.array(np.arange(CANVAS)[:, None] - np.arange(PATCH))
        return h.xp.clip(1 - abs(pixels - start[..., None, None]), 0)

    def paint(weights, patch):
        return h.xp.einsum("...ip,...jq,...pq->...ij", weights[..., 0, :, :], weights[..., 1, :, :], patch)

    def look(weights, image):
        return h.xp.einsum("...ip,...jq,...ij->...pq", weights[..., 0, :, :], weights[..., 1, :, :], image)

    def annotated(kind, baseline):
        return {"estimator": given.get(kind, LR(baseline=baseline) if kind == "present" else RP())}

    def guide(images, batch):
        encode, attend, value = encoder(), glimpse(), critic()
        with h.ppl.plate("images", len(images), subsample_size=batch):
            image = h.ppl.subsample(images, event_dim=2)
            flat = image.reshape(-1, CANVAS**2)
            objects = encode(flat).reshape(-1, 2, 5)
            baseline = Baseline(lambda image: len(images) / BATCH * value(image)[..., 0], flat)
            present = h.array(1.0)
            for i in range(2):
                of = objects[:, i]
                with mask(mask=present > 0.5 if i else h.array(1.0) > 0.5):
                    here = h.ppl.sample(f"present{i}", h.dist.Bernoulli(logits=of[:, 0]), infer=annotated("present", baseline))
                present = present * here
                with mask(mask=present > 0.5):
                    at = h.dist.Normal(of[:, 1:3], h.xp.exp(of[:, 3:] - 2)).to_event(1)
                    place = h.ppl.sample(f"place{i}", at, infer=annotated("place", None))
                    seen = attend(look(window(place), image).reshape(-1, PATCH**2))
                    code = h.dist.Normal(seen[:, :CODE], h.xp.exp(seen[:, CODE:])).to_event(1)
                    h.ppl.sample(f"code{i}", code, infer=annotated("code", None))
        return objects[..., 0]

    def model(images, batch):
        decode = painter()
        zero = h.array(0.0)
        with h.ppl.plate("images", len(images), subsample_size=batch):
            image = h.ppl.subsample(images, event_dim=2)
            canvas, present = 0.0, h.array(1.0)
            for i in range(2):
                with mask(mask=present > 0.5 if i else h.array(1.0) > 0.5):
                    here = h.ppl.sample(f"present{i}", h.dist.Bernoulli(h.array(2 / 3 if i == 0 else 1 / 2)))
                present = present * here
                with mask(mask=present > 0.5):
                    place = h.ppl.sample(f"place{i}", h.dist.Normal(zero, 1.0).expand([2]).to_event(1))
                    code = h.ppl.sample(f"code{i}", h.dist.Normal(zero, 1.0).expand([CODE]).to_event(1))
                patch = 1 / (1 + h.xp.exp(-decode(code) + 1)).reshape(-1, PATCH, PATCH)
                canvas = canvas + present[..., None, None] * paint(window(place), patch)
            h.ppl.sample("image", h.dist.Normal(canvas, NOISE).to_event(2), obs=image)

    return Program(model, guide, (h.array(images), BATCH))


def counted(h: Any, side: Any, built: Program, images: np.ndarray) -> np.ndarray:
    """The most probable number of digits in each image."""
    if h is NumPyro:
        logits = handlers.seed(handlers.substitute(built.guide, side.svi.get_params(side.state)), 0)(h.array(images), None)
    else:
        with torch.no_grad():
            logits = built.guide(h.array(images), None)
    first, second = np.asarray(logits).T
    return np.where(first < 0, 0, np.where(second < 0, 1, 2))


def main(argv: list[str] | None = None) -> None:
    options_given = options(__file__, __doc__, argv)
    use_one_thread()
    steps, size = (20, 256) if options_given.smoke else (5_000, TRAINED)
    (images, _), (others, counts) = canvases(size, 0), canvases(HELD_OUT, 1)
    checkpoints = sorted({steps // 10, steps // 4, steps // 2, steps})
    right = f"The share of {HELD_OUT} held-out images whose number of digits is right"
    about = f"{right}, by steps of training, and the CPU time of a step."
    with table("counting", options_given, ("Method", "Host", *(f"{n} steps" for n in checkpoints), "ms a step"), about) as row:
        for method in list(METHODS)[1 if options_given.smoke else 0 : 2 if options_given.smoke else None]:
            for h in HOSTS:
                if not options_given.wants(h.name, method):
                    continue
                built = program(h, images, method)
                side = STEPS[h](built, h.flow.TraceFlow_ELBO(), rate=1e-3)
                side.run(0 if h is NumPyro else 1)  # compiles or warms up before the timing
                spent, shares = 0.0, []
                for n in np.diff([0, *checkpoints]):
                    start = process_time()
                    side.run(int(n))
                    spent += process_time() - start
                    shares.append((counted(h, side, built, others) == counts).mean())
                row(method, h.name, *(figure(share, ".3f") for share in shares), f"{1e3 * spent / steps:.2f}")


if __name__ == "__main__":
    main()
