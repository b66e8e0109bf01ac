"""``recommend`` and ``check_program`` for Pyro."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from time import perf_counter
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO

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
    are_apart,
    batch_size,
    objective,
    plates,
    statements,
)
from flowvi.guidance.candidates import guide_sites
from flowvi.objectives import described
from flowvi.particles import Particles
from flowvi.pyro.arguments import Arguments
from flowvi.pyro.compiled import CompiledLoss
from flowvi.pyro.elbo import TraceFlow_ELBO
from flowvi.pyro.generators import seed_generators
from flowvi.pyro.handlers import share_subsamples
from flowvi.pyro.host import HOST, as_found
from flowvi.pyro.module import unconstrained
from flowvi.pyro.run import PyroProgram, programs
from flowvi.run import Held, Run
from flowvi.tape import follows_tensors

LARGEST = 8  # batch of gradients
STEPS = 50  # a batch is so small that there is time for this many batches at each site
WARM_UP, WARM_UP_SHARE, RATE = 300, 0.1, 0.05  # steps of Adam on what an estimator learns, at most for this share of the time
FASTER = 0.8  # hint at compiled steps if they take less than this share of the time
PARTICLES = 4  # of a gradient that is checked
TRIES, SEEDS = 50, 100  # how many runs to try for one with a site, and the distance of their seeds


def recommend(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_particles: int | tuple[int, ...] = 1,
    seconds: float = 60.0,
    seed: int = 0,
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

    **Requirements**: as for :func:`gradient_report`. Parameters are read from the parameter store, which is not changed.

    Args:
        model: The model.
        guide: The guide.
        *args: Passed to both.
        num_particles: The number of particles, or several to choose from, such as ``(1, 4, 16)``.
        seconds: The time limit. A short limit may be exceeded; if no time was left for a site, the advice says so.
        seed: The seed of every candidate; the state of torch's generator is restored.
        progress_bar: Whether to show a progress bar.
        **kwargs: Passed to model and guide.

    Returns:
        A :class:`flowvi.guidance.Recommendation`, which prints as a table. Its ``estimators`` and ``options`` are arguments of
        :class:`TraceFlow_ELBO`.

    Raises:
        ValueError: Naming the site, if the program cannot run with the default estimators.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from flowvi.pyro import TraceFlow_ELBO, recommend
        >>> def model():
        ...     k = pyro.sample("k", dist.Categorical(probs=torch.ones(4) / 4))
        ...     pyro.sample("y", dist.Normal(1.0 * k, 1.0), obs=torch.tensor(2.0))
        >>> def guide():
        ...     pyro.sample("k", dist.Categorical(logits=pyro.param("l", torch.zeros(4))))
        >>> pyro.clear_param_store()
        >>> advice = recommend(model, guide, seconds=3, progress_bar=False)
        >>> list(advice.estimators), sorted(advice.options)
        (['k'], ['entropy', 'num_particles'])
        >>> elbo = TraceFlow_ELBO(estimators=advice.estimators, **advice.options)
        >>> pyro.clear_param_store()

    References:
        Parmas and Sugiyama 2021, eq. 19. Karnin, Koren and Somekh 2013 (successive halving). McCandlish et al. 2018, section 2.2
        (signal and noise).
    """
    with Watch(seconds, progress_bar) as clock, PyroBench.opened(model, guide, args, kwargs, None, Auto(), seed, seconds) as bench:
        return advise(Search(bench, num_particles, clock), seconds, PARTICLES)


