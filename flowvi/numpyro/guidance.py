"""``recommend`` and ``check_program`` for NumPyro."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import random
from jax.flatten_util import ravel_pytree
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO

import flowvi.ops.jax as ops
from flowvi.assignment import Estimators
from flowvi.entropy import held_values
from flowvi.estimators import Auto, Estimator
from flowvi.guidance import (
    Batch,
    Checker,
    Draw,
    ProgramCheck,
    Recommendation,
    Search,
    Setting,
    Watch,
    advise,
    batch_size,
    objective,
    plates,
    statements,
)
from flowvi.guidance.candidates import guide_sites
from flowvi.numpyro.elbo import TraceFlow_ELBO
from flowvi.numpyro.host import HOST, as_found
from flowvi.numpyro.learning import adaptive
from flowvi.numpyro.run import NumPyroProgram
from flowvi.particles import Particles
from flowvi.run import Held

LARGEST = 64  # batch of gradients
STEPS = 50  # a batch is so small that there is time for this many batches at each site
WARM_UP, RATE = 500, 0.05  # steps of Adam on what an estimator learns
POINTS = 64  # values of a site whose costs are computed at once
PARTICLES = 16  # of a gradient that is checked


def recommend(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_particles: int | tuple[int, ...] = 1,
    seconds: float = 60.0,
    params: dict[str, Any] | None = None,
    rng_key: jax.Array | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> Recommendation:
    r"""Choose the estimator of each site by measuring: the least noise times time, :math:`\overline{v_i / m_i} \cdot t`.

    :math:`v_i` is the variance of element i of the gradient in the unconstrained parameters, and t the time of a step. :math:`m_i` is
    the second moment of element i with the default estimators. An Adam step divides by its root, so every element counts in the units
    in which Adam moves it. Sites of one kind are chosen together while the other sites stay as they are; then each site by itself, if
    there is time. Bad candidates are dropped early. Estimators that learn are trained first. An estimator that :func:`check_program`
    finds biased is never recommended.

    The number of particles is that of the shortest fit: the least (signal + noise) times time, since less noise saves steps only until
    the step size limits them. The signal is the mean of :math:`g_i^2 / m_i`, and g the mean gradient.

    **Requirements**: as for :func:`gradient_report`. Each candidate is compiled; a site has about eight.

    Args:
        model: The model.
        guide: The guide.
        *args: Passed to both.
        num_particles: The number of particles, or several to choose from, such as ``(1, 4, 16)``.
        seconds: The time limit. The first compilations may exceed a short limit.
        params: Values of the (constrained) parameters, for instance ``svi_result.params``; their initial values by default.
        rng_key: The random key; every candidate gets the same one.
        progress_bar: Whether to show a progress bar.
        **kwargs: Passed to model and guide.

    Returns:
        A :class:`flowvi.guidance.Recommendation`, which prints as a table. Its ``estimators`` and ``options`` are arguments of
        :class:`TraceFlow_ELBO`.

    Raises:
        ValueError: Naming the site, if the program cannot run with the default estimators.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from flowvi.numpyro import TraceFlow_ELBO, recommend
        >>> def model():
        ...     k = numpyro.sample("k", dist.Categorical(probs=jnp.ones(4) / 4))
        ...     numpyro.sample("y", dist.Normal(1.0 * k, 1.0), obs=2.0)
        >>> def guide():
        ...     numpyro.sample("k", dist.Categorical(logits=numpyro.param("l", jnp.zeros(4))))
        >>> advice = recommend(model, guide, seconds=3, progress_bar=False)
        >>> list(advice.estimators), sorted(advice.options)
        (['k'], ['entropy', 'num_particles'])
        >>> elbo = TraceFlow_ELBO(estimators=advice.estimators, **advice.options)

    References:
        Parmas and Sugiyama 2021, eq. 19. Karnin, Koren and Somekh 2013 (successive halving). McCandlish et al. 2018, section 2.2
        (signal and noise).
    """
    with Watch(seconds, progress_bar) as clock, as_found(model, guide, args, kwargs):
        bench = NumPyroBench(model, guide, args, kwargs, None, Auto(), params, rng_key, seconds)
        return advise(Search(bench, num_particles, clock), seconds, PARTICLES)


def check_program(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    estimators: Estimators = None,
    default: Estimator = Auto(),  # noqa: B008
    confidence: float = 0.999,
    seconds: float = 60.0,
    params: dict[str, Any] | None = None,
    rng_key: jax.Array | None = None,
    progress_bar: bool = False,
    **kwargs: Any,
) -> ProgramCheck:
    r"""Check that no site's estimator is biased on this program: :math:`E[g_s] = E[g_{\mathrm{LR}}]` for each site s.

    For each site, the mean gradient with the site's estimator is compared with the mean under ``LR()``, which is right whatever the
    cost does. The check finds jumps, hidden derivatives (``stop_gradient``, rounding), angles without a period, a field that crosses a
    boundary, a baseline that reads a later draw, a wrong declaration. If the elements of a plate read each other, the reference
    multiplies every element's score by all costs. The test is sequential: it stops as soon as the result is clear.

    **Requirements**: as for :func:`gradient_report`. If the support of a site moves with a parameter, there is no reference for it.

    Args:
        model: The model.
        guide: The guide.
        *args: Passed to both.
        estimators: As for :class:`TraceFlow_ELBO`.
        default: The estimator of a site for which none is given.
        confidence: The probability that nothing is reported if every gradient is right.
        seconds: The time limit for all sites together. A limit of less than 5 seconds may be exceeded.
        params: Values of the (constrained) parameters, for instance ``svi_result.params``; their initial values by default.
        rng_key: The random key.
        progress_bar: Whether to show a progress bar.
        **kwargs: Passed to model and guide.

    Returns:
        A :class:`flowvi.guidance.ProgramCheck`, which prints as a table: for each site whether its estimator is biased, where in the
        cost the bias comes from, and how small a bias would have been found.

    Raises:
        ValueError: Naming the site; see the estimators.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from flowvi.numpyro import check_program
        >>> def model():
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.factor("cost", jnp.where(x > 0.5, 4.0, 0.0))
        >>> def guide():
        ...     numpyro.sample("x", dist.Normal(numpyro.param("m", 0.2), 1.0))
        >>> check = check_program(model, guide, seconds=10)
        >>> [(one.site, one.place.statement, round(one.place.x, 3)) for one in check.failed]
        [('x', "statement 'cost'", 0.5)]

    References:
        Parmas and Sugiyama 2021, eq. 19. Lan and DeMets 1983 (alpha spending).
    """
    with Watch(seconds, progress_bar) as clock, as_found(model, guide, args, kwargs, estimators, default):
        bench = NumPyroBench(model, guide, args, kwargs, estimators, default, params, rng_key, seconds)
        return Checker(bench, Setting(num_particles=PARTICLES), confidence, clock).run(seconds)


class NumPyroBench:
    """See :class:`flowvi.guidance.Bench`.

    Attributes:
        compiled: The gradients of each setting; the parameters are among their arguments.
    """

    drawn: tuple[tuple[Particles, bool], ...] = (("independent", False), ("stratified", False), ("antithetic", False))

    def __init__(self, model, guide, args, kwargs, estimators, default, params, rng_key, seconds=math.inf):
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.given, self.default, self.params = estimators, default, params
        self.key = random.key(0) if rng_key is None else rng_key
        self.elbo = TraceFlow_ELBO(estimators=estimators, default=default)
        self.plain = self._start(self.elbo)
        constrain, unconstrained = self.plain
        self.constrained = constrain(unconstrained)
        run = self._run(self.key)
        self.marginalises = bool(run.marginalised)
        self.sites = guide_sites(HOST, run, self.elbo._describe(model, guide, args, kwargs, params, self.key))
        self.learns_already = bool(run.sites.learned)
        of_program = {name: value for name, value in unconstrained.items() if name not in run.sites.learned}
        self.parameters = {name: ravel_pytree(of_program[name])[0].size for name in sorted(of_program)}
        self.compiled: dict[Setting, Any] = {}
        self.seconds = seconds
        self.size = batch_size(sum(self.parameters.values()), LARGEST)

    def gradients(self, setting: Setting) -> Draw:
        of_host = (Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO)
        elbo = objective(self, setting, TraceFlow_ELBO, of_host, self.given, self.default)
        learns = any(estimator.learns(ops, self.sites[name].target) for name, estimator in setting.chosen)
        constrain, unconstrained = self._start(elbo) if learns or self.learns_already else self.plain  # _start takes time
        of_program = {name: unconstrained[name] for name in self.parameters}
        learned = {name: value for name, value in unconstrained.items() if name not in of_program}
        optimizer = numpyro.optim.Adam(RATE)  # what it moves is not used: all gradients are at the same parameters

        def loss(params, key):
            return elbo.loss(key, constrain(params), self.model, self.guide, *self.args, **self.kwargs)

        def steps(of_program, learned, keys):
            def step(state, key):
                gradient = jax.grad(loss)(of_program | learned, key)
                row = jnp.concatenate([ravel_pytree(gradient[name])[0] for name in self.parameters] or [jnp.zeros(0)])
                return optimizer.update(gradient, state), row

            return jax.lax.scan(step, optimizer.init(of_program | learned), keys)

        learned = self._warmed_up(loss, of_program, learned)
        if setting not in self.compiled:
            self.compiled[setting] = jax.jit(steps).lower(of_program, learned, self._keys(0)).compile()
        compiled = self.compiled[setting]
        start = perf_counter()
        jax.block_until_ready(compiled(of_program, learned, self._keys(0)))
        of_batch = (perf_counter() - start) * STEPS * (1 + len(self.sites))
        if len(self.compiled) == 1 and of_batch > 2 * self.seconds and self.size > 2:  # too slow for the time
            self.size, self.compiled = max(2, int(self.size * self.seconds / of_batch)), {}
            return self.gradients(setting)

        def draw(number: int) -> Batch:
            keys = self._keys(number)
            start = perf_counter()
            _, gradients = jax.block_until_ready(compiled(of_program, learned, keys))
            return Batch(np.asarray(gradients, float), (perf_counter() - start) / self.size)

        return draw

    def probe(self, site: str) -> NumPyroProbe:
        return NumPyroProbe(self, site)

    def hints(self, setting: Setting, seconds: float) -> tuple[str, ...]:
        return ()

    def _keys(self, number: int) -> jax.Array:
        return random.split(random.fold_in(self.key, number % 2**31), self.size)

    def _start(self, elbo):
        """What makes the arguments of the loss from unconstrained parameters, and the initial values of these."""
        guide = adaptive(self.guide, elbo, self.model, rng_key=self.key) if isinstance(elbo, TraceFlow_ELBO) else self.guide
        svi = SVI(self.model, guide, numpyro.optim.SGD(1.0), elbo)
        state = svi.init(self.key, *self.args, init_params=self.params, **self.kwargs)
        mutable_state, constrain = state.mutable_state or {}, svi.constrain_fn
        return lambda params: constrain(params) | mutable_state, svi.optim.get_params(state.optim_state)

    def _warmed_up(self, loss, of_program, learned):
        """What estimators learn in some steps at fixed parameters of the program; what is given stays."""
        fixed = {name: value for name, value in learned.items() if self.params and name in self.params}
        moving = {name: value for name, value in learned.items() if name not in fixed}
        if not moving:
            return learned
        optimizer = numpyro.optim.Adam(RATE)

        @jax.jit
        def train(state, keys):
            def step(state, key):
                gradient = jax.grad(lambda moving: loss(of_program | fixed | moving, key))(optimizer.get_params(state))
                return optimizer.update(gradient, state), None

            return jax.lax.scan(step, state, keys)[0]

        keys = random.split(random.fold_in(self.key, 2**31 - 1), WARM_UP)
        return fixed | optimizer.get_params(train(optimizer.init(moving), keys))

    def _run(self, key):
        return self.elbo._run(NumPyroProgram(key, self.constrained, self.model, self.guide, self.args, self.kwargs))


class NumPyroProbe:
    """See :class:`flowvi.guidance.Probe`."""

    def __init__(self, bench: NumPyroBench, site: str):
        self.bench, self.site = bench, site
        first = bench._run(bench.key)
        self.plates: Mapping[str, Mapping[str, int]] = plates(first, site)
        self.event_ndim = len(first.guide[site].fn.event_shape)

        def values(seed):
            return held_values(HOST, bench._run(random.fold_in(bench.key, seed)))

        def densities(seed, value):
            again = bench._run(random.fold_in(bench.key, seed)).again({**values(seed), site: Held(value)})
            return {name: s.log_density for name, s in statements(again).items()}

        self._value = jax.jit(lambda seed: values(seed)[site].value)
        self._densities = jax.jit(jax.vmap(densities, (None, 0)))
        self._slopes = jax.jit(jax.jacrev(lambda value, seed: {name: jnp.sum(d) for name, d in densities(seed, value).items()}))

    def value(self, seed: int) -> np.ndarray:
        return np.array(self._value(seed))

    def densities(self, seed: int, values: np.ndarray) -> dict[str, np.ndarray]:
        padded = np.concatenate([values, np.repeat(values[-1:], -len(values) % POINTS, 0)])
        return {name: np.asarray(d)[: len(values)] for name, d in self._densities(seed, padded).items()}

    def slopes(self, seed: int, value: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.asarray(d) for name, d in self._slopes(jnp.asarray(value), seed).items()}
