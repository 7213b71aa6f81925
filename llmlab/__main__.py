"""`python -m llmlab` and the `llmlab` script."""

import gc


def main() -> None:
    """Runs the command line; what it imports is no garbage to collect, and `run` turns the collector on again."""
    gc.disable()
    from llmlab.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
