"""Sources of chat data, recognized by their columns, each row read as a conversation, a preference pair or a prompt.
All formats become one, so sources can be mixed. Rendering to tokens is `rendering.py`; holding out, mixing and caching
are `rows.py`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import inf
from typing import Any

from llmlab.data.chat.messages import (
    Message,
    Row,
    UnusableRow,
    has_parts,
    is_empty,
    list_of,
    parse_tools,
    read_turns,
    text_of,
)
from llmlab.data.sources import RowSource, Tally, choose_column, load_rows
from llmlab.data.splits import Use
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError, did_you_mean
from llmlab.settings.files import read_table

TREE_COLUMNS = {"message_id", "parent_id", "message_tree_id", "text", "role"}
LABELS = ("label", "kto_tag")  # columns that say whether a completion is good: KTO's, arXiv 2402.01306
# columns that rewards do not get: reserved by the trainer, or treated as images
RESERVED = {"prompt", "prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra"}
RESERVED |= {"environments", "image", "images"}


@dataclass(frozen=True)
class Format:
    """Columns that identify a format of chat data, beside `system` and `tools`, and how a row's turns are read."""

    name: str
    reader: str  # of `READERS`
    columns: tuple[str, ...]

    def turns(self, row: Row) -> list[Message]:
        """Returns the turns of a row."""
        return READERS[self.reader](row, *self.columns)


def _turn(role: str, content: Any) -> Message:
    return {"role": role, "content": text_of(content)}


def _exchange(row: Row, prompt: str, answer: str) -> list[Message]:
    return [_turn("user", row[prompt]), _turn("assistant", row[answer])]


def _alpaca(row: Row, *columns: str) -> list[Message]:
    messages = []
    for pair in list_of(row.get("history"), "history"):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UnusableRow("expected history as pairs of request and answer")
        messages += [_turn("user", pair[0]), _turn("assistant", pair[1])]
    context = text_of(row["input"]) if row.get("input") else ""
    prompt = text_of(row["instruction"]) + (f"\n\n{context}" if context.strip() else "")
    answer = [_turn("assistant", row["output"])] if "output" in columns else []
    return [*messages, _turn("user", prompt), *answer]


def _prompt_completion(row: Row, prompt: str, completion: str) -> list[Message]:
    if isinstance(row[prompt], list):
        return read_turns([*row[prompt], *list_of(row[completion], completion)])
    return _exchange(row, prompt, completion)


def _prompt_turns(value: Any) -> list[Message]:
    """Returns a prompt that is a list of turns, or the content (text or parts) of one of the user's."""
    if not value:
        return []
    parts = isinstance(value, list) and all(isinstance(each, dict) and "role" not in each for each in value)
    if isinstance(value, list) and not (parts and has_parts(value)):
        return read_turns(value)
    return read_turns([{"role": "user", "content": value}])


def _pair(row: Row, columns: Sequence[str]) -> tuple[list[Message], list[Message], list[Message]]:
    """Returns prompt, chosen and rejected; what both sides begin with belongs to the prompt."""
    *prompt, better, worse = columns
    start = _prompt_turns(row[prompt[0]]) if prompt else []
    chosen, rejected = (_side(row[column], is_transcript=not prompt) for column in (better, worse))
    shared = common_prefix_length(chosen, rejected)
    both = chosen[:shared]
    if both and both[0]["role"] == "user":  # chosen and rejected repeat the prompt, without its system message
        start = [message for message in start[:1] if message["role"] == "system"]
    elif both and both[0]["role"] == "system":
        start = []
    return start + both, chosen[shared:], rejected[shared:]


def _side(value: Any, is_transcript: bool) -> list[Message]:
    if isinstance(value, (list, dict)):
        return read_turns(value if isinstance(value, list) else [value])
    return transcript_messages(text_of(value)) if is_transcript else [_turn("assistant", value)]


def _before_answer(turns: list[Message]) -> list[Message]:
    """Returns everything before the last assistant message."""
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return turns


READERS: dict[str, Callable[..., list[Message]]] = {  # of a row, given the columns
    "turns": lambda row, column: read_turns(row[column]),
    "request": lambda row, column: _prompt_turns(row[column]),
    "exchange": _exchange,
    "prompt and completion": _prompt_completion,
    "alpaca": _alpaca,
    # for a conversation the prompt is the whole common prefix
    "prompt and chosen": lambda row, *columns: _pair(row, (*columns[:-1], columns[-2]))[0],
    "turns before the answer": lambda row, column: _before_answer(read_turns(row[column])),
    "what both sides share": lambda row, *columns: _before_answer(_pair(row, columns)[0]),
}


