"""`python -m llmlab` and the `llmlab` script."""

from llmlab.cli.app import main

if __name__ == "__main__":
    main()
