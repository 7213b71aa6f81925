"""Errors that are the user's to mend: one clear sentence each, exit code 2, never a traceback.

Programming errors are not these: they keep their own types and their tracebacks.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: the message names the key, the value and file, and what was expected."""


class SettingsError(UserError):
    """All problems of a set of settings at once.

    Args:
        problems: one sentence a problem, each starting with where it stands (`file:line`, `command line`).
    """

    def __init__(self, problems: Iterable[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the nearest of the choices, or an empty string where none is near."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
