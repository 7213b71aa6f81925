"""Renders pages from the templates beside this module: one file, no scripts, nothing loaded, all text escaped."""

import os
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from llmlab import __version__
from llmlab.settings.errors import printable
from llmlab.settings.files import is_number, write_atomically
from llmlab.terminal import duration, human, short_number


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Writes a page of a template (`run.html`) with these values, and returns its path."""
    write_atomically(path, _environment().get_template(template).render(values, page=path))
    return path


def link(page: Path, target: Path) -> str:
    """Returns the reference from a page to another file where that exists, else an empty text."""
    here = os.path.realpath(page.parent)  # a browser knows nothing of links in the path that a folder was named by
    return quote(os.fsencode(os.path.relpath(os.path.realpath(target), here))) if target.is_file() else ""


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("llmlab.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters |= {"number": _number, "duration": duration, "human": human}
    environment.globals |= {"link": link, "version": __version__, "Ellipsis": ...}
    return environment


def _number(value: Any) -> str:
    """Returns a number as tables show it, anything else as text, and a dash for nothing."""
    if value is None or value == "":
        return "–"
    return short_number(value) if is_number(value) else str(value)
