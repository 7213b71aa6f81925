"""`python -m llmlab` and the `llmlab` script."""

import gc

gc.disable()  # nothing of what is imported is garbage; `main` turns the collector on again
from llmlab.cli.app import main  # noqa: E402

if __name__ == "__main__":
    main()
