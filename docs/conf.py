"""The documentation site. `sphinx-build -W --keep-going -c docs . site` builds it, and fails on a warning or a broken link.

The source folder is the repository, so that a relative link between pages is right on GitHub and on the site.
"""

import re
import sys
import textwrap
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.utils import new_document
from latex2mathml.converter import convert
from myst_parser.parsers.sphinx_ import MystParser


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project = "modeling-sumagg"
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "examples/*.md", "examples/**/*.md"]
exclude_patterns = [".venv*", "build", "site", "runs"]
# Pages link to the tables that the benchmarks wrote. Those begin below a title and are in no table of contents.
suppress_warnings = ["toc.not_included", "myst.header"]
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = project
html_math_renderer = "mathml"
html_copy_source = False
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example):\n((?:(?:    .*)?\n)+)", re.MULTILINE)
REFERENCE = re.compile(r"\[`~?([\w.]+)`\]")


def docstring_as_markdown(lines: list[str]) -> str:
    """Sections as transformers writes them become a bold title with a list, and [`Name`] becomes code."""

    def section(match: re.Match) -> str:
        title, body = match[1], textwrap.dedent(match[2]).strip("\n")
        if title in ("Args", "Attributes", "Raises"):
            # An entry begins at the margin, and its other lines are indented.
            body = "\n".join(line if line[:1] in ("", " ") else f"- {line}" for line in body.splitlines())
        return f"\n**{title}**\n\n{body}\n\n"

    text = SECTION.sub(section, "\n".join(lines) + "\n")
    return REFERENCE.sub(lambda match: f"{{py:obj}}`~.{match[1]}`", text)


class Markdown(Directive):
    """Parses its content as Markdown, in which the docstrings are written."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        document = new_document(self.state.document["source"], self.state.document.settings)
        MystParser().parse("\n".join(self.content), document)
        return document.children


def wrap_docstring(app, what, name, obj, options, lines):
    if what == "data":
        # A constant has the docstring of its type.
        lines.clear()
        return
    text = docstring_as_markdown(lines)
    lines[:] = [".. markdown::", "", *textwrap.indent(text, "   ").splitlines(), ""]


def typeset(self, node):
    """An equation as MathML, which a browser shows without a script."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    self.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def redirect_to_first_page(app, exception):
    Path(app.outdir, "index.html").write_text('<meta http-equiv="refresh" content="0; url=docs/index.html">\n')


def setup(app):
    app.add_directive("markdown", Markdown)
    app.add_html_math_renderer("mathml", (typeset, None), (typeset, None))
    app.connect("autodoc-process-docstring", wrap_docstring)
    app.connect("build-finished", redirect_to_first_page)
