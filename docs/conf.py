"""The documentation site: `python -m sphinx --fail-on-warning docs docs/_build`. `tools/` makes the generated pages."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "tools")]

import hvdtrain  # noqa: E402 - the clone that these pages belong to

project = "hvdtrain"
author = "the authors of hvdtrain"
copyright = author
version = release = hvdtrain.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "directives"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "tools"]
nitpicky = False

# Docstrings are written with one backtick around code, and with types in their annotations.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
add_module_names = False
autodoc_preserve_defaults = True
smartquotes = False  # `--train.steps` in a sentence keeps its two dashes

html_theme = "furo"
html_title = f"hvdtrain {version}"
html_copy_source = False
html_show_sphinx = False