FORMATS = {  # of each use, in the order in which they are tried
    use: tuple(Format(name, reader, tuple(columns)) for name, (reader, *columns) in formats.items())
    for use, formats in read_table("llmlab.data.chat", "formats").items()
}
PLAIN_TEXT = FORMATS["instructions"][-1]  # read as turns, it is the user's
FORMATS["prompts or text"] = (*FORMATS["prompts"], PLAIN_TEXT)
KINDS = {"instructions": "instruction data", "preferences": "preference data"}


def recognize(columns: Iterable[str], where: str, use: Use = "instructions") -> Format:
    """Returns the first format that has these columns; `where` is the source, for the message."""
    found = set(columns)
    for candidate in FORMATS[use]:
        if found.issuperset(candidate.columns):
            return candidate
    label = next((name for name in LABELS if name in found), None)
    conversations = (form for form in FORMATS["instructions"] if form is not PLAIN_TEXT)
    if use == "preferences" and label and any(found.issuperset(form.columns) for form in conversations):
        marks = (
            f"its column '{label}' marks unpaired preferences (KTO), and this stage compares two answers to one prompt"
        )
        rows = "rows of prompt, chosen (an answer whose label is true) and rejected (one whose label is false)"
        ways = f"give {rows}, or fine-tune on the good ones: llmlab sft --only-label true"
        raise UserError(f"{where}: not supported: {marks}; {ways}")

    def similarity(form: Format) -> float:
        """Scores how well columns match a format: +1 exact, +1/2 similar name, -1/4 missing."""
        missing = [name for name in form.columns if name not in found]
        similar = sum(bool(did_you_mean(name, found)) for name in missing)
        return len(form.columns) - len(missing) + similar / 2 - (len(missing) - similar) / 4

    nearest = max(FORMATS[use], key=similarity)
    missing = [name for name in nearest.columns if name not in found]
    schemas = "; ".join(f"{form.name} ({', '.join(form.columns)})" for form in FORMATS[use])
    closest = f"The closest is {nearest.name}, which lacks {', '.join(missing)}{did_you_mean(missing[0], found)}"
    problem = f"no format of {KINDS.get(use, 'prompts')} has the columns {', '.join(sorted(found))}"
    raise UserError(f"{where}: {problem}; expected one of: {schemas}. {closest}")


def label_column(form: Format, rows: Sequence[Row]) -> str | None:
    """Returns the column that makes rows unpaired preferences (true or false beside a completion), if one does."""
    if form.name in {PLAIN_TEXT.name, *(pair.name for pair in FORMATS["preferences"])}:
        return None
    values = {name: [row[name] for row in rows if row.get(name) is not None] for name in LABELS}
    return next((name for name in LABELS if values[name] and None not in map(as_boolean, values[name])), None)


def as_boolean(value: Any) -> bool | None:
    """Returns a label as true or false: a boolean, 1 or 0, or their names; None for anything else."""
    return {"true": True, "1": True, "false": False, "0": False}.get(str(value).strip().lower())


