"""A curriculum over the simulator's difficulties, from the easiest to the hardest."""

from typing import Literal

DIFFICULTIES = 4
WINDOW, RAISE, LOWER = 64, 0.8, 0.2  # episodes, and success rates over them that change the level


class Curriculum:
    """The difficulty of the next episodes: `episodes` rises evenly over the first half of a run of `total` episodes,
    `success` with the success rate of the last 64, and falls with it."""

    def __init__(self, kind: Literal["episodes", "success"], total: int):
        self.kind, self.total = kind, total
        self.seen = self.raised = 0
        self.recent: list[bool] = []

    @property
    def level(self) -> int:
        if self.kind == "success":
            return 1 + self.raised
        steps = 2 * (DIFFICULTIES - 1) * self.seen // max(self.total, 1)
        return 1 + min(steps, DIFFICULTIES - 1)

    def update(self, successes: list[bool]) -> None:
        """Adds episodes that were played at this level, over all processes."""
        self.seen += len(successes)
        self.recent = (self.recent + successes)[-WINDOW:]
        if len(self.recent) < WINDOW:
            return
        rate = sum(self.recent) / WINDOW
        change = int(rate >= RAISE) - int(rate <= LOWER)
        raised = min(max(self.raised + change, 0), DIFFICULTIES - 1)
        if raised != self.raised:
            self.raised, self.recent = raised, []

    def state(self) -> dict[str, object]:
        """Returns what a checkpoint keeps."""
        return {"seen": self.seen, "raised": self.raised, "recent": self.recent}

    def load_state(self, state: dict[str, object]) -> None:
        vars(self).update(state)
