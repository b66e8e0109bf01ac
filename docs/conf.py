"""The documentation site: ``make docs`` builds it into docs/_build/html, without a network."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import flowvi  # noqa: E402

project = "flowvi"
author = "the flowvi authors"
project_copyright = "the flowvi authors"
release = version = flowvi.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinxcontrib.bibtex",
    "docstrings",
    "listings",
    "mathml",
    "public_names",
]
exclude_patterns = ["_build", "_templates", "_measured", "tables", "gallery/*.ipynb", "gallery/*.py", "gallery/*.md5"]
templates_path = ["_templates"]
nitpicky = True
# References to types of the hosts and in signatures may be missing. References within flowvi may not.
nitpick_ignore_regex = [
    (r"py:.*", r"(jax|numpyro|torch|pyro|numpy|np|pandas|matplotlib|rich|collections|typing|abc)\..*"),
    (r"py:data", r"flowvi\..*"),  # constants are not in the reference
    (
        r"py:class",
        r"flowvi\.(assignment|baselines|estimated|estimators\.flow|estimators\.relaxed|surfaces|numpyro\.describe|pyro\.jit)\..*",
    ),  # nor are the base classes of public ones
    (r"py:(class|data)", r"[\w.]*(Array|ArrayLike|Any|Callable|Literal|Mapping|Sequence|Tensor|ndarray|ScoreParts)"),
]

html_theme = "furo"
html_title = "flowvi"
html_static_path = ["_static"]
html_css_files = ["flowvi.css"]
html_math_renderer = "mathml"
html_copy_source = False
pygments_style = "default"
pygments_dark_style = "monokai"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings describe the arguments
autodoc_preserve_defaults = True
autosummary_ignore_module_all = False
autosummary_imported_members = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # describes attributes once, with their class

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"
bibtex_reference_style = "author_year"

copybutton_selector = "div:not(.highlight-diff) > div.highlight pre"  # no copy button at a diff
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "backreferences_dir": "gallery/backreferences",
    "doc_module": ("flowvi",),
    "filename_pattern": r"plot_\w+\.py$",
    "ignore_pattern": r"(^|/)(?!plot_)\w+\.py$",
    "download_all_examples": False,
    "thumbnail_size": (560, 560),
    "image_srcset": ["2x"],
    "write_computation_times": False,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 1,
    "abort_on_example_error": True,
}
