"""Both hosts behind one interface, so that a program and its test are written once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions
import numpyro.handlers
import pyro
import pyro.distributions
import pytest
import torch
from pyro.distributions.testing.fakes import NonreparameterizedNormal

import flowvi.numpyro
import flowvi.ops.jax
import flowvi.ops.torch
import flowvi.pyro
from flowvi.numpyro.distributions import NumPyroTarget
from flowvi.pyro.distributions import PyroTarget


def at_least(package: str, *release: int) -> bool:
    """Whether the installed version of a package is that release or a later one."""
    return tuple(map(int, version(package).split("+")[0].split(".")[: len(release)])) >= release


@dataclass(frozen=True)
class Program:
    """A guide and a model over parameters ``t``, a list of numbers (Pyro: of tensors, one number for each replicate).

    Attributes:
        guide: ``guide(h, t)``.
        model: ``model(h, t)``.
        theta: The values at which the gradient is taken.
        plates: The number of plate dims of the program.
    """

    guide: Callable[[Any, list], None]
    model: Callable[[Any, list], None]
    theta: tuple[float, ...]
    plates: int = 0


def chain(theta, sites: Mapping[str, Callable], costs: Mapping[str, Callable]) -> Program:
    """Sites in program order, ``(h, t, values) -> distribution``, and the costs recorded after them, ``(h, t, values) -> number``."""

    def guide(h, t):
        values = {}
        for name, distribution in sites.items():
            values[name] = h.sample(name, distribution(h, t, values).mask(False))

    def model(h, t):
        values = {}
        for name, distribution in sites.items():
            values[name] = h.sample(name, distribution(h, t, values).mask(False))
            if name in costs:
                h.factor(f"cost_{name}", costs[name](h, t, values))

    return Program(guide, model, tuple(np.atleast_1d(theta)))


class ScoreNormal(numpyro.distributions.Normal):
    """A Normal that NumPyro treats as not reparameterized."""

    reparametrized_params: ClassVar = []


class NumPyroHost:
    name = "numpyro"
    library = numpyro
    handlers = numpyro.handlers
    score_normal = ScoreNormal
    dist = numpyro.distributions
    kl_divergence = staticmethod(numpyro.distributions.kl_divergence)
    negative_binomial = staticmethod(numpyro.distributions.conjugate.NegativeBinomial)  # not exported by NumPyro 0.19
    math = jnp
    flow = flowvi.numpyro
    ops = flowvi.ops.jax
    target = NumPyroTarget
    sample = staticmethod(numpyro.sample)
    factor = staticmethod(numpyro.factor)
    scale = staticmethod(lambda factor: numpyro.handlers.scale(scale=factor))
    param = staticmethod(numpyro.param)
    polygamma = staticmethod(jax.scipy.special.polygamma)
    random_gamma_grad = staticmethod(jax.lax.random_gamma_grad)

    @staticmethod
    def array(x):
        return jnp.asarray(x, float)

    @staticmethod
    def integers(x):
        return jnp.asarray(x)

    @staticmethod
    def index(k):
        """The draws of a discrete site as an integer index."""
        return k

    @staticmethod
    def numpy(x):
        return np.asarray(x)

    @staticmethod
    def plate(name, size, dim=-1, subsample_size=None):
        return numpyro.plate(name, size, subsample_size, dim)

    @staticmethod
    def over_plate(x):
        """The sum over the innermost plate."""
        return x.sum(-1)

    @staticmethod
    def components(fn, shape):
        """A mixture's components, for logits of this shape."""
        return fn

    def substitute(self, values):
        """A handler that sets parameters to these values."""
        return numpyro.handlers.substitute(data={name: self.array(value) for name, value in values.items()})

    @staticmethod
    def draw(fn, shape=(), seed=0):
        return fn.sample(jax.random.key(seed), shape)

    def value_and_gradient(self, f, parameters, has_aux=False):
        """Like ``jax.value_and_grad`` at named parameters, with the gradient as NumPy arrays."""
        parameters = {name: self.array(value) for name, value in parameters.items()}
        value, gradient = jax.value_and_grad(f, has_aux=has_aux)(parameters)
        return value, {name: np.asarray(gradient[name]) for name in parameters}

    @staticmethod
    def loss(elbo, model, guide, seed=0):
        return elbo.loss(jax.random.key(seed), {}, model, guide)

    @staticmethod
    def differentiable_loss(elbo, model, guide, seed=0):
        return elbo.loss(jax.random.key(seed), {}, model, guide)

    def loss_and_gradients(self, params, model, guide, seed=0, plates=None, **options):
        """The loss and its gradients by name, with ``plates`` plate dims. A parameter not in ``params`` has its initial value."""
        elbo = self.flow.TraceFlow_ELBO(**options)
        loss, gradients = self.value_and_gradient(lambda params: elbo.loss(jax.random.key(seed), params, model, guide), params)
        return float(loss), gradients

    @staticmethod
    def evaluate(elbos, model, guide, seed=0):
        """Loss and gradients of each objective, at the initial parameters and with the same random numbers."""
        traces = [numpyro.handlers.trace(numpyro.handlers.seed(part, 0)).get_trace() for part in (guide, model)]
        params = {name: site["value"] for trace in traces for name, site in trace.items() if site["type"] == "param"}

        def evaluate(params):
            return [jax.value_and_grad(lambda p, e=e: e.loss(jax.random.key(seed), p, model, guide))(params) for e in elbos]

        return jax.jit(evaluate)(params)

    @staticmethod
    def svi(model, guide, elbo, rate=0.03):
        return numpyro.infer.SVI(model, guide, numpyro.optim.Adam(rate), elbo)

    @staticmethod
    def fit(svi, steps, **options):
        """The losses and the final parameters. Compiling the initialization is faster."""
        state = jax.jit(svi.init)(jax.random.key(0))
        result = svi.run(jax.random.key(1), steps, **{"progress_bar": False, "init_state": state, **options})
        return np.asarray(result.losses), result.params

    def gradients(self, program, n, seed=0, particles=1, vectorize=True, value=False, **options):
        """``n`` estimates of the gradient of the ELBO, of shape (n, len(theta)); with ``value`` also of the ELBO, (n,)."""
        return self.gradients_of(self.flow.TraceFlow_ELBO(particles, vectorize, **options), program, n, seed, value)

    def bound_gradients(self, program, n, seed=0, alpha=0.0, particles=2, vectorize=True, value=False, **options):
        """Like ``gradients``, for the Rényi bound."""
        bound = self.flow.TraceFlow_RenyiELBO(alpha, particles, vectorize_particles=vectorize, **options)
        return self.gradients_of(bound, program, n, seed, value)

    def gradients_with(self, program, n, choose, seed=0, **options):
        """As ``gradients``, with estimators ``choose(host, t)`` that read the parameters."""

        def estimate(key, theta):
            t = list(theta)
            elbo = self.flow.TraceFlow_ELBO(estimators=choose(self, t), **options)
            return -elbo.loss(key, {}, lambda: program.model(self, t), lambda: program.guide(self, t))

        keys = jax.random.split(jax.random.key(seed), n)
        return np.asarray(jax.jit(jax.vmap(jax.grad(estimate, 1), (0, None)))(keys, jnp.array(program.theta)))

    def gradients_of(self, elbo, program, n, seed=0, value=False):
        """Like ``gradients``, for any objective, also the host's own."""

        def estimate(key, theta):
            def objective(theta):
                t = list(theta)
                return -elbo.loss(key, {}, lambda: program.model(self, t), lambda: program.guide(self, t))

            return objective(theta) if value else jax.grad(objective)(theta)

        keys = jax.random.split(jax.random.key(seed), n)
        return np.asarray(jax.jit(jax.vmap(estimate, (0, None)))(keys, jnp.array(program.theta)))


