"""Variance and time of RP with learned control variates, at the optimum of a mean-field guide.

The program is a logistic regression on breast cancer with 31 weights. The optimum of the guide comes from quadrature (scipy). There the
coefficients of the control variate are learned, with a fixed guide and a step size that falls to a hundredth. The variance of the
gradient is summed over the locations and the logarithms of the scales. The table also has the largest ratio that a quadratic model can
reach, with the best coefficients by least squares on samples of the exact gradient; also with scales a tenth smaller or larger. The
step times include all training, and the two sides run in turn.

The second table (``--study guide``) has whole guides, with a control variate for each site or one for the whole guide. Guide and
coefficients are learned together, with a step size that falls to a hundredth. A variance is summed over the elements of a parameter.
The gains are the median and the smallest over the parameters, relative to RP at the same guide. They are from NumPyro; Pyro has the
same gradients. The third table (``--study pyro``) has the CPU times of steps in Pyro, by SVI and by CompiledSVI, all sides in turn.
The fourth one (``--study large``) has regressions on hundreds of correlated features, where the matrix of the model for the whole
guide is diagonal plus low rank. About twenty minutes:

    python benchmarks/control_variate.py
    python benchmarks/control_variate.py --smoke
    python benchmarks/control_variate.py --study pyro
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
import numpyro.infer
import pyro
import pyro.infer
from convergence import PyroSide, in_turn
from programs import HOSTS, NumPyro, Program, Pyro, eight_schools, hierarchical_regression, logistic_regression, mean_field
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer
from tables import figure, options, table
from timing import STEPS, NumPyroSteps, alternate, median_interval, use_one_thread, verdict
from torch._inductor.utils import fresh_cache

from flowvi import RP
from flowvi.numpyro import adaptive
from flowvi.pyro import CompiledSVI

SIZE = 31
KINDS = ("diagonal", "quadratic", "cubic")
RATE, FALL = 0.01, 0.01  # the initial step size, and the final one relative to it
TIME_TARGET = 1.3
STUDIES = ("site", "guide", "large", "pyro")


def data() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_breast_cancer(return_X_y=True)
    return np.column_stack([np.ones(len(x)), (x - x.mean(0)) / x.std(0)]), y


def optimum() -> tuple[np.ndarray, np.ndarray]:
    """The loc and scale of the mean-field guide with the largest ELBO, by quadrature over the logit of each case."""
    x, y = data()
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()

    def loss(parameters):
        loc, scale = parameters[:SIZE], np.exp(parameters[SIZE:])
        logit = (x @ loc)[:, None] + np.sqrt(x**2 @ scale**2)[:, None] * nodes
        p = 1 / (1 + np.exp(-logit))
        elbo = (
            ((y[:, None] * logit - np.logaddexp(0, logit)) @ weights).sum()
            + parameters[SIZE:].sum()
            - 0.5 * (loc @ loc + scale @ scale)
        )
        of_loc = x.T @ ((y[:, None] - p) @ weights) - loc
        of_scale = 1 - scale**2 * (1 + (x**2).T @ ((p * (1 - p)) @ weights))
        return -elbo, -np.concatenate([of_loc, of_scale])

    found = minimize(loss, np.repeat([0.0, -2.0], SIZE), jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-13}).x
    return found[:SIZE], np.exp(found[SIZE:])


def largest_ratio(loc: np.ndarray, scale: np.ndarray, diagonal: bool, samples: int) -> float:
    """RP's variance over that with the best b and B, by least squares on half of the samples, measured on the other half."""
    x, y = data()
    eps = np.random.default_rng(0).normal(size=(2 * samples, SIZE))
    through = scale * ((y - 1 / (1 + np.exp(-(loc + scale * eps) @ x.T))) @ x - (loc + scale * eps))
    gradient = np.concatenate([through / scale, through * eps + 1], 1)
    left = []
    for i in range(SIZE):  # row i of B and b_i only affect the gradients of loc_i and scale_i
        columns = [i] if diagonal else range(SIZE)
        of_loc = np.column_stack([np.zeros(2 * samples), *(eps[:, j] / scale[i] for j in columns)])
        of_scale = np.column_stack([eps[:, i], *(eps[:, j] * eps[:, i] - (i == j) for j in columns)])
        half = slice(samples), slice(samples, None)
        pair = gradient[:, [i, SIZE + i]]
        design = [np.concatenate([of_loc[part], of_scale[part]]) for part in half]
        goal = [(pair[part] - pair.mean(0)).T.ravel() for part in half]
        coefficients = np.linalg.lstsq(design[0], goal[0], rcond=None)[0]
        residual = (goal[1] - design[1] @ coefficients).reshape(2, -1)
        left.append(residual.var(1).sum())
    return float(gradient[samples:].var(0).sum() / sum(left))


