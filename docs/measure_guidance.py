"""The outputs on docs/guidance.md: recommend, check_program and gradient_report on a regression on scikit-learn's data.

python docs/measure_guidance.py [--smoke]

They are printed and written to docs/_measured/. About three minutes.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI
from sklearn.datasets import load_breast_cancer

from flowvi import LR
from flowvi.numpyro import TraceFlow_ELBO, adaptive, check_program, gradient_report, recommend

numpyro.enable_x64()
HERE = Path(__file__).parent
FEATURES = 5

x, y = load_breast_cancer(return_X_y=True)
x = jnp.asarray((x - x.mean(0)) / x.std(0))[:, :FEATURES]
y = jnp.asarray(y)


def model(x, y):
    with numpyro.plate("features", FEATURES):
        w = numpyro.sample("w", dist.Normal(0.0, 2.0))
        k = numpyro.sample("k", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Bernoulli(logits=x @ (w * k)).to_event(1), obs=y)


def rounded(x, y):
    with numpyro.plate("features", FEATURES):
        w = numpyro.sample("w", dist.Normal(0.0, 2.0))
        k = numpyro.sample("k", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Bernoulli(logits=x @ (jnp.round(w) * k)).to_event(1), obs=y)


def guide(x, y):
    loc = numpyro.param("loc", jnp.zeros(FEATURES))
    scale = numpyro.param("scale", jnp.full(FEATURES, 0.3), constraint=dist.constraints.positive)
    logits = numpyro.param("logits", jnp.zeros(FEATURES))
    with numpyro.plate("features", FEATURES):
        numpyro.sample("w", dist.Normal(loc, scale))
        numpyro.sample("k", dist.Bernoulli(logits=logits))


def watch(advice, chunks, steps):
    """A fit in chunks, with a report at the end of each: the signal-to-noise ratio of each parameter's gradient."""
    elbo = TraceFlow_ELBO(estimators=advice.estimators, **advice.options)
    svi = SVI(model, adaptive(guide, elbo), numpyro.optim.Adam(0.02), elbo)
    state, lines = None, ["| Steps | Loss | loc | scale | logits |", "| --- | --- | --- | --- | --- |"]
    for chunk in range(chunks):
        result = svi.run(jax.random.key(chunk), steps, x, y, init_state=state, progress_bar=False)
        state = result.state
        report = gradient_report(
            model, guide, x, y, estimators=advice.estimators, params=result.params, num_samples=200, options=advice.options
        )
        snr = {p.parameter: f"{p.snr:.2g}" for p in report.parameters}
        loss = np.mean(result.losses[-100:])
        lines.append(f"| {(chunk + 1) * steps} | {loss:.1f} | {snr['loc']} | {snr['scale']} | {snr['logits']} |")
    return "\n".join(lines) + "\n"


def write(name, text):
    (HERE / "_measured" / f"{name}.md").write_text(text)
    print(f"{name}\n\n{text}")


def code(record):
    return f"```text\n{record}\n```\n"


def main(seconds=100.0, chunks=5, steps=400):
    advice = recommend(model, guide, x, y, seconds=seconds, progress_bar=False)
    write("recommended", code(advice))
    write("rounded", code(check_program(rounded, guide, x, y, estimators={"k": LR()}, seconds=20)))
    write("watched", watch(advice, chunks, steps))


if __name__ == "__main__":
    if "--smoke" in sys.argv:
        print(check_program(rounded, guide, x, y, estimators={"k": LR()}, seconds=5))
    else:
        main()