def taken_gradients():
    """The gradients of Pyro's parameters by name. It resets them to None, because those of a module outlive the parameter store."""
    found = {}
    for name, parameter in pyro.get_param_store().named_parameters():
        found[name], parameter.grad = parameter.grad.numpy(), None
    return found


class PyroHost:
    name = "pyro"
    library = pyro
    handlers = pyro.poutine
    score_normal = NonreparameterizedNormal
    dist = pyro.distributions
    negative_binomial = pyro.distributions.NegativeBinomial
    kl_divergence = staticmethod(torch.distributions.kl_divergence)
    math = torch
    flow = flowvi.pyro
    ops = flowvi.ops.torch
    target = PyroTarget
    sample = staticmethod(pyro.sample)
    factor = staticmethod(pyro.factor)
    scale = staticmethod(lambda factor: pyro.poutine.scale(scale=factor))
    param = staticmethod(pyro.param)
    polygamma = staticmethod(torch.polygamma)
    random_gamma_grad = staticmethod(torch._standard_gamma_grad)

    @staticmethod
    def array(x):
        return torch.as_tensor(x, dtype=torch.get_default_dtype())

    @staticmethod
    def integers(x):
        return torch.as_tensor(x)

    @staticmethod
    def index(k):
        return k.long()

    @staticmethod
    def numpy(x):
        return x.detach().numpy()

    @staticmethod
    def plate(name, size, dim=-1, subsample_size=None):
        return pyro.plate(name, size, subsample_size, dim=dim)

    @staticmethod
    def over_plate(x):
        """The sum keeps the plate's dim, because the replicates are to its left."""
        return x.sum(-1, keepdims=True)

    @staticmethod
    def components(fn, shape):
        return fn.expand(shape)

    def substitute(self, values):
        return pyro.poutine.substitute(data={name: self.array(value) for name, value in values.items()})

    @staticmethod
    def draw(fn, shape=(), seed=0):
        pyro.set_rng_seed(seed)
        return fn.sample(shape)

    def value_and_gradient(self, f, parameters, has_aux=False):
        leaves = {name: self.array(value).clone().requires_grad_() for name, value in parameters.items()}
        value = f(leaves)
        gradients = torch.autograd.grad(value[0] if has_aux else value, list(leaves.values()), materialize_grads=True)
        return value, {name: g.numpy() for name, g in zip(leaves, gradients, strict=True)}

    @staticmethod
    def loss(elbo, model, guide, seed=0):
        pyro.set_rng_seed(seed)
        return elbo.loss(model, guide)

    @staticmethod
    def differentiable_loss(elbo, model, guide, seed=0):
        pyro.set_rng_seed(seed)
        return elbo.differentiable_loss(model, guide)

    def loss_and_gradients(self, params, model, guide, seed=0, plates=None, **options):
        if plates is not None:
            options["max_plate_nesting"] = plates
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        for name, value in params.items():
            pyro.param(name, self.array(value))
        loss = self.flow.TraceFlow_ELBO(**options).loss_and_grads(model, guide)
        return loss, {name: pyro.param(name).grad.numpy() for name in params}

    @staticmethod
    def evaluate(elbos, model, guide, seed=0):
        results = []
        for elbo in elbos:
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            loss = elbo.loss_and_grads(model, guide)
            results.append((loss, taken_gradients()))
        return results

    @staticmethod
    def svi(model, guide, elbo, rate=0.03):
        return pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": rate}), elbo)

    @staticmethod
    def fit(svi, steps):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        losses = np.array([svi.step() for _ in range(steps)])
        return losses, {name: p.detach().clone() for name, p in pyro.get_param_store().items()}

    def gradients(self, program, n, seed=0, particles=1, vectorize=True, value=False, **options):
        """Like in NumPyro; each estimate is an element of an outermost plate with its own copy of theta."""
        nesting = 1 + program.plates
        elbo = self.flow.TraceFlow_ELBO(particles, max_plate_nesting=nesting, vectorize_particles=vectorize, **options)
        return self.gradients_of(elbo, program, n, seed, value)

    def bound_gradients(self, program, n, seed=0, alpha=0.0, particles=2, vectorize=True, value=False, **options):
        """Like ``gradients``, for the Rényi bound; the replicates are a plate that every statement shares."""
        nesting = 1 + program.plates
        bound = self.flow.TraceFlow_RenyiELBO(alpha, particles, nesting, vectorize_particles=vectorize, **options)
        return self.gradients_of(bound, program, n, seed, value)

    def gradients_with(self, program, n, choose, seed=0, **options):
        """As ``gradients``, with estimators ``choose(host, t)`` that read the parameters."""
        estimators = {}

        def guide(h, t):
            estimators.update(choose(h, t))
            program.guide(h, t)

        elbo = self.flow.TraceFlow_ELBO(
            estimators=lambda site: estimators[site["name"]], max_plate_nesting=1 + program.plates, **options
        )
        return self.gradients_of(elbo, replace(program, guide=guide), n, seed)

    def gradients_of(self, elbo, program, n, seed=0, value=False):
        leaf = self.array(program.theta).expand(n, -1).clone().requires_grad_()

        def run(part):
            t = [leaf[:, i].reshape((n,) + (1,) * program.plates) for i in range(len(program.theta))]
            with pyro.plate("replicates", n, dim=-1 - program.plates):
                part(self, t)

        pyro.set_rng_seed(seed)
        evaluate = getattr(elbo, "differentiable_loss", elbo.loss_and_grads)  # Pyro's TraceGraph_ELBO has no differentiable_loss
        loss = evaluate(lambda: run(program.model), lambda: run(program.guide))
        if value:
            return np.full(n, -float(torch.as_tensor(loss).detach()) / n)
        if isinstance(loss, torch.Tensor):
            loss.backward()
        return -leaf.grad.numpy()


