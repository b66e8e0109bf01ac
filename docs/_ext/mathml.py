"""Maths as MathML, which browsers draw without a script and a network. A formula that cannot be converted causes a warning."""

from docutils.nodes import SkipNode
from math_core import LatexError, LatexToMathML
from sphinx.util import logging

convert = LatexToMathML().convert_with_local_state
logger = logging.getLogger(__name__)


def formula(node, displaystyle):
    latex = node.astext()
    if displaystyle and r"\\" in latex and r"\begin" not in latex:
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    try:
        return convert(latex, displaystyle=displaystyle)
    except LatexError as error:
        logger.warning("formula %r: %s", latex, error, location=node)
        return ""


def visit_inline(self, node):
    self.body.append(f'<span class="math">{formula(node, displaystyle=False)}</span>')
    raise SkipNode


def visit_block(self, node):
    self.body.append(f'<div class="math">{formula(node, displaystyle=True)}</div>\n')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