def check_program(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    estimators: Estimators = None,
    default: Estimator = Auto(),  # noqa: B008
    confidence: float = 0.999,
    seconds: float = 60.0,
    seed: int = 0,
    progress_bar: bool = False,
    **kwargs: Any,
) -> ProgramCheck:
    r"""Check that no site's estimator is biased on this program: :math:`E[g_s] = E[g_{\mathrm{LR}}]` for each site s.

    For each site, the mean gradient with the site's estimator is compared with the mean under ``LR()``, which is right whatever the
    cost does. The check finds jumps, hidden derivatives (``detach``, rounding), angles without a period, a field that crosses a
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
        seed: The seed of all draws; the state of torch's generator is restored.
        progress_bar: Whether to show a progress bar.
        **kwargs: Passed to model and guide.

    Returns:
        A :class:`flowvi.guidance.ProgramCheck`, which prints as a table: for each site whether its estimator is biased, where in the
        cost the bias comes from, and how small a bias would have been found.

    Raises:
        ValueError: Naming the site; see the estimators.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from flowvi.pyro import check_program
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.factor("cost", torch.where(x > 0.5, 4.0, 0.0))
        >>> def guide():
        ...     pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.2)), 1.0))
        >>> pyro.clear_param_store()
        >>> check = check_program(model, guide, seconds=10)
        >>> [(one.site, one.place.statement, round(one.place.x, 3)) for one in check.failed]
        [('x', "statement 'cost'", 0.5)]
        >>> pyro.clear_param_store()

    References:
        Parmas and Sugiyama 2021, eq. 19. Lan and DeMets 1983 (alpha spending).
    """
    with (
        Watch(seconds, progress_bar) as clock,
        PyroBench.opened(model, guide, args, kwargs, estimators, default, seed, seconds) as bench,
    ):
        return Checker(bench, Setting(num_particles=PARTICLES), confidence, clock).run(seconds)