def learn(h: Any, estimator: RP, model: Any, loc: np.ndarray, scale: np.ndarray, steps: int) -> dict[str, Any]:
    """The guide's parameters, and the coefficients that were learned at the fixed guide."""
    params = {"w_loc": h.array(loc), "w_scale": h.array(scale)}

    def fixed():
        h.ppl.sample("w", h.dist.Normal(params["w_loc"], params["w_scale"]).to_event(1))

    elbo = h.flow.TraceFlow_ELBO(estimators={"w": estimator})
    if estimator.control_variate is None:
        learned = {}
    elif h is NumPyro:
        optimizer = numpyro.optim.Adam(lambda i: RATE * FALL ** (i / steps))
        svi = numpyro.infer.SVI(model, adaptive(fixed, elbo), optimizer, elbo)
        learned = svi.run(jax.random.key(0), steps, progress_bar=False).params
    else:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        optimizer = pyro.optim.ClippedAdam({"lr": RATE, "lrd": FALL ** (1 / steps), "clip_norm": float("inf")})
        svi = pyro.infer.SVI(model, fixed, optimizer, elbo)
        for _ in range(steps):
            svi.step()
        learned = {"w.control_variate": pyro.param("w.control_variate").detach()}
    if h is not NumPyro:
        pyro.clear_param_store()
        for name, value in {**params, **learned}.items():
            pyro.param(name, value, constraint=h.dist.constraints.positive if name == "w_scale" else h.dist.constraints.real)
    return {**params, **learned}


def variance(h: Any, estimator: RP, loc: np.ndarray, scale: np.ndarray, steps: int, samples: int) -> float:
    model, guide, _ = logistic_regression(h, h.dist.Normal)
    params = learn(h, estimator, model, loc, scale, steps)
    report = partial(h.flow.gradient_report, model, guide, estimators={"w": estimator}, num_samples=samples)
    found = report(params=params) if h is NumPyro else report()
    return float(sum(record.variance.sum() for record in found.parameters))


def side(h: Any, estimator: RP) -> Any:
    model, guide, _ = logistic_regression(h, h.dist.Normal)
    elbo = h.flow.TraceFlow_ELBO(estimators={"w": estimator})
    return STEPS[h](Program(model, adaptive(guide, elbo) if h is NumPyro else guide), elbo)


# Whole guides.

PROGRAMS = {
    "eight schools": eight_schools,
    "hierarchical regression": hierarchical_regression,
    "logistic regression": logistic_regression,
}
WHOLE = {
    "quadratic, each site": {"default": RP(control_variate="quadratic")},
    "quadratic, whole guide": {"control_variate": "quadratic"},
    "cubic, each site": {"default": RP(control_variate="cubic")},
    "cubic, whole guide": {"control_variate": "cubic"},
}
GAIN_TARGET = 5


def is_learned(name: str) -> bool:
    """Whether this is a parameter of the control variate."""
    return name.endswith((".control_variate", ".directions"))


