"""How the pages are built: make docs. Sphinx reads Markdown by MyST and docstrings by autodoc and napoleon."""

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

html_theme = "furo"
html_title = f"clipup {release}"
html_copy_source = False
html_show_copyright = False
