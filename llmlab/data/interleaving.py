"""Interleaves several files, so that any prefix has rows of all of them; the position can be saved and restored.
`datasets` interleaves too, but reads ahead in threads and by whole tables, and ends with a wait."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import IterableDataset

PARTS = 8  # of one source that are read in turn


class Interleaved:
    """All rows of some parts, once, in proportion to their weights (such as sizes; None are equal) until they end."""

    num_shards = 1

    def __init__(self, parts: "Sequence[IterableDataset]", weights: Sequence[float] | None = None):
        self.parts = list(parts)
        self.weights = list(weights or [1.0] * len(parts))
        self.load_state_dict({})

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.load_state_dict(self.start)  # an abandoned iteration does not count
        taken, ended, states = self.taken, self.ended, self.states
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state or {})
        iterators = list(map(iter, self.parts))
        while not all(ended):
            left = (number for number, end in enumerate(ended) if not end)
            number = min(left, key=lambda each: (taken[each] + 0.5) / self.weights[each])
            states[number] = None
            row = next(iterators[number], None)
            if row is None:
                ended[number] = True
            else:
                taken[number] += 1
                yield row

    def state_dict(self) -> dict[str, Any]:
        """Returns the position, which JSON can hold."""
        rows = zip(self.parts, self.states, self.taken, strict=True)
        states = [part.state_dict() if state is None and taken else state for part, state, taken in rows]
        return {"taken": list(self.taken), "ended": list(self.ended), "states": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Lets every iteration begin at a position; an empty one is the start."""
        self.start = state
        count = len(self.parts)
        self.taken = list(state.get("taken", [0] * count))
        self.ended = list(state.get("ended", [False] * count))
        self.states = list(state.get("states", [None] * count))  # of parts that were not read since


def spread(rows: "IterableDataset") -> "IterableDataset | Interleaved":
    """Returns the same rows in an order whose prefixes have rows of all parts of the source, not of its first file."""
    count = min(PARTS, rows.num_shards)
    return rows if count == 1 else Interleaved([rows.shard(count, index) for index in range(count)])
