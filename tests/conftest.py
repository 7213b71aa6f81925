"""Shared by all tests: no model hub is ever reached, and tiny runs do not fight over the cores."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# at these sizes more threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
