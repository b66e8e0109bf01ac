"""``flowvi.plot``: the numbers in the figures against closed forms, in both hosts."""

import matplotlib
import numpy as np
import pyro
import pytest
import torch
from hosts import slow_in_numpyro
from matplotlib import pyplot as plt
from processes import run
from scipy import stats

from flowvi import LR, RP, Auto, Flow, ImplicitRP, fields, plot, proposals
from flowvi.host import host_of
from flowvi.plot.arguments import paths
from flowvi.plot.flows import carry

matplotlib.use("agg")

LOC, SCALE = 0.3, 0.8
X = np.linspace(-2.0, 3.0, 7)
HALF = Flow(loc=lambda x, p: 0.5, scale=lambda x, p: 0.5 * (x - p.loc) / p.scale)


@pytest.fixture(autouse=True)
def _closed():
    before = dict(plt.rcParams)
    yield
    assert dict(plt.rcParams) == before
    plt.close("all")
    assert not plt.get_fignums()


@pytest.fixture
def normal(host):
    return host.dist.Normal(host.array(LOC), host.array(SCALE))


def lines(ax):
    return {line.get_label(): np.stack(line.get_data()) for line in ax.lines}


def carried(p, parameter, estimator, x, **options):
    host = host_of(p)
    (path,) = paths(host, p, parameter)
    return carry(host, path.move, estimator, x, 0.5, **options)


def close(found, expected, atol=1e-10):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_velocity_of_a_normal(host, normal):
    """u = a u_RP and psi = (1 - a) score."""
    blend = {"LR": 0.0, "half": 0.5, "implicit": 1.0, "RP": 1.0}
    figure = plot.velocity(normal, {"LR": LR(), "half": HALF, "implicit": ImplicitRP(), "RP": RP()}, x=X)
    for j, name in enumerate(("loc", "scale")):
        assert figure.axes[j].get_title() == name
        u, psi = lines(figure.axes[j]), lines(figure.axes[2 + j])
        for label, a in blend.items():
            x = u[label][0]
            assert np.array_equal(x, X) == (label != "RP")  # a sampler is plotted at its own draws
            z = (x - LOC) / SCALE
            score, pathwise = ((z / SCALE, 1.0 + 0 * x), ((z**2 - 1) / SCALE, z))[j]
            close(u[label][1], a * pathwise)
            close(psi[label][1], (1 - a) * score)


@slow_in_numpyro
def test_velocity_by_name_and_by_function(host):
    """Velocities by parameter name, by a function, for derived attributes, bounds and a mixture; Auto is resolved."""
    d, a, x = host.dist, host.array, np.linspace(0.1, 0.9, 7)  # the same length for all, so that JAX compiles less
    cases = [
        (d.Beta(a(2.0), a(3.0)), "concentration1", LR(), np.log(x) - (stats.beta(2, 3).expect(np.log))),
        (d.LogNormal(a(0.1), a(0.5)), "loc", LR(), (np.log(x) - 0.1) / 0.25),
        (d.LogNormal(a(0.1), a(0.5)), "scale", Flow(fields.log_normal()), 0 * x),
        (d.Uniform(a(0.0), a(2.0)), "high", Flow(fields.uniform()), 0 * x),
        (d.VonMises(a(0.0), a(2.0)), "loc", Auto(), 2.0 * np.sin(x)),
    ]
    velocities = {"scale": x * (np.log(x) - 0.1) / 0.5, "high": x / 2}
    for p, name, estimator, psi in cases:
        figure = plot.velocity(p, estimator, name, x=x)
        close(figure.axes[0].lines[0].get_ydata(), velocities.get(name, 0 * x))
        close(figure.axes[1].lines[0].get_ydata(), psi, 1e-8)  # against a quadrature
    counts = d.Poisson(a(3.0))
    figure = plot.velocity(counts, LR(), "rate", x=np.arange(7))
    close(figure.axes[1].lines[0].get_ydata(), np.arange(7) / 3 - 1)
    assert [ax.get_title() for ax in plot.velocity(counts, LR()).axes[:1]] == ["rate"]

    def mixture(t):
        return d.MixtureSameFamily(d.Categorical(logits=host.math.stack([t, -t])), d.Normal(a([-1.0, 1.0]), a(0.7)))

    figure = plot.velocity(mixture(a(0.0)), {"field": Flow(fields.mixture()), "LR": LR()}, mixture, x=X)
    left, right = (stats.norm(m, 0.7) for m in (-1.0, 1.0))
    p = (left.pdf(X) + right.pdf(X)) / 2
    close(lines(figure.axes[0])["field"][1], -(left.cdf(X) - right.cdf(X)) / (2 * p), 1e-9)  # far out the cdf has few digits
    close(lines(figure.axes[1])["LR"][1], (left.pdf(X) - right.pdf(X)) / (2 * p))
    assert figure.axes[0].get_title() == "mixture"