def gains(program: Program, choice: dict[str, Any], steps: int, samples: int) -> np.ndarray:
    """RP's variance over that of an objective with the options ``choice``, for each parameter, after a fit."""
    model, guide, _ = program
    elbo = NumPyro.flow.TraceFlow_ELBO(**choice)
    optimizer = numpyro.optim.Adam(lambda i: RATE * FALL ** (i / steps))
    params = numpyro.infer.SVI(model, adaptive(guide, elbo), optimizer, elbo).run(jax.random.key(0), steps, progress_bar=False).params
    variances = []
    for of_side in (choice, {}):
        default, rest = of_side.get("default", RP()), {name: value for name, value in of_side.items() if name != "default"}
        known = params if of_side else {name: value for name, value in params.items() if not is_learned(name)}
        report = NumPyro.flow.gradient_report(model, guide, params=known, default=default, options=rest, num_samples=samples)
        variances.append([record.variance.sum() for record in report.parameters])
    return np.array(variances[1]) / np.array(variances[0])


LARGE = {
    "diagonal": {"default": RP(control_variate="diagonal")},
    "full matrix": {"default": RP(control_variate="quadratic")},
    "diagonal plus low rank": {"control_variate": "quadratic"},
}


def correlated_regression(size: int, cases: int = 600, factors: int = 5) -> Program:
    """Logistic regression on features of which half of the variance is that of a few factors; generated."""
    h, rng = NumPyro, np.random.default_rng(0)
    common = rng.normal(size=(cases, factors)) @ rng.normal(size=(factors, size)) / np.sqrt(factors)
    x = np.sqrt(0.5) * (common + rng.normal(size=(cases, size)))
    labels = h.array(rng.uniform(size=cases) < 1 / (1 + np.exp(-x @ rng.normal(size=size) / np.sqrt(size))))
    features = h.array(x.T)

    def model():
        w = h.ppl.sample("w", h.dist.Normal(h.array(np.zeros(size)), 1.0).to_event(1))
        h.ppl.sample("y", h.dist.Bernoulli(logits=w @ features).to_event(1), obs=labels)

    def guide():
        h.ppl.sample("w", mean_field(h, h.dist.Normal, "w", size).to_event(1))

    return Program(model, guide)


def large_sites(options_given: Any, steps: int, samples: int, rounds: int, duration: float) -> None:
    about = f"Variance of RP's gradient over that with the control variate, after {steps} steps, and times of a step over RP's."
    columns = ("features", "matrix of the model", "coefficients", "gain in loc", "gain in scale", "time / RP's")
    with table("large_control_variate", options_given, columns, about) as row:
        for size in (200, 500) if not options_given.smoke else (200,):
            for kind, choice in LARGE.items():
                made = correlated_regression(size)
                found = gains(made, choice, steps, samples)
                elbos = [NumPyro.flow.TraceFlow_ELBO(**of_side) for of_side in (choice, {})]
                sides = [NumPyroSteps(Program(made.model, adaptive(made.guide, e)), e) for e in elbos]
                times = alternate(*sides, rounds, duration)
                row(size, kind, num_learned(made, choice), *map(figure, found), spread(times[:, 0] / times[:, 1]))


def num_learned(program: Program, choice: dict[str, Any]) -> int:
    """The number of coefficients."""
    elbo = NumPyro.flow.TraceFlow_ELBO(**choice)
    svi = numpyro.infer.SVI(program.model, adaptive(program.guide, elbo), numpyro.optim.Adam(RATE), elbo)
    return sum(value.size for name, value in svi.get_params(svi.init(jax.random.key(0))).items() if is_learned(name))


def whole_guides(options_given: Any, steps: int, samples: int, rounds: int, duration: float) -> None:
    about = "Variance of RP's gradient over that with the control variate, target 5 at the median, and times of a step, target 1.3."
    columns = ("program", "control variate", "median gain", "smallest gain", "", "NumPyro: time / RP's")
    with table("joint_control_variate", options_given, columns, about) as row:
        for name, program in list(PROGRAMS.items())[: 1 if options_given.smoke else None]:
            for kind, choice in WHOLE.items():
                made = program(NumPyro, NumPyro.dist.Normal)
                found = gains(made, choice, 4 * steps, samples)
                elbos = [NumPyro.flow.TraceFlow_ELBO(**of_side) for of_side in (choice, {})]
                times = alternate(*(NumPyroSteps(Program(made.model, adaptive(made.guide, e)), e) for e in elbos), rounds, duration)
                met = "met" if np.median(found) >= GAIN_TARGET else "missed"
                row(name, kind, figure(np.median(found)), figure(found.min()), met, spread(times[:, 0] / times[:, 1]))


