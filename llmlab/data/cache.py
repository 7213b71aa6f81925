"""Where tokenized corpora and rendered rows are cached, and the number of worker processes."""

import os
import sys
from pathlib import Path

from llmlab.settings.paths import expand


def cache_folder(cache_dir: str | None) -> Path:
    """Returns the folder of tokenized corpora and rendered rows."""
    base = cache_dir or os.environ.get("LLMLAB_CACHE") or Path.home() / ".cache" / "llmlab"
    return expand(base) / "corpora"


def cores() -> int:
    """Returns the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
