"""Sources of chat data: their format recognized, each row read as a conversation, a preference pair or a prompt.
Rendering to tokens is `rendering.py`; holding out, mixing and caching are `rows.py`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from math import inf

from llmlab.data.chat import formats
from llmlab.data.chat.messages import Row, UnusableRow
from llmlab.data.sources import RowSource, Tally, choose_column, load_rows
from llmlab.data.splits import Use
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError

TREE_COLUMNS = {"message_id", "parent_id", "message_tree_id", "text", "role"}


class OtherLabel(UnusableRow):
    """An unpaired-preference row with the other label."""


@dataclass(frozen=True, kw_only=True)
class ConversationSource(RowSource):
    """A source of chat data whose format is known."""

    form: formats.Format
    use: Use
    label: str | None = None  # the column of unpaired preferences that says whether a completion is good
    only_label: bool | None = None  # the label of the rows to use; None uses all

    def read(self, row: Row) -> Row:
        """Returns a row as `to_messages`, `to_pair` or `to_prompt` does."""
        if self.only_label is not None and self.label is not None:
            truth = formats.as_boolean(row.get(self.label))
            if truth is None:
                raise UnusableRow(f"without a '{self.label}' that is true or false")
            if truth != self.only_label:
                raise OtherLabel(f"{self.label} = {str(truth).lower()}")
        readers = {"preferences": formats.to_pair, "instructions": formats.to_messages}
        return readers.get(self.use, formats.to_prompt)(row, self.form)

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
        form = formats.recognize(columns, source.name, use)
    else:
        form = formats.plain_text(choose_column(source, first))
    label = formats.label_column(form, first) if use == "instructions" else None
    return ConversationSource(**vars(found), form=form, use=use, label=label)
