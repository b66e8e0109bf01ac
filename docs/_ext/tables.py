"""``{tables}``: every table that the benchmarks wrote, docs/tables/*.md, in alphabetical order."""

from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

TABLES = "tables"


class Tables(SphinxDirective):
    """The directive."""

    def run(self):
        self.env.note_reread()  # a new file is no dependency yet
        holder = nodes.Element()
        for path in sorted((Path(self.env.srcdir) / TABLES).glob("*.md")):
            self.state.nested_parse(path.read_text().splitlines(), self.content_offset, holder, match_titles=True)
        return holder.children


def setup(app):
    app.add_directive("tables", Tables)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
