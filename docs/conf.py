"""Sphinx settings of the documentation: `make docs`."""

from sdw_fast.version import __version__

project = "sdw_fast"
author = "The sdw_fast authors"
copyright = author
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"sdw_fast {release}"
html_show_sourcelink = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_use_ivar = True
napoleon_use_rtype = False
