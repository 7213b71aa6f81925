"""Errors that the user can correct: one sentence each and exit code 2. Bugs keep their own types and tracebacks."""

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# C0 without tab and newline, DEL, C1, bidirectional overrides, line separators, lone surrogates
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# torch's words, for GPUs, CPUs and Apple's GPUs: their errors have no common type
NO_MEMORY = ("out of memory", "you tried to allocate", "can't allocate memory", "not enough memory")
LONGEST_REASON = 300  # characters of another library's message
LAUNCHED = "LLMLAB_LAUNCHED"  # the number of machines, in processes that llmlab launched: it warned before


class UserError(ValueError):
    """A mistake in the user's input: the message names the key, the value and file, and what was expected."""

    exit_code = 2


class Diverged(UserError):
    """A run whose loss, gradients or weights are no longer finite numbers; none of them was saved."""

    exit_code = 4


class Unhealthy(UserError):
    """A run that ended at a symptom in its metrics, as its settings say."""

    exit_code = 4


class OutOfMemory(UserError):
    """A run that needs more memory than there is: the message says where, and what to change."""


class OfMainProcess(UserError):
    """What another process of a distributed run already prints: this one ends in silence."""


def is_first_process() -> bool:
    """Whether this process alone of its machine's says what all of them find out before they know each other."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


class SettingsError(UserError):
    """All problems of a set of settings at once, each a sentence that starts with its place (`file:line`)."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)  # from another process it arrives whole


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the nearest of the choices, or an empty string where none is near."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def printable(text: str) -> str:
    """Returns text that cannot steer a terminal: control characters become visible escapes."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def shorten(text: str, most: int = 60) -> str:
    """Returns the beginning of a text that is longer than this."""
    return text if len(text) <= most else f"{text[:most]}..."


def is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogates, which JSON, YAML and file names can spell."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


@contextmanager
def reading(subject: str | Path, expected: str = "") -> Iterator[None]:
    """Turns whatever a library raises while it reads a user's file or setting (`subject`) as such as `a tokenizer`
    into a UserError; it goes around the library's call alone, since our own mistakes inside would be the user's."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # the tokenizers library panics outside of Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        read_as = f" as {expected}" if expected else ""
        raise UserError(f"{subject}: cannot be read{read_as}: {reason_of(error)}") from error


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or the one that it was made from, says that memory ran out."""
    if isinstance(error, UserError):
        return is_out_of_memory(error.__cause__)
    words = str(error).lower() if isinstance(error, RuntimeError) else ""
    return isinstance(error, MemoryError) or any(part in words for part in NO_MEMORY)


def reason_of(error: BaseException) -> str:
    """Returns the first line of an error of the system or of a library, as part of a sentence."""
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text (byte 0x{error.object[error.start]:02x} in it)"
    system = error.strerror if isinstance(error, OSError) else None
    lines = (system or str(error)).strip().splitlines() or [""]
    if lines[0].endswith(":"):  # a heading, which says nothing alone
        lines[0] = " ".join(line.strip() for line in lines[:2])
    reason = printable(lines[0].strip().rstrip(".:"))
    if isinstance(error, (KeyError, IndexError)) or not reason:
        reason = f"{type(error).__name__}: {reason}"
    return shorten(reason, LONGEST_REASON)
