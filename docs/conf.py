"""The documentation site: Sphinx with MyST Markdown, and an extension of gradlab's own. `gradlab docs` builds it."""

import sys
from pathlib import Path

from gradlab._common.provenance import __version__

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "gradlab"
author = "The gradlab developers"
copyright = author
release = version = __version__

extensions = ["myst_parser", "sphinx_design", "sphinx_copybutton", "results", "api", "mathml"]
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
exclude_patterns = ["_extensions"]

html_theme = "furo"
html_title = "gradlab"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
# A page opened from disk may not fetch others, which a summary below each result would need.
html_show_search_summary = False
html_math_renderer_name = "mathml"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#00577e", "color-brand-content": "#00577e", "color-link": "#00577e"},
    "dark_css_variables": {"color-brand-primary": "#7cc4ea", "color-brand-content": "#7cc4ea", "color-link": "#7cc4ea"},
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
