"""Programs whose gradient the hosts' own objectives get silently wrong: the exact gradient, the host's and flowvi's.

python examples/stock/gradients.py [CASE ...] [--markdown]

With --markdown it prints the table in docs/_measured/stock.md, which docs/stock.md includes.

The programs are those of tests/test_host_bugs.py, which has their closed forms. This script runs its tests, and records the estimates
and the exact gradients with which they compare. A case has the name of its test.
"""

import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import numpyro
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import hosts  # noqa: E402
import test_host_bugs as programs  # noqa: E402

from flowvi import Auto  # noqa: E402

NUMPYRO, PYRO = hosts.HOSTS["numpyro"], hosts.HOSTS["pyro"]
CASES = {
    programs.test_numpyro_trace_elbo_has_no_score: (),
    programs.test_scale_acts_on_costs_only: (NUMPYRO, "LR", 1),
    programs.test_subsampled_plate: (NUMPYRO, "LR"),
    programs.test_observations_without_a_plate: ("LR",),
    programs.test_factor_in_the_guide: (NUMPYRO, "RP"),
    programs.test_inside_scan: ("LR",),
    programs.test_a_masked_site_drives_unmasked_costs: (NUMPYRO, "LR"),
    programs.test_renyi_bound_of_a_discrete_site: (NUMPYRO,),
    programs.test_a_plate_that_is_entered_again: (NUMPYRO, "Normal"),
    programs.test_python_numbers_in_the_model: (1,),
    programs.test_auxiliary_site_of_the_guide: (PYRO, "LR"),
    programs.test_rejection_sampled_sites_have_a_path_and_a_score: (Auto(),),
    programs.test_a_switch_inside_a_plate: (1,),
}
HEAD = ("case", "objective of the host", "exact", "host", "flowvi")


class Watch:
    """The estimates of a test, by objective, and the exact gradient with which it compares them."""

    def __init__(self):
        self.objectives, self.exact = {}, np.nan

    def estimates(self, gradients_of):
        def watched(host, elbo, *args, **options):
            name = f"{type(elbo).__name__} of {'flowvi' if type(elbo).__module__.startswith('flowvi') else type(host).__name__[:-4]}"
            self.objectives[name] = "AttributeError"  # in case it does not return
            self.objectives[name] = samples = gradients_of(host, elbo, *args, **options)
            return samples

        return watched

    def comparisons(self, z_scores):
        def watched(samples, exact):
            self.exact = exact
            return z_scores(samples, exact)

        return watched


def row(test, arguments):
    """One row of the table: the case, the host's objective, and the three gradients."""
    watch = Watch()
    with (
        patch.object(hosts.NumPyroHost, "gradients_of", watch.estimates(hosts.NumPyroHost.gradients_of)),
        patch.object(hosts.PyroHost, "gradients_of", watch.estimates(hosts.PyroHost.gradients_of)),
        patch.object(hosts, "z_scores", watch.comparisons(hosts.z_scores)),
        patch.object(programs, "z_scores", watch.comparisons(programs.z_scores)),
    ):
        test(*arguments)
    ours = next(samples for name, samples in watch.objectives.items() if name.endswith("of flowvi"))
    objective, theirs = [item for item in watch.objectives.items() if not item[0].endswith("of flowvi")][-1]
    exact = ", ".join(f"{g:.3f}" for g in np.atleast_1d(watch.exact))
    return test.__name__.removeprefix("test_"), objective, exact, shown(theirs), shown(ours)


def shown(samples):
    """The mean of the samples and its standard error, element by element."""
    if isinstance(samples, str):
        return samples
    errors = samples.std(0) / np.sqrt(len(samples))
    return ", ".join(f"{mean:.3f} ± {error:.3f}" for mean, error in zip(samples.mean(0), errors, strict=True))


def main(*names, markdown=False):
    numpyro.enable_x64()
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")  # NumPyro warns about a missing plate in one case
    cases = {test.__name__.removeprefix("test_"): (test, arguments) for test, arguments in CASES.items()}
    if unknown := [name for name in names if name not in cases]:
        sys.exit(f"unknown case {unknown[0]!r}; the cases are: {', '.join(cases)}")
    rows = [HEAD, *(row(*cases[name]) for name in cases if not names or name in names)]
    if markdown:
        lines = [HEAD, ("---", "---", "---:", "---:", "---:"), *((f"`{case}`", *cells) for case, *cells in rows[1:])]
        print("\n".join("| " + " | ".join(cells) + " |" for cells in lines))
    else:
        widths = [max(len(cells[i]) for cells in rows) for i in range(len(HEAD))]
        print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in rows))


if __name__ == "__main__":
    names = [argument for argument in sys.argv[1:] if argument != "--markdown"]
    main(*names, markdown="--markdown" in sys.argv)
