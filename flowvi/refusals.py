"""The error of a refusal, and the page that explains it."""

from __future__ import annotations

PAGE = "docs/refusals.md"


def refusal(site: str, message: str) -> ValueError:
    """The error to raise at a site, with a note that names the page."""
    error = ValueError(f"site '{site}': {message}")
    error.add_note(f"What flowvi refuses, and why: {PAGE}")
    return error
