"""Settings of the documentation site; `make docs` builds it. Pages are listed in index.md."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from voxelscale import __version__

project = "Voxelscale"
author = "The Voxelscale authors"
copyright = author
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "site_pages"]
exclude_patterns = ["_ext"]

# The same Markdown is read on the code host: links to headings work in both.
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # an included page may begin at a deeper heading

highlight_language = "text"
default_role = "py:obj"
smartquotes = False  # two hyphens are an option
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"ArrayLike": "ArrayLike", "NDArray": "NDArray"}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Nothing is loaded from elsewhere when a page is read: Furo has the system's fonts and its own scripts.
html_theme = "furo"
html_title = f"Voxelscale {__version__}"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
