"""Docstrings write |x| for an absolute value, which reStructuredText would take for a substitution."""

import re

QUOTED = re.compile(r"(`+[^`]*`+)")  # an inline literal or a role


def escape_bars(app, what, name, obj, options, lines):
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[i] = "".join(part if part.startswith("`") else part.replace("|", r"\|") for part in QUOTED.split(line))


def setup(app):
    app.connect("autodoc-process-docstring", escape_bars)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