def common_prefix_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Returns the length of the common prefix."""
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def read_row(row: Row, form: Format, use: Use) -> Row:
    """Returns a row as a conversation (`messages` and `tools`, or the `text` of plain text), as a pair (`prompt`,
    `chosen`, `rejected` and `tools`), or as a prompt (`prompt`, `tools`, and `columns` for rewards)."""
    for column in form.columns:
        if row.get(column) is None:
            raise UnusableRow(f"without '{column}'")
    if use == "instructions" and form.name == PLAIN_TEXT.name:
        text = text_of(row[form.columns[0]])
        if not text.strip():
            raise UnusableRow("empty")
        return {"text": text}
    text = row.get("system")  # the system prompt in a column of its own
    system = [_turn("system", text)] if isinstance(text, str) and text.strip() else []
    values = {"instructions": _conversation, "preferences": _comparison}.get(use, _prompt)(row, form, system)
    tools = parse_tools(row.get("tools"))
    if not all(isinstance(tool, dict) for tool in tools):
        raise UnusableRow("expected tools as JSON schemas")
    return values | {"tools": tools or None}


def _conversation(row: Row, form: Format, system: list[Message]) -> Row:
    messages = system + form.turns(row)
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise UnusableRow("no turn of the assistant")
    if all(map(is_empty, answers)):
        raise UnusableRow("every assistant turn is empty")
    return {"messages": messages}


def _comparison(row: Row, form: Format, system: list[Message]) -> Row:
    prompt, chosen, rejected = _pair(row, form.columns)
    prompt = system + prompt
    if chosen == rejected:
        raise UnusableRow("chosen and rejected are the same")
    for side in (chosen, rejected):
        if not side or is_empty(side[0]):
            raise UnusableRow("an empty completion")
        if any(message["role"] != "assistant" for message in (side[0], side[-1])):
            raise UnusableRow("the completion is not an assistant message")
    if not prompt:
        raise UnusableRow("an empty prompt")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _prompt(row: Row, form: Format, system: list[Message]) -> Row:
    prompt = system + form.turns(row)
    if not any(message["role"] != "system" and message["content"].strip() for message in prompt):
        raise UnusableRow("an empty prompt")
    if prompt[-1]["role"] not in ("user", "tool"):
        raise UnusableRow("a prompt that does not end with the user's turn")
    columns = {name: value for name, value in row.items() if name not in RESERVED}
    return {"prompt": prompt, "columns": columns}


def transcript_messages(text: str) -> list[Message]:
    """Returns the turns of an Anthropic transcript: `\\n\\nHuman: ... \\n\\nAssistant: ...`."""
    messages: list[Message] = []
    for part in ("\n\n" + text.strip()).split("\n\nHuman:")[1:]:
        question, *answers = part.split("\n\nAssistant:")
        messages.append(_turn("user", question.strip()))
        messages += [_turn("assistant", answer.strip()) for answer in answers]
    if not messages:
        raise UnusableRow("no 'Human:' turn in the transcript")
    return messages


class OtherLabel(UnusableRow):
    """An unpaired-preference row with the other label."""


@dataclass(frozen=True, kw_only=True)
class ConversationSource(RowSource):
    """A source of chat data whose format is known."""

    form: Format
    use: Use
    label: str | None = None  # the column of unpaired preferences that says whether a completion is good
    only_label: bool | None = None  # the label of the rows to use; None uses all

    def read(self, row: Row) -> Row:
        """Returns a row as `read_row` does."""
        if self.only_label is not None and self.label is not None:
            truth = as_boolean(row.get(self.label))
            if truth is None:
                raise UnusableRow(f"without a '{self.label}' that is true or false")
            if truth != self.only_label:
                raise OtherLabel(f"{self.label} = {str(truth).lower()}")
        return read_row(row, self.form, self.use)

    def conversations(self, tally: Tally, limit: int | None = None) -> Iterator[Row]:
        """Yields the usable rows among the first `limit`, counting the others by reason."""
        for row in islice(self.rows, limit):
            try:
                conversation = self.read(row)
            except UnusableRow as reason:
                tally.dropped[str(reason)] += 1
            else:
                tally.documents += 1
                yield conversation


@dataclass(frozen=True)
class TreeRows:
    """Conversations of message trees (oasst1), rows of one message in any order: of each the best-ranked replies."""

    messages: Iterable[Row]
    num_shards = 1

    def __iter__(self) -> Iterator[Row]:
        trees: dict[str, list[Row]] = {}
        for message in self.messages:
            if not message.get("deleted"):
                trees.setdefault(message["message_tree_id"], []).append(message)
        for name, tree in trees.items():
            yield {"messages": _best_path(tree), "message_tree_id": name}


def _best_path(tree: list[Row]) -> list[Row]:
    """Returns the turns from the root of a tree along the best replies (rank 0), up to the last of the assistant."""
    replies: dict[str | None, list[Row]] = {}
    for message in tree:
        replies.setdefault(message["parent_id"], []).append(message)

    def order(message: Row) -> tuple[float, bool]:
        rank = message.get("rank")
        return (inf if rank is None else rank), message["message_id"] not in replies  # most users' have no rank

    turns, parent = [], None
    while parent in replies:
        best = min(replies[parent], key=order)
        turns.append({"role": best["role"], "content": best["text"]})
        parent = best["message_id"]
    while turns and turns[-1]["role"] == "prompter":
        turns.pop()
    return turns


def load_conversations(
    source: DataSource, use: Use = "instructions", *, at_most: int | None = None
) -> ConversationSource:
    """Finds a source of chat data, of which `at_most` rows will be read; one with a `column` is text, or prompts."""
    found = load_rows(source, use, at_most=at_most)
    first = found.first()
    if first and first[0].keys() >= TREE_COLUMNS:
        rows = TreeRows(found.rows)
        found = replace(found, rows=rows, identity={**found.identity, "trees": 1}, count=None)
        first = found.first()
    columns = list(dict.fromkeys(name for row in first for name in row))
    if not columns:
        raise UserError(f"{source.name}: it has no rows")
    if source.column is None or use == "preferences":
        form = recognize(columns, source.name, use)
    else:
        form = replace(PLAIN_TEXT, columns=(choose_column(source, first),))
    label = label_column(form, first) if use == "instructions" else None
    return ConversationSource(**vars(found), form=form, use=use, label=label)
