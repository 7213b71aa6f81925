"""Shared fixtures: tests never reach a model hub, and tiny runs do not fight over two cores."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
