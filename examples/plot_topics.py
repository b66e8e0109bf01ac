"""
A topic model with whole numbers
================================

How many words of a text belong to each topic? There is a Poisson site for each topic and text, and a Poisson for the
counts of the words. A Poisson has no pathwise gradient. ``MeasureValued()`` compares the cost at each number with the
cost at the next one. This example uses NumPyro.
"""

# %%
# The texts are the docstrings of functions in seven of SciPy's modules. A word counts if it is in at least 20 of them, and
# in at most a fifth.

import inspect
import re
import sys
from collections import Counter
from importlib import import_module

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI

from flowvi import LR, MeasureValued, plot
from flowvi.numpyro import TraceFlow_ELBO

MODULES = ("cluster.hierarchy", "integrate", "linalg", "ndimage", "optimize", "signal", "stats")
documents = {}
for module in MODULES:
    for name, member in vars(import_module(f"scipy.{module}")).items():
        if not name.startswith("_") and callable(member) and len(text := inspect.getdoc(member) or "") > 400:
            documents[f"{module}.{name}"] = Counter(re.findall(r"[a-z]{4,}", text.lower()))
spread = Counter(word for words in documents.values() for word in words)
WORDS = sorted(word for word, n in spread.items() if 20 <= n <= len(documents) / 5)
COUNTS = jnp.array([[words[word] for word in WORDS] for words in documents.values()], float)
print(f"{len(documents)} texts, {len(WORDS)} words")

# %%
# The topics are parameters. A network in the guide gives the rates of z, the numbers of each text.

TOPICS, BATCH = 7, 32
STEPS = 3 if "--smoke" in sys.argv else 1200


def positive(name, initial):
    return numpyro.param(name, initial, constraint=dist.constraints.positive)


def first_topics(key):
    return jax.random.dirichlet(key, jnp.ones(len(WORDS)), (TOPICS,))


def model(counts):
    topics = numpyro.param("topics", first_topics, constraint=dist.constraints.simplex)
    rate = positive("rate", jnp.full(TOPICS, 10.0))
    with numpyro.plate("texts", len(counts), subsample_size=BATCH):
        batch = numpyro.subsample(counts, event_dim=1)
        z = numpyro.sample("z", dist.Poisson(rate).to_event(1))
        numpyro.sample("words", dist.Poisson(z @ topics + 1e-2 / len(WORDS)).to_event(1), obs=batch)


def guide(counts):
    weights = numpyro.param("weights", lambda key: 0.1 * jax.random.normal(key, (len(WORDS), TOPICS)))
    with numpyro.plate("texts", len(counts), subsample_size=BATCH):
        batch = numpyro.subsample(counts, event_dim=1)
        share = jax.nn.softmax(jnp.log1p(batch) @ weights)
        numpyro.sample("z", dist.Poisson(batch.sum(-1, keepdims=True) * share + 0.1).to_event(1))


RUNS = {"LR()": LR(), "MeasureValued()": MeasureValued()}
fits = {}
for label, estimator in RUNS.items():
    elbo = TraceFlow_ELBO(estimators={"z": estimator})
    print(f"{label}: {elbo.describe(model, guide, COUNTS).evaluations} evaluations of the program")
    svi = SVI(model, guide, numpyro.optim.Adam(0.01), elbo)
    fits[label] = svi.run(jax.random.key(0), STEPS, COUNTS, progress_bar=False)

# %%
# Top: the losses. Bottom: the share of each topic in each module, and the words that are typical of the topic.

fitted = fits["MeasureValued()"].params
share = jax.nn.softmax(jnp.log1p(COUNTS) @ fitted["weights"])
of_module = np.array([share[np.array([name.startswith(module) for name in documents])].mean(0) for module in MODULES]).T
order = np.argsort(of_module.argmax(1))
lift = fitted["topics"] * jnp.log(fitted["topics"] / fitted["topics"].mean(0))
titles = [", ".join(WORDS[i] for i in np.argsort(-np.asarray(row))[:3]) for row in lift]
plt.rcParams.update(plot.STYLE)
figure = plt.figure(figsize=(5.5, 6.6))
above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(2, 3))[:, 0]
upper, lower = above.subplots(), below.subplots()
window = max(1, STEPS // 30)
for label, fit in fits.items():
    upper.plot(np.convolve(fit.losses / len(COUNTS), np.ones(window) / window, "valid"), label=label)
upper.set(xlabel="step", ylabel=f"-ELBO in nats per text,\nmean over {window} steps")
upper.legend()
shown = lower.imshow(of_module[order], vmin=0.0, aspect="auto")
below.colorbar(shown, ax=lower, label="share of the words")
lower.set_yticks(range(TOPICS), [titles[i] for i in order])
lower.set_xticks(range(len(MODULES)), [module.split(".")[-1] for module in MODULES], rotation=30, ha="right")
plt.show()

# %%
# MeasureValued gets 40 nats per text lower than LR, whose score has no baseline with one particle. Most topics belong to
# one of SciPy's modules, although the model does not know the modules. One topic has the words of all texts.
