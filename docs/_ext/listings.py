"""Remove the blank line at the end of examples, which doctest needs because it takes the text below for output."""

from docutils.nodes import Text, literal_block


def strip(app, doctree):
    for block in doctree.findall(literal_block):
        if block.rawsource == block.astext():  # otherwise it has markup inside
            block.rawsource = block.astext().rstrip("\n")
            block[:] = [Text(block.rawsource)]


def setup(app):
    app.connect("doctree-read", strip)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
