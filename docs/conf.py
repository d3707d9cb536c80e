"""Sphinx configuration of `make docs`: Markdown by MyST, docstrings by autodoc and napoleon."""

from clipup_kernels import _version

project = "clipup"
author = "the clipup authors"
release = _version.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

smartquotes = False  # it would turn the two hyphens of options into a dash

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_title = f"clipup {release}"
html_copy_source = False
html_show_copyright = False


def setup(app):
    app.connect("autodoc-process-docstring", _keep_colons, priority=400)  # before napoleon, which has 500


def _keep_colons(app, what, name, obj, options, lines):
    """Keeps text before a colon, which napoleon would read as a type, in the first line of an attribute's docstring and
    under Returns. An escaped space, which renders as nothing, is inserted before that line."""
    if what in ("attribute", "property"):
        lines.insert(0, "\\ ")
    if "Returns:" in lines:
        lines.insert(lines.index("Returns:") + 1, "    \\ ")
