"""The error of a refusal, and the page that explains it."""

from __future__ import annotations

PAGE = "docs/refusals.md"
# Where another page explains it better.
JUMPS = "docs/discrete.md#a-jump-of-the-cost"
LEARNED = "docs/estimators.md#learned-control-variates"
MOVING_SUPPORTS = "docs/theory.md#the-flux-condition"
PLACES = "docs/estimators.md#where-to-give-an-estimator"
RELAXATIONS = "docs/discrete.md#relaxations-which-are-biased"
SUMMED_OUT = "docs/discrete.md#sites-that-the-model-sums-out"


def refusal(site: str, message: str, page: str = PAGE) -> ValueError:
    """The error to raise at a site, with a note that names the page: the wheel does not have the pages."""
    error = ValueError(f"site '{site}': {message}")
    error.add_note(f"The reasons are in flowvi's repository: {page}")
    return error
