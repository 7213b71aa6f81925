"""Sources of chat data: their format recognized, each row read as a conversation, a preference pair or a prompt.

Rendering to tokens is `rendering.py`; holding out, mixing and caching are `rows.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from llmlab.data.chat.formats import (
    Format,
    label_column,
    plain_text,
    recognize,
    to_messages,
    to_pair,
    to_prompt,
    truth_of,
)
from llmlab.data.chat.messages import Row, UnusableRow
from llmlab.data.sources import RowSource, Tally, choose_column, load_rows
from llmlab.data.splits import Use
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError


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
        """Returns a row as `to_messages`, `to_pair` or `to_prompt` does."""
        if self.only_label is not None and self.label is not None:
            truth = truth_of(row.get(self.label))
            if truth is None:
                raise UnusableRow(f"without a '{self.label}' that is true or false")
            if truth != self.only_label:
                raise OtherLabel(f"{self.label} = {str(truth).lower()}")
        if self.use == "preferences":
            return to_pair(row, self.form)
        if self.use != "instructions":
            return to_prompt(row, self.form)
        return to_messages(row, self.form)

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


def load_conversations(
    source: DataSource, use: Use = "instructions", *, at_most: int | None = None
) -> ConversationSource:
    """Finds a source of chat data, of which `at_most` rows will be read, and recognizes its format.

    A source with a `column` is plain text, or prompts.
    """
    found = load_rows(source, use, at_most=at_most)
    first = found.first()
    columns = list(dict.fromkeys(name for row in first for name in row))
    if not columns:
        raise UserError(f"{source.name}: it has no rows")
    if source.column is None or use == "preferences":
        form = recognize(columns, source.name, use)
    else:
        form = plain_text(choose_column(source, first))
    label = label_column(form, first) if use == "instructions" else None
    return ConversationSource(**vars(found), form=form, use=use, label=label)
