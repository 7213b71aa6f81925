"""What a source of data holds, in numbers: what cannot be used, repeats, or stands in the wrong place, and how long.

Pure functions over rows; the report says what was found and where, and changes and judges nothing.  Printing it is the
command line's business.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasketch import MinHash, MinHashLSH

from llmlab.data.chat.formats import truth_of
from llmlab.data.chat.messages import UnusableRow, is_empty
from llmlab.data.hashing import text_hash

Row = dict[str, Any]
Message = dict[str, Any]

FIRST_ROWS = 5  # row numbers kept of each finding
PERCENTILES = (50, 90, 95, 99)
BINS = 50  # of a histogram; the last holds everything longer

NEAR = 0.8  # Jaccard similarity of word 5-grams, as in Lee et al. 2021, arXiv 2107.06499, "NearDup"
SHINGLE = 5
PERMUTATIONS = 128
COMPARED = 100_000  # characters of a row that are compared for near duplicates

TWO_IN_A_ROW = "two turns of the assistant in a row"

# What may follow what; a call is a turn of the assistant that calls tools.
_FOLLOWERS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant", "call"),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant", "call"),
}


@dataclass
class Finding:
    """Rows of which the same is true: how many, and the numbers of the first, counted from 1."""

    rows: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, row: int) -> None:
        self.rows += 1
        if len(self.first) < FIRST_ROWS:
            self.first.append(row)


class Findings(dict[str, Finding]):
    """Findings by what was found."""

    def add(self, what: str, row: int) -> None:
        self.setdefault(what, Finding()).add(row)

    @property
    def total(self) -> int:
        return sum(finding.rows for finding in self.values())


@dataclass(frozen=True)
class Lengths:
    """How long rows are.

    Attributes:
        total: sum over the rows.
        percentiles: the length that so many percent of the rows do not exceed.
        longest: of any row.
        bin_width: of the histogram, which begins at 0.
        counts: rows in each bin; the last bin also holds what is longer.
    """

    total: int
    percentiles: dict[str, int]
    longest: int
    bin_width: int
    counts: list[int]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Lengths":
        """Returns the distribution of at least one length."""
        values = np.asarray(lengths, np.int64)
        marks = np.percentile(values, PERCENTILES, method="inverted_cdf")
        longest = int(values.max())
        width = _bin_width(min(longest, int(1.25 * marks[-1])))
        bins = np.minimum(values // width, BINS - 1)
        counts = np.bincount(bins)
        percentiles = {str(mark): int(value) for mark, value in zip(PERCENTILES, marks, strict=True)}
        return cls(int(values.sum()), percentiles, longest, width, counts.tolist())


@dataclass(frozen=True)
class TokenReport:
    """Rows as tokens of one tokenizer and chat template.

    Attributes:
        lengths: tokens a row, before cutting.
        trained: tokens that are trained, of all rows, before cutting.
        max_seq_len: where rows are cut.
        truncated: rows that are longer.
        lost: rows in which nothing is left to train after cutting.
    """

    lengths: Lengths
    trained: int
    max_seq_len: int
    truncated: Finding
    lost: Finding


@dataclass(frozen=True)
class DataReport:
    """What a source holds.

    Attributes:
        name: of the source.
        format: the format recognized.
        columns: the columns found.
        rows: rows read.
        usable: rows that can be trained on.
        dropped: the others, by reason.
        exact_duplicates: rows whose content an earlier row has.
        near_duplicates: rows nearly the same as an earlier one, exact duplicates not counted.
        problems: empty turns, turns out of order, and what the chat template gets wrong.
        scripts: share of the letters by script.
        characters: characters a row that can be read, all turns together.
        words: words a row.
        tokens: tokens a row, where a tokenizer was given.
        labels: rows by label, where they are unpaired preferences.
    """

    name: str
    format: str
    columns: list[str]
    rows: int
    usable: int
    dropped: Findings
    exact_duplicates: Finding
    near_duplicates: Finding
    problems: Findings
    scripts: dict[str, float]
    characters: Lengths | None
    words: Lengths | None
    tokens: TokenReport | None
    labels: dict[str, int]


def inspect_rows(
    rows: Iterable[Row],
    read: Callable[[Row], Row],
    *,
    name: str,
    form: str,
    label: str | None = None,
    render: Callable[[Row], Any] | None = None,
    find_problem: Callable[[Any], str] | None = None,
    max_seq_len: int = 1024,
) -> DataReport:
    """Reads every row once and reports what they are.

    Args:
        rows: raw rows.
        read: returns a row as `{"messages": ..., "tools": ...}` or `{"text": ...}`, or raises UnusableRow.
        name: the source, for the report.
        form: name of the format, for the report.
        label: the column whose values are counted.
        render: returns a conversation's tokens (`input_ids` and `trained`), or raises UnusableRow; None counts none.
        find_problem: says what is wrong with a rendered row, or returns an empty text.
        max_seq_len: where rows will be cut.
    """
    columns: dict[str, None] = {}
    alphabet: Counter[str] = Counter()
    characters: list[int] = []
    words: list[int] = []
    tokens: list[int] = []
    trained, truncated, lost = 0, Finding(), Finding()
    dropped, exact, near, problems = Findings(), Finding(), Finding(), Findings()
    seen: set[int] = set()
    similar = NearDuplicates()
    labels: Counter[str] = Counter()
    number = 0
    for number, row in enumerate(rows, 1):
        if label is not None:
            labels[{True: "true", False: "false", None: "neither"}[truth_of(row.get(label))]] += 1
        columns.update(dict.fromkeys(map(str, row)))
        try:
            conversation = read(row)
        except UnusableRow as reason:
            dropped.add(str(reason), number)
            continue
        text = text_of(conversation)
        alphabet.update(text)
        characters.append(len(text))
        words.append(len(text.split()))
        content = content_hash(conversation)
        if content in seen:
            exact.add(number)
        elif similar.add(number, text):
            near.add(number)
        seen.add(content)
        for problem in turn_problems(conversation.get("messages") or []):
            problems.add(problem, number)
        if render is not None:
            try:
                rendered = render(conversation)
            except UnusableRow as reason:
                dropped.add(str(reason), number)
                continue
            tokens.append(len(rendered.input_ids))
            trained += sum(rendered.trained)
            if len(rendered.input_ids) > max_seq_len:
                truncated.add(number)
            if not any(rendered.trained[:max_seq_len]):
                lost.add(number)
            if find_problem and (problem := find_problem(rendered)):
                problems.add(problem, number)
    return DataReport(
        name=name,
        format=form,
        columns=list(columns),
        rows=number,
        usable=number - dropped.total,
        dropped=dropped,
        exact_duplicates=exact,
        near_duplicates=near,
        problems=problems,
        scripts=scripts_of(alphabet),
        characters=Lengths.of(characters) if characters else None,
        words=Lengths.of(words) if words else None,
        tokens=TokenReport(Lengths.of(tokens), trained, max_seq_len, truncated, lost) if tokens else None,
        labels=dict(labels),
    )


class NearDuplicates:
    """Finds texts nearly the same as an earlier one: MinHash and locality-sensitive hashing over word 5-grams.

    Finds most pairs above the similarity `NEAR` and few below; only the first 100,000 characters count.
    """

    def __init__(self) -> None:
        self._index = MinHashLSH(threshold=NEAR, num_perm=PERMUTATIONS)
        self._sketches: dict[int, MinHash] = {}
        self._empty = MinHash(num_perm=PERMUTATIONS)

    def add(self, number: int, text: str) -> int | None:
        """Takes a text in, and returns the number of an earlier one nearly the same; None where there is none."""
        sketch = self._empty.copy()
        sketch.update_batch(shingles_of(text[:COMPARED]))
        for earlier in sorted(self._index.query(sketch)):
            if self._sketches[earlier].jaccard(sketch) >= NEAR:
                return earlier  # stands for this one too
        self._index.insert(number, sketch)
        self._sketches[number] = sketch
        return None


def shingles_of(text: str) -> list[bytes]:
    """Returns the distinct runs of five words, case and punctuation aside; a shorter text is one run."""
    words = re.findall(r"\w+", text.lower())
    runs = {" ".join(words[start : start + SHINGLE]) for start in range(max(len(words) - SHINGLE + 1, 1))}
    return [run.encode("utf-8", "replace") for run in sorted(runs)]


def text_of(conversation: Row) -> str:
    """Returns the text of all turns, calls included, without their roles."""
    if "text" in conversation:
        return conversation["text"]
    return "\n".join(
        part
        for message in conversation["messages"]
        for part in (
            message.get("reasoning_content"),
            message["content"],
            *(_call_text(call) for call in message.get("tool_calls") or ()),
        )
        if part
    )


def content_hash(conversation: Row) -> int:
    """Returns 64 bits of everything that a conversation is."""
    return text_hash(json.dumps(conversation, sort_keys=True, default=str))


def turn_problems(messages: Sequence[Message]) -> list[str]:
    """Returns what is wrong with the turns, each kind once: empty ones, and those in the wrong place."""
    found: dict[str, None] = {}
    before = ""
    for message in messages:
        calls = bool(message.get("tool_calls"))
        turn = "call" if message["role"] == "assistant" and calls else message["role"]
        if is_empty(message):
            found[f"empty turn of the {turn}"] = None
        if turn not in _FOLLOWERS[before]:
            found[_disorder(before, turn)] = None
        before = turn if turn != "system" or not before else before  # one in the middle interrupts, no more
    if messages and before not in ("assistant", "call"):
        found[f"ends with the {before}"] = None
    return list(found)


def _disorder(before: str, turn: str) -> str:
    if turn == "system":
        return "system turn that is not the first"
    if turn == "tool":
        return "tool result without a call"
    if before in ("assistant", "call") and turn in ("assistant", "call"):
        return TWO_IN_A_ROW
    if before == "call":
        return "call without a result"
    if before in ("", "system"):
        return "starts with the assistant"
    names = {"call": "assistant", "tool": "tool result"}
    return f"{names.get(turn, turn)} after {names.get(before, before)}"


def scripts_of(characters: Counter[str]) -> dict[str, float]:
    """Returns the share of the letters that each script has, the largest first; names as in Unicode's, Han for CJK."""
    counts: Counter[str] = Counter()
    for character, count in characters.items():
        if character.isalpha():
            counts[_script(character)] += count
    return {script: count / counts.total() for script, count in counts.most_common()}


def _script(letter: str) -> str:
    """Returns the first word of a letter's name; widths, styles and signs (a micro sign is a mu) aside."""
    words = unicodedata.name(unicodedata.normalize("NFKC", letter)[0], "OTHER").split()
    return "Han" if words[0] in ("CJK", "IDEOGRAPHIC") else words[0].capitalize()


def _call_text(call: Row) -> str:
    function = call["function"]
    return f"{function['name']} {json.dumps(function['arguments'], ensure_ascii=False)}"


def _bin_width(longest: int) -> int:
    """Returns the smallest round width with which the bins reach this length."""
    return next(
        width for power in range(20) for width in (10**power, 2 * 10**power, 5 * 10**power) if width * BINS > longest
    )