def spread(ratios: np.ndarray) -> str:
    return "{:.2f} ({:.2f} .. {:.2f})".format(*median_interval(ratios))


def pyro_steps(options_given: Any, rounds: int, duration: float) -> None:
    about = "CPU times of a step over those of RP by the same SVI, target 1.3; the last column is over RP's by pyro.infer.SVI."
    columns = ("program", "control variate", "SVI: time / RP's", "CompiledSVI: time / RP's", "CompiledSVI / SVI with RP")
    kinds = (pyro.infer.SVI, CompiledSVI)
    with fresh_cache(), table("joint_control_variate_pyro", options_given, columns, about) as row:
        for name, program in list(PROGRAMS.items())[: 1 if options_given.smoke else None]:
            if not options_given.wants(name):
                continue
            made, choices = program(Pyro, Pyro.dist.Normal), {"": {}, **WHOLE}
            sides = [PyroSide(made, Pyro.flow.TraceFlow_ELBO(**choice), svi) for choice in choices.values() for svi in kinds]
            times = in_turn(sides, rounds, duration).reshape(rounds, len(choices), len(kinds))
            for i, kind in enumerate(WHOLE, 1):
                row(
                    name,
                    kind,
                    spread(times[:, i, 0] / times[:, 0, 0]),
                    spread(times[:, i, 1] / times[:, 0, 1]),
                    figure(np.median(times[:, i, 1] / times[:, 0, 0])),
                )


def main(argv: list[str] | None = None) -> None:
    options_given = options(__file__, __doc__, argv, STUDIES)
    use_one_thread()
    steps, samples, rounds, duration = (20, 40, 2, 0.002) if options_given.smoke else (5000, 2000, 30, 0.05)
    studies = {
        "site": lambda: one_site(options_given, steps, samples, rounds, duration),
        "guide": lambda: whole_guides(options_given, steps, samples, rounds, duration),
        "large": lambda: large_sites(options_given, steps, samples, rounds, duration),
        "pyro": lambda: pyro_steps(options_given, rounds // 2, duration),
    }
    for study in [options_given.study] if options_given.study else STUDIES:
        studies[study]()


def one_site(options_given: Any, steps: int, samples: int, rounds: int, duration: float) -> None:
    loc, scale = optimum()
    about = "Variance of the gradient at the optimum, summed over the parameters; time of a step, in turn with RP; target 1.3."
    bounds = ("of the best quadratic one", "with scales 10 % smaller", "10 % larger")
    columns = ("host", "control variate", "variance", "RP's / variance", *bounds, "time / RP's", "95% interval", "")
    with table("control_variate", options_given, columns, about) as row:
        for h in HOSTS:
            of_rp = variance(h, RP(), loc, scale, steps, samples)
            row(h.name, "none", figure(of_rp), "1", "", "", "", "1", "", "")
            for kind in KINDS:
                estimator = RP(control_variate=kind)
                found = variance(h, estimator, loc, scale, steps, samples)
                ratios = (largest_ratio(loc, c * scale, kind == "diagonal", 10 * samples) for c in (1, 0.9, 1.1))
                limits = [figure(ratio) for ratio in ratios] if kind != "cubic" else ["", "", ""]
                times = alternate(side(h, estimator), side(h, RP()), rounds, duration)
                median, low, high = median_interval(times[:, 0] / times[:, 1])
                met = verdict(TIME_TARGET, median, low)
                row(h.name, kind, figure(found), figure(of_rp / found), *limits, f"{median:.2f}", f"{low:.2f} .. {high:.2f}", met)


if __name__ == "__main__":
    main()