HOSTS = {"numpyro": NumPyroHost(), "pyro": PyroHost()}


def each(argnames, values, slow_in_numpyro=lambda value: False, hosts=lambda value: HOSTS):
    """Parametrizes a test by ``host`` and by ``values``, a sequence or a mapping whose keys are the ids.

    In NumPyro a test spends most of its time in compilation. Rows that are slow there run in Pyro only, unless slow tests are selected.
    """
    named = values.items() if isinstance(values, Mapping) else ((str(value), value) for value in values)
    parameters = [
        pytest.param(
            HOSTS[host],
            *((value,) if isinstance(argnames, str) else value),
            id=f"{host}-{name}",
            marks=[pytest.mark.slow] if host == "numpyro" and slow_in_numpyro(value) else [],
        )
        for name, value in named
        for host in hosts(value)
    ]
    return pytest.mark.parametrize(("host", *((argnames,) if isinstance(argnames, str) else argnames)), parameters)


slow_in_numpyro = pytest.mark.parametrize(
    "host", [pytest.param(HOSTS["numpyro"], id="numpyro", marks=pytest.mark.slow), pytest.param(HOSTS["pyro"], id="pyro")]
)  # for a test without other values; see :func:`each`

slow_in_pyro = pytest.mark.parametrize(
    "host", [pytest.param(HOSTS["numpyro"], id="numpyro"), pytest.param(HOSTS["pyro"], id="pyro", marks=pytest.mark.slow)]
)  # for a test that draws one sample after the other in Pyro


def always(value):
    return True


def z_scores(samples, exact, variance=None):
    """z-scores of the mean of ``samples`` (n, dim), with the exact ``variance`` or the sample variance, in double precision."""
    samples = np.asarray(samples, np.float64)
    if variance is None:
        standard_error = samples.std(0) / np.sqrt(len(samples)) + 1e-12
    else:
        standard_error = np.sqrt(np.maximum(np.asarray(variance), 1e-12) / len(samples))
    return (samples.mean(0) - np.asarray(exact)) / standard_error


def expected_under(program, host, exact, n=40_000, **options):
    """Assert that the mean of ``n`` estimates is the exact gradient."""
    samples = host.gradients(program, n, **options)
    assert np.all(np.abs(z_scores(samples, exact)) < 5), (samples.mean(0), exact)
    return samples