@slow_in_numpyro
def test_velocity_in_two_dimensions(host):
    """If loc moves along e, RP and its field have u = e and psi = 0; LR has u = 0 and psi = e . Sigma^-1 (x - loc)."""
    tril, e = np.array([[1.0, 0.0], [0.5, 0.8]]), np.array([1.0, -2.0])

    def shifted(t):
        return host.dist.MultivariateNormal(t * host.array(e), scale_tril=host.array(tril))

    x = [np.linspace(-1.0, 1.0, 3), np.linspace(-1.0, 2.0, 4)]
    points = np.stack([a.ravel() for a in np.meshgrid(*x)], -1)
    estimators = {"LR": LR(), "field": Flow(fields.multivariate_normal()), "RP": RP()}
    figure = plot.velocity(shifted(host.array(0.0)), estimators, shifted, x=x)
    drawn = [ax.collections[0].get_array().ravel() for ax in figure.axes[:9]]
    psi = points @ np.linalg.inv(tril @ tril.T) @ e
    for found, expected in zip(drawn, (0, 0, psi, *e, 0, *e, 0), strict=True):
        close(found, expected + 0 * found)
    figure = plot.flow(shifted(host.array(0.0)), estimators, shifted, lines=5, x=x)
    arrows = figure.axes[1].collections[-1]
    close(np.stack([arrows.U, arrows.V], -1), np.broadcast_to(e, (len(arrows.U), 2)))
    assert len(plot.proposal(shifted(host.array(0.0)), LR(q=proposals.student_t(4.0)), x=x).axes) == 6


@pytest.mark.parametrize(("label", "a"), [("LR", 0.0), ("half", 0.5), ("RP", 1.0)])
def test_flow_lines(host, normal, label, a):
    """A flow line ends at x + a t, with the mass p(x + a t; loc + t) / p(x; loc)."""
    figure = plot.flow(normal, {"LR": LR(), "half": HALF, "RP": RP()}[label], "loc", by=0.5, lines=8)
    after, middle, before = figure.axes[:3]
    edges = np.array([collection.get_segments()[0][0] for collection in middle.collections])
    ends = np.array([collection.get_segments()[-1][1] for collection in middle.collections])
    close(edges[:, 0], stats.norm(LOC, SCALE).ppf(np.arange(1, 8) / 8), 0.01)  # the edges are quantiles, computed on a grid
    close(edges[:, 1], LOC)
    close(ends, np.stack([edges[:, 0] + a * 0.5, np.full(7, LOC + 0.5)], -1))
    _, mass = carried(normal, "loc", HALF, X)
    p, moved = stats.norm(LOC, SCALE), stats.norm(LOC + 0.5, SCALE)
    close(mass[-1], moved.logpdf(X + 0.25) - p.logpdf(X), 1e-6)
    x, density = before.lines[0].get_data()
    close(density, p.pdf(x))
    close(after.lines[0].get_ydata(), moved.pdf(x))


def test_single_precision():
    """Points in double precision are not mistaken for the draws of a sampler."""
    torch.set_default_dtype(torch.float32)
    p = pyro.distributions.Normal(LOC, SCALE)
    places, mass = carried(p, "loc", HALF, X)
    close(places[-1], X + 0.25, 1e-6)
    close(mass[-1], stats.norm(LOC + 0.5, SCALE).logpdf(X + 0.25) - stats.norm(LOC, SCALE).logpdf(X), 1e-5)


def test_flow_lines_of_a_sampler(host):
    """The sampler of a Gamma moves mass like the exact field; its velocity is interpolated between draws."""
    p = host.dist.Gamma(host.array(2.0), host.array(1.0))
    levels = np.linspace(0.1, 0.9, 7)
    x = stats.gamma(2.0).ppf(levels)
    places, mass = carried(p, "concentration", RP(), x, steps=2)
    close(places[-1], stats.gamma(2.5).ppf(levels), 2e-3)
    close(mass, 0)


def test_proposal(host, normal):
    figure = plot.proposal(normal, {"wide": LR(q=proposals.tempered(2.0)), "p": RP()}, x=X)
    p, q = stats.norm(LOC, SCALE).pdf(X), stats.norm(LOC, np.sqrt(2) * SCALE).pdf(X)
    densities, weights = (list(ax.lines) for ax in figure.axes)
    for line, expected in zip([*densities, *weights[:2]], (p, q, p, p / q, 1 + 0 * X), strict=True):
        close(line.get_ydata(), expected)
    low, high = plot.proposal(normal, HALF).axes[0].lines[0].get_xdata()[[0, -1]]
    close([low, high], stats.norm(LOC, SCALE).ppf([0.001, 0.999]), 0.3)


