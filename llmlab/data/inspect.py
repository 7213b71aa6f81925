"""A report on a source of data: unusable rows, duplicates, turns out of order, scripts and lengths. Pure functions
over rows, which change nothing; printing the report is the command line's business."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from datasketch import MinHash, MinHashLSH

from llmlab.data.chat.conversations import ConversationSource, as_boolean
from llmlab.data.chat.messages import FOLLOWERS, Message, Row, UnusableRow, is_empty
from llmlab.data.chat.rendering import Renderer
from llmlab.data.splits import text_hash

FIRST_ROWS = 5  # row numbers kept of each finding
PERCENTILES = (50, 90, 95, 99)
BINS = 50  # of a histogram; the last holds everything longer

NEAR = 0.8  # Jaccard similarity of word 5-grams, as in Lee et al. 2021, arXiv 2107.06499, "NearDup"
SHINGLE = 5
PERMUTATIONS = 128
COMPARED = 100_000  # characters of a row that are compared for near duplicates


@dataclass
class Finding:
    """Number of affected rows, and the first row numbers (1-based)."""

    rows: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, row: int) -> None:
        self.rows += 1
        if len(self.first) < FIRST_ROWS:
            self.first.append(row)


@dataclass(frozen=True)
class Lengths:
    """The distribution of the lengths of rows; the last bin of the histogram also holds what is longer."""

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
        widths = (digit * 10**power for power in range(20) for digit in (1, 2, 5))
        width = next(width for width in widths if width * BINS > min(longest, int(1.25 * marks[-1])))
        counts = np.bincount(np.minimum(values // width, BINS - 1))
        percentiles = {str(mark): int(value) for mark, value in zip(PERCENTILES, marks, strict=True)}
        return cls(int(values.sum()), percentiles, longest, width, counts.tolist())


@dataclass
class TokenReport:
    """Rows as tokens of one tokenizer, before truncation to `max_seq_len`."""

    lengths: Lengths
    trained: int
    max_seq_len: int
    truncated: Finding
    lost: Finding  # no trained token is left after truncation


@dataclass
class DataReport:
    """What a source holds; near duplicates do not count exact ones, and lengths are of the rows that can be read."""

    name: str
    format: str
    columns: list[str] = field(default_factory=list)
    rows: int = 0
    usable: int = 0
    dropped: dict[str, Finding] = field(default_factory=dict)
    exact_duplicates: Finding = field(default_factory=Finding)
    near_duplicates: Finding = field(default_factory=Finding)
    problems: dict[str, Finding] = field(default_factory=dict)
    scripts: dict[str, float] = field(default_factory=dict)  # share of the letters
    characters: Lengths | None = None
    tokens: TokenReport | None = None  # where a tokenizer was given
    labels: dict[str, int] = field(default_factory=dict)  # rows by label, of unpaired preferences


def inspect_rows(
    source: ConversationSource, rows: Iterable[Row], renderer: Renderer | None = None, max_seq_len: int = 1024
) -> DataReport:
    """Reads these rows of a source once; with a renderer their tokens are counted too."""
    label = source.label
    report = DataReport(source.name, source.form.name + (", unpaired" if label else ""))
    columns: dict[str, None] = {}
    alphabet: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    characters, tokens = [], []
    trained, truncated, lost = 0, Finding(), Finding()
    seen: set[int] = set()
    similar = NearDuplicates()
    for number, row in enumerate(rows, 1):
        report.rows = number
        columns.update(dict.fromkeys(map(str, row)))
        if label is not None:
            labels[{True: "true", False: "false", None: "neither"}[as_boolean(row.get(label))]] += 1
        problems = []
        try:
            conversation = source.read(row)
            text = text_of(conversation)
            alphabet.update(text)
            characters.append(len(text))
            content = text_hash(json.dumps(conversation, sort_keys=True, default=str))
            if content in seen:
                report.exact_duplicates.add(number)
            elif similar.add(number, text):
                report.near_duplicates.add(number)
            seen.add(content)
            problems = turn_problems(conversation.get("messages") or [])
            if renderer is not None:
                rendered = renderer.render(conversation)
                tokens.append(len(rendered.input_ids))
                trained += sum(rendered.trained)
                if len(rendered.input_ids) > max_seq_len:
                    truncated.add(number)
                if not any(rendered.trained[:max_seq_len]):
                    lost.add(number)
                problems += filter(None, [renderer.find_problem(rendered)])
        except UnusableRow as reason:
            report.dropped.setdefault(str(reason), Finding()).add(number)
        for problem in problems:
            report.problems.setdefault(problem, Finding()).add(number)
    report.columns, report.labels = list(columns), dict(labels)
    report.usable = report.rows - sum(finding.rows for finding in report.dropped.values())
    if characters:
        report.scripts = scripts_of(alphabet)
        report.characters = Lengths.of(characters)
    if tokens:
        report.tokens = TokenReport(Lengths.of(tokens), trained, max_seq_len, truncated, lost)
    return report


class NearDuplicates:
    """Finds most texts above the similarity `NEAR`, by MinHash and locality-sensitive hashing over word 5-grams."""

    def __init__(self) -> None:
        self._index = MinHashLSH(threshold=NEAR, num_perm=PERMUTATIONS)
        self._sketches: dict[int, MinHash] = {}
        self._empty = MinHash(num_perm=PERMUTATIONS)

    def add(self, number: int, text: str) -> int | None:
        """Adds a text, and returns the number of an earlier one nearly the same; None where there is none."""
        words = re.findall(r"\w+", text[:COMPARED].lower())  # a text of fewer than five is one run
        runs = {" ".join(words[start : start + SHINGLE]) for start in range(max(len(words) - SHINGLE + 1, 1))}
        sketch = self._empty.copy()
        sketch.update_batch([run.encode("utf-8", "replace") for run in sorted(runs)])
        for earlier in sorted(self._index.query(sketch)):
            if self._sketches[earlier].jaccard(sketch) >= NEAR:
                return earlier  # the earlier row represents both
        self._index.insert(number, sketch)
        self._sketches[number] = sketch
        return None


def text_of(conversation: Row) -> str:
    """Returns the text of all turns, tool calls included, without their roles."""
    if "text" in conversation:
        return conversation["text"]
    parts: list[str] = []
    for message in conversation["messages"]:
        parts += filter(None, (message.get("reasoning_content"), message["content"]))
        for call in message.get("tool_calls") or ():
            function = call["function"]
            parts.append(f"{function['name']} {json.dumps(function['arguments'], ensure_ascii=False)}")
    return "\n".join(parts)


def turn_problems(messages: Sequence[Message]) -> list[str]:
    """Returns what is wrong with the turns, each kind once: empty ones, and those in the wrong place."""
    found: dict[str, None] = {}
    before = ""
    for message in messages:
        calls = message["role"] == "assistant" and message.get("tool_calls")
        turn = "tool call" if calls else {"tool": "tool result"}.get(message["role"], message["role"])
        if is_empty(message):
            found[f"empty turn of the {turn}"] = None
        if turn not in FOLLOWERS[before]:
            found[f"{turn} after {before}" if before else f"starts with the {turn}"] = None
        if turn != "system" or not before:  # a system turn in the middle does not change what may follow
            before = turn
    if messages and before not in ("assistant", "tool call"):
        found[f"ends with the {before}"] = None
    return list(found)


def scripts_of(characters: Counter[str]) -> dict[str, float]:
    """Returns the share of the letters that each script has, the largest first; names as in Unicode's, Han for CJK."""
    counts: Counter[str] = Counter()
    for character, count in characters.items():
        if character.isalpha():  # the first word of its name, widths, styles and signs (a micro sign is a mu) aside
            first, *_ = unicodedata.name(unicodedata.normalize("NFKC", character)[0], "OTHER").split()
            counts["Han" if first in ("CJK", "IDEOGRAPHIC") else first.capitalize()] += count
    return {script: count / counts.total() for script, count in counts.most_common()}
