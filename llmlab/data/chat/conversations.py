"""Sources of instruction data: found, their format recognized, every row read as a conversation.

Turning conversations into tokens is `rendering.py`; mixing, holding out and caching are `instructions.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmlab.data.chat.formats import PLAIN_TEXT, Format, label_column, recognize, to_messages, truth_of
from llmlab.data.chat.messages import UnusableRow
from llmlab.data.chat.pairs import recognize_pairs, to_pair
from llmlab.data.sources import Tally, choose_column, load_rows
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset


class OtherLabel(UnusableRow):
    """A row of unpaired preferences whose label was not asked for."""


@dataclass(frozen=True)
class ConversationSource:
    """A source of instruction data that was found and understood.

    Attributes:
        name: as the user wrote it.
        rows: the rows with all their columns.
        form: the format that their columns tell.
        identity: what another content would change; plain values for a cache key.
        splits: the splits that the source has.
        column: the column that holds plain text, where the format is that.
        pairs: whether rows are read as preference pairs.
        label: the column that says of each completion whether it is good, where the rows are unpaired preferences.
        only_label: the label of the rows that are used; None uses all.
        count: rows; None where unknown.
    """

    name: str
    rows: "IterableDataset"
    form: Format
    identity: dict[str, Any]
    splits: tuple[str, ...]
    column: str | None = None
    pairs: bool = False
    label: str | None = None
    only_label: bool | None = None
    count: int | None = None

    def read(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns a row as `to_messages` or, of preference pairs, `to_pair` does.

        Raises:
            UnusableRow: it cannot be read so; the reason is for counting.
            OtherLabel: it is not one of the rows that are used.
        """
        if self.only_label is not None and self.label is not None:
            truth = truth_of(row.get(self.label))
            if truth is None:
                raise UnusableRow(f"without a '{self.label}' that is true or false")
            if truth != self.only_label:
                raise OtherLabel(f"{self.label} = {str(truth).lower()}")
        if self.pairs:
            return to_pair(row, self.form)
        return to_messages({"text": row.get(self.column)} if self.column else row, self.form)

    def conversations(self, tally: Tally) -> Iterator[dict[str, Any]]:
        """Yields every row that can be read, counting those that cannot by reason."""
        for row in self.rows:
            try:
                conversation = self.read(row)
            except UnusableRow as reason:
                tally.dropped[str(reason)] += 1
            else:
                tally.documents += 1
                yield conversation


def load_conversations(
    source: DataSource,
    *,
    split: str | None = None,
    streaming: bool = False,
    pairs: bool = False,
    at_most: int | None = None,
) -> ConversationSource:
    """Finds a source of instruction data and recognizes its format from its columns.

    Args:
        source: as in `load_rows`; with `column` its rows are plain text.
        split: another split than the source names.
        streaming: read a hub data set as it comes.
        pairs: whether its rows are to be read as preference pairs.
        at_most: rows that will be read.

    Raises:
        UserError: there is no such source, or no format has its columns.
    """
    found = load_rows(source, streaming=streaming, split=split, pairs=pairs, at_most=at_most)
    first = found.first()
    columns = list(dict.fromkeys(name for row in first for name in row))
    if not columns:
        raise UserError(f"{source.name}: it has no rows")
    if pairs:
        form, column = recognize_pairs(columns, source.name), None
    elif source.column is not None:
        form, column = PLAIN_TEXT, choose_column(source, first)
    else:
        form = recognize(columns, source.name)
        column = "text" if form is PLAIN_TEXT else None
    label = None if pairs else label_column(form, first)
    return ConversationSource(
        source.name, found.rows, form, found.identity, found.splits, column, pairs, label, count=found.count
    )