@slow_in_numpyro
def test_gradients(host, normal):
    """Samples of a blend are the blend of samples, and LR and RP have the exact mean and variance at (x - 1)^2."""
    p = host.dist.Normal(host.array(0.0), host.array(1.0))
    blend = {f"{a}": Flow(fields.scaled(a, fields.location_scale())) for a in (0.0, 0.5, 1.0)}
    n = 4000
    cost = lambda x: (x - 1) ** 2
    at_0, at_half, at_1 = (plot.gradient_samples(p, e, "loc", cost, num_samples=n) for e in blend.values())
    close(at_half, (at_0 + at_1) / 2)
    close(at_0, plot.gradient_samples(p, LR(), "loc", cost, num_samples=n))
    rp, weighted = (
        plot.gradient_samples(p, estimator, "loc", cost, num_samples=n, seed=1) for estimator in (RP(), LR(q=proposals.tempered(2.0)))
    )
    for samples, variance in ((at_0, 30.0), (at_1, 4.0), (rp, 4.0)):
        assert abs(samples.mean() + 2) < 5 * np.sqrt(variance / n)
        assert abs(samples.var() / variance - 1) < 0.3
    assert abs(weighted.mean() + 2) < 5 * weighted.std() / np.sqrt(n)
    wrong = at_0 - at_1 / 2  # the means above reject a psi with half of its velocity
    assert abs(wrong.mean() + 2) > 5 * wrong.std() / np.sqrt(n)
    figure = plot.gradients(p, blend, "loc", cost, num_samples=500)
    first = plot.gradient_samples(p, blend["0.0"], "loc", cost, num_samples=500)
    close(figure.axes[0].lines[0].get_xdata()[0], first.mean())
    assert figure.axes[0].texts[0].get_text() == f"0.0\nstd {first.std():.3g}"
    assert figure.axes[-1].get_xlabel() == "gradient in loc"


def test_refusals(host, normal):
    d, a = host.dist, host.array
    with pytest.raises(ValueError, match=r"event shape \(\) or \(2,\) without batch, found batch shape \(3,\)"):
        plot.velocity(d.Normal(a([0.0] * 3), a(1.0)), LR(), "loc")
    with pytest.raises(ValueError, match=r"event shape \(3,\)"):
        plot.proposal(d.Dirichlet(a([1.0] * 3)), LR())
    with pytest.raises(ValueError, match="Normal has no parameter 'rate'; its parameters are: loc, scale"):
        plot.velocity(normal, LR(), "rate")
    pair = d.MultivariateNormal(a([0.0, 0.0]), scale_tril=a(np.eye(2)))
    with pytest.raises(ValueError, match=r"'loc' of MultivariateNormal cannot be moved by name, expected .* found shape \(2,\)"):
        plot.flow(pair, LR(), "loc")
    with pytest.raises(ValueError, match="flow lines need a continuous distribution, but Poisson is discrete"):
        plot.flow(d.Poisson(a(2.0)), LR(), "rate")
    with pytest.raises(ValueError, match="site 'x': LR is biased where the support moves"):
        plot.velocity(d.Uniform(a(0.0), a(1.0)), LR(), "high")


def test_imports():
    """Importing flowvi or flowvi.plot imports neither matplotlib nor a host, and a missing package is named."""
    names = ("flowvi.plot", "flowvi.checks", "matplotlib", "jax", "torch", "numpy")
    loaded = f"print([name for name in {names} if sys.modules.get(name)])"
    assert run((), f"import flowvi\n{loaded}") == "[]"
    assert run((), f"import flowvi.plot\n{loaded}") == "['flowvi.plot', 'numpy']"
    assert run((), f"from flowvi import check_estimator\n{loaded}") == "['flowvi.checks', 'numpy']"
    for draw in ("plot.velocity(dist.Normal(0.0, 1.0), LR(), 'loc')", "check_estimator(dist.Normal(0.0, 1.0), LR())"):
        code = "import numpyro.distributions as dist\nfrom flowvi import LR, check_estimator, plot\ntry:\n"
        assert "import flowvi.pyro or flowvi.numpyro first" in run(
            (), f"{code}    {draw}\nexcept TypeError as error:\n    print(error)"
        )
    draw = "plot.velocity(dist.Normal(0.0, 1.0), LR(), 'loc')"
    imports = "import numpyro.distributions as dist\nimport flowvi.numpyro\nfrom flowvi import LR, plot\n"
    code = f"{imports}try:\n    {draw}\nexcept ImportError as error:\n"
    assert "pip install 'flowvi[report]'" in run(("matplotlib",), code + "    print(error.__notes__)")
