"""Settings of Sphinx; docs/build.py gathers the pages and calls it."""

import os

project = "dtlib"
author = "The dtlib authors"
copyright = "2026, the dtlib authors"
html_title = "Does pre-training help offline RL?"
root_doc = "index"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx.ext.mathjax"]
nb_execution_mode = "off"
nb_mime_priority_overrides = [("html", "text/html", 0), ("html", "image/png", 10)]
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
mathjax_path = "tex-svg.js"  # one file without fonts, copied beside the pages by build.py

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": False}
autodoc_preserve_defaults = True

html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_js_files = ["see.js"]
html_extra_path = ["extra"]  # films, which pages show by their name
exclude_patterns = ["extra"]
html_show_search_summary = False  # it would fetch pages, which a browser forbids for local files
html_copy_source = False
html_show_sourcelink = False
html_context = {"default_mode": "light"}
html_theme_options = {
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
if repository := os.environ.get("BOOK_REPOSITORY"):  # https://github.com/owner/name
    html_theme_options |= {
        "repository_url": repository,
        "use_repository_button": True,
        "repository_branch": "main",
    }
