"""Sphinx: Markdown pages by MyST, executed notebooks by myst-nb, the theme furo. `make docs` builds them, strictly."""

import re
import shutil
from pathlib import Path

HERE = Path(__file__).parent

project = "llmlab"
author = copyright = "the llmlab authors"
extensions = ["myst_nb"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "llmlab"
html_copy_source = False
highlight_language = "sh"  # of blocks that name none: commands
myst_heading_anchors = 3  # as GitHub makes them
nb_execution_mode = "off"  # their outputs are committed
nb_merge_streams = True  # progress is one block, not one a line
linkcheck_ignore = [r"https?://"]  # pages and files of the checkout are checked, the network is not needed

# notebooks lie beside the other examples, and Sphinx reads what is in its own folder
(HERE / "notebooks").mkdir(exist_ok=True)
for notebook in (HERE.parent / "examples").glob("*.ipynb"):
    shutil.copy(notebook, HERE / "notebooks")


def leave_docs(app, name, source):
    """Turns links that GitHub understands into what Sphinx does: notebooks are pages, other files are downloads."""
    text = re.sub(r"\]\(\.\./examples/(\w+\.ipynb)\)", r"](notebooks/\1)", source[0])
    source[0] = re.sub(r"\]\((\.\./[\w/]+\.md)(#[\w-]+)?\)", r"](path:\1)", text)


def setup(app):
    app.connect("source-read", leave_docs)
