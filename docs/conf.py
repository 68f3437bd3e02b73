"""Sphinx settings. `sphinx-build -W -b html docs docs/_build` writes pages that need no network to be read.

Formulas become MathML when the pages are built, through the converter that comes with docutils: the
usual extension would load a JavaScript library from another host each time a page is opened. Browsers
draw MathML themselves. A formula the converter does not know is a warning, and `-W` makes it an error.
"""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

from minitransformer import __version__

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.writers.html5 import HTML5Translator

project = "minitransformer"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"

html_theme = "furo"
html_title = "minitransformer"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["math.css"]
html_copy_source = False
html_show_copyright = False

logger = logging.getLogger(__name__)


def mathml(node: nodes.math | nodes.math_block, *, as_block: bool) -> str:
    """The formula as MathML, or its source behind a warning."""
    try:
        return tex2mathml(node.astext(), as_block=as_block)
    except MathError as error:
        logger.warning("formula %r: %s", node.astext(), error, location=node)
        return html.escape(node.astext())


def visit_math(self: HTML5Translator, node: nodes.math) -> None:
    self.body += [
        self.starttag(node, "span", "", CLASS="math notranslate"),
        mathml(node, as_block=False),
        "</span>",
    ]
    raise nodes.SkipNode


def visit_math_block(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math notranslate"))
    if node["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body += [mathml(node, as_block=True), "</div>\n"]
    raise nodes.SkipNode


def docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Our docstrings are plain text with `code` in it: tell reStructuredText so, which reads more into them."""
    for number, line in enumerate(lines):
        parts = line.split("`")
        for i, part in enumerate(parts):
            # Between two backticks is code; elsewhere signs stand for themselves.
            parts[i] = f"``{part}``\\ " if i % 2 and part else re.sub(r"([*|_\\])", r"\\\1", part)
        lines[number] = "".join(parts)


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("autodoc-process-docstring", docstring)