class PyroBench:
    """See :class:`flowvi.guidance.Bench`."""

    def __init__(self, model, guide, args, kwargs, estimators, default, seed, seconds=math.inf):
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.seconds = seconds
        self.given, self.default, self.seed = estimators, default, seed
        self.elbo = TraceFlow_ELBO(estimators=estimators, default=default)
        self.trained = set(pyro.get_param_store().keys())  # keep what an estimator has already learned
        with poutine.trace(param_only=True) as used:
            run = self.run(self.elbo, 0)
        nodes: dict[str, Any] = used.trace.nodes
        frames = (frame for of in (run.guide, run.model) for statement in of.values() for frame in statement.frames)
        self.plate_nesting = 1 + max((-frame.dim for frame in frames), default=0)  # with the plate of particles
        self.marginalises = bool(run.marginalised)
        self.sites = guide_sites(HOST, run, described(run, self.elbo.dependencies))  # a second run may draw other sites
        self.leaves = {name: unconstrained(nodes[name]["value"]) for name in nodes if name not in run.sites.learned}
        self.parameters = {name: leaf.numel() for name, leaf in self.leaves.items()}
        start = perf_counter()
        self.run(self.elbo, 0)
        gradients = seconds / (2 * (perf_counter() - start))  # a derivative takes about as long as the run
        affordable = gradients / (STEPS * (1 + len(self.sites)))
        self.size = batch_size(sum(self.parameters.values()), int(min(LARGEST, affordable)))

    @classmethod
    @contextmanager
    def opened(cls, model, guide, args, kwargs, *options) -> Iterator[PyroBench]:
        """A bench that restores the gradients of the parameters, and what :func:`as_found` restores."""
        with as_found(model, guide, args, kwargs, options):
            bench = cls(model, guide, args, kwargs, *options)
            store: Any = pyro.get_param_store()
            leaves = [*bench.leaves.values(), *(store[name].unconstrained() for name in bench.trained)]
            gradients = [leaf.grad for leaf in leaves]
            for leaf in leaves:
                leaf.grad = None  # nothing is added to the user's gradients
            try:
                yield bench
            finally:
                for leaf, gradient in zip(leaves, gradients, strict=True):
                    leaf.grad = gradient

    @cached_property
    def drawn(self) -> tuple[tuple[Particles, bool], ...]:
        ways: tuple[Particles, ...] = ("independent", "stratified", "antithetic")
        return ("independent", False), *((how, True) for how in ways if self.supports_plate)

    @cached_property
    def supports_plate(self) -> bool:
        """Whether particles may be a plate: each then has the log densities that it has alone, with the same values at all sites."""
        with suppress(Exception), share_subsamples():  # a program that does not support the plate may fail in any way
            alone = [self.run(self.elbo, number) for number in range(LARGEST)]
            elbo = self._objective(Setting(num_particles=LARGEST, vectorized=True))
            (program,) = programs(elbo, self.model, self.guide, self.args, self.kwargs)
            together = elbo._run(program).again(_in_plate(alone, elbo.max_plate_nesting))
            densities = [{name: HOST.numpy(s.log_density) for name, s in statements(run).items()} for run in (together, *alone)]
            return are_apart(densities[1:], densities[0], elbo.max_plate_nesting)
        return False

    def gradients(self, setting: Setting) -> Draw:
        elbo = self._objective(setting)
        learned = {} if setting.of_host else self._learned(elbo)
        of_adam = seconds_of_adam([*self.leaves.values(), *learned.values()])

        def draw(number: int) -> Batch:
            leaves = {**self.leaves, **self._restored(learned)}
            rows, seconds = [], 0.0
            for i in range(self.size):
                seed_generators(self._seed(number * self.size + i))
                self._clear(leaves)
                start = perf_counter()
                with poutine.trace(param_only=True):  # as in SVI.step
                    elbo.loss_and_grads(self.model, self.guide, *self.args, **self.kwargs)
                seconds += perf_counter() - start
                rows.append(np.concatenate([_row(leaf) for leaf in self.leaves.values()] or [np.zeros(0)]))
            return Batch(np.stack(rows), seconds / self.size + of_adam)

        elbo.loss_and_grads(self.model, self.guide, *self.args, **self.kwargs)  # runs the checks; a first step takes longer
        return draw

    def hints(self, setting: Setting, seconds: float) -> tuple[str, ...]:
        """Whether compiled steps would be faster; the backend ``"eager"`` compiles without delay."""
        if not set(self.leaves) <= set(pyro.get_param_store().keys()):
            return ()  # a module's parameters are not in the store
        compiled = CompiledLoss(self._objective(setting), self.model, self.guide, "eager")
        with suppress(Exception):  # no hint for a program that cannot be traced, for whatever reason
            arguments = Arguments.of(self.args, self.kwargs)
            compiled.prepare(arguments, tuple(self.leaves))
            compiled(arguments)
            times = []
            for _ in range(LARGEST):
                start = perf_counter()
                compiled(arguments)
                times.append(perf_counter() - start)
            if (share := min(times) / seconds) < FASTER:
                hint = f'CompiledSVI(..., backend="eager") takes {share:.2g} of the time of a step'
                return (f"time: {hint}; its default backend is usually faster still",)
        return ()

    def probe(self, site: str) -> PyroProbe:
        return PyroProbe(self, site)

    def run(self, elbo: TraceFlow_ELBO, number: int) -> Run:
        seed_generators(self._seed(number))
        follows = follows_tensors(elbo.dependencies)
        return elbo._run(PyroProgram(self.model, self.guide, self.args, self.kwargs, elbo, follows))

    def _objective(self, setting: Setting) -> Any:
        of_host = (Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO)
        elbo = objective(self, setting, TraceFlow_ELBO, of_host, self.given, self.default)
        if setting.vectorized and not self.marginalises:  # otherwise Pyro guesses the nesting
            elbo.max_plate_nesting = self.plate_nesting
        return elbo

    def _seed(self, number: int) -> int:
        return (self.seed * 1_000_003 + number) % 2**63

    @staticmethod
    def _clear(leaves: Mapping[str, torch.Tensor]) -> None:
        for leaf in leaves.values():
            leaf.grad = None

    def _learned(self, elbo: TraceFlow_ELBO) -> dict[str, torch.Tensor]:
        """What estimators learn in some steps, at fixed parameters of the program; what is already trained stays."""
        store: Any = pyro.get_param_store()
        self._restored({})
        names = self.run(elbo, 0).sites.learned
        learned: dict[str, Any] = {name: store[name].unconstrained() for name in names}
        if moving := {name: leaf for name, leaf in learned.items() if name not in self.trained}:
            optimizer = torch.optim.Adam(list(moving.values()), RATE)
            start = perf_counter()
            for i in range(WARM_UP):
                if perf_counter() - start > WARM_UP_SHARE * self.seconds:
                    break
                seed_generators(self._seed(-1 - i))
                self._clear({**self.leaves, **learned})
                elbo.loss_and_grads(self.model, self.guide, *self.args, **self.kwargs)
                optimizer.step()
        return {name: leaf.detach().clone() for name, leaf in learned.items()}

    def _restored(self, learned: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Store the learned parameters of one candidate, with these values, and delete those of other candidates from the store."""
        store: Any = pyro.get_param_store()
        for name in set(store.keys()) - self.trained - set(self.leaves):
            del store[name]
        leaves = {name: store.setdefault(name, value.clone()).unconstrained() for name, value in learned.items()}
        for name, leaf in leaves.items():
            leaf.data.copy_(learned[name])
        return leaves


class PyroProbe:
    """See :class:`flowvi.guidance.Probe`."""

    def __init__(self, bench: PyroBench, site: str):
        self.bench, self.site = bench, site
        first = bench.run(bench.elbo, 0)
        self.plates: Mapping[str, Mapping[str, int]] = plates(first, site)
        self.event_ndim = len(first.guide[site].fn.event_shape)

    def value(self, seed: int) -> np.ndarray:
        return HOST.numpy(self._run(seed).guide[self.site].value).copy()

    def densities(self, seed: int, values: np.ndarray) -> dict[str, np.ndarray]:
        run = self._run(seed)
        rows = [self._at(run, self._like(run, value)) for value in values]
        return {name: np.stack([HOST.numpy(row[name]) for row in rows]) for name in rows[0]}

    def slopes(self, seed: int, value: np.ndarray) -> dict[str, np.ndarray]:
        run = self._run(seed)
        x = self._like(run, value).requires_grad_()
        slopes = {}
        for name, density in self._at(run, x).items():
            total = density.sum()
            (slope,) = torch.autograd.grad(total, [x], retain_graph=True, allow_unused=True) if total.requires_grad else (None,)
            slopes[name] = np.zeros_like(value) if slope is None else HOST.numpy(slope)
        return slopes

    def _run(self, seed: int) -> Run:
        """A run with the statements of the first one, since another branch may not draw the site."""
        for number in (*range(seed, TRIES * SEEDS, SEEDS), 0):
            run = self.bench.run(self.bench.elbo, number)
            if self.site in run.guide and plates(run, self.site) == self.plates:
                break
        return run

    def _like(self, run: Run, value: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(value).to(run.guide[self.site].value)

    def _at(self, run: Run, x: torch.Tensor) -> dict[str, Any]:
        again = run.again({**held_values(HOST, run), self.site: Held(x)})
        return {name: torch.as_tensor(s.log_density) for name, s in statements(again).items()}


def _in_plate(alone: list[Run], num_dims: int) -> dict[str, Held]:
    """The values of all random sites in some runs of one particle, as they are in a plate of these particles."""

    def stacked(rows: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.stack([x.reshape((1,) * (num_dims - 1 - batch_ndim) + x.shape) for x in rows])

    first, held = alone[0], {}
    values = [held_values(HOST, run) for run in alone]
    for name in values[0]:
        batch_ndim = first.guide[name].value.ndim - len(first.guide[name].fn.event_shape)
        rows, bases = zip(*(of_run[name] for of_run in values), strict=True)
        held[name] = Held(stacked(rows), None if bases[0] is None else stacked(bases))
    for name, of_model in first.model.items():  # what only the model draws
        if not (of_model.observed or name in first.guide or name in first.marginalised):
            batch_ndim = of_model.value.ndim - len(of_model.fn.event_shape)
            held[name] = Held(stacked([run.model[name].value for run in alone]))
    return held


def seconds_of_adam(leaves: list[torch.Tensor]) -> float:
    """The time of a step of Adam, one optimizer for each parameter as in Pyro, on copies of them."""
    copies = [torch.zeros_like(leaf, requires_grad=True) for leaf in leaves]
    optimizers = [torch.optim.Adam([copy]) for copy in copies]
    times = []
    for _ in range(LARGEST):
        for copy in copies:
            copy.grad = torch.ones_like(copy)
        start = perf_counter()
        for optimizer in optimizers:
            optimizer.step()
        times.append(perf_counter() - start)
    return min(times)


def _row(leaf: torch.Tensor) -> np.ndarray:
    return np.zeros(leaf.numel()) if leaf.grad is None else leaf.grad.to_dense().reshape(-1).cpu().double().numpy().copy()
