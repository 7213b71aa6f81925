"""Message trees (OpenAssistant/oasst1: a row a message, each naming the one it answers) as conversations.

Each tree becomes one conversation: the best-ranked reply at every turn.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

Row = dict[str, Any]

COLUMNS = {"message_id", "parent_id", "message_tree_id", "text", "role"}  # by which such rows are recognized


@dataclass(frozen=True)
class TreeRows:
    """Conversations of message rows, which may come in any order: all are read before the first is yielded."""

    messages: Iterable[Row]
    num_shards = 1

    def __iter__(self) -> Iterator[Row]:
        trees: dict[str, list[Row]] = {}
        for message in self.messages:
            if not message.get("deleted"):
                trees.setdefault(message["message_tree_id"], []).append(message)
        for name, tree in trees.items():
            yield {"messages": best_path(tree), "message_tree_id": name}


def best_path(tree: list[Row]) -> list[Row]:
    """Returns the turns from the root of a tree along the best-ranked replies.

    Rank 0 is the best; messages without a rank (mostly the users') come last, those with a reply first.  A last turn
    of the user without an answer is left out.
    """
    replies: dict[str | None, list[Row]] = {}
    for message in tree:
        replies.setdefault(message["parent_id"], []).append(message)

    def order(message: Row) -> tuple[float, bool]:
        rank = message.get("rank")
        return (inf if rank is None else rank), message["message_id"] not in replies

    turns, parent = [], None
    while parent in replies:
        best = min(replies[parent], key=order)
        turns.append(best)
        parent = best["message_id"]
    while turns and turns[-1]["role"] == "prompter":
        turns.pop()
    return [{"role": turn["role"], "content": turn["text"]} for turn in turns]
