"""An environment of one's own, in TRL's class shape: a calculator that solves the sum it is asked for.

    llmlab episodes run runs/quickstart/merge --environment examples/own_environment.py:Calculator \
        --allow-code --tasks demo/arithmetic -n 5

`examples/tools_grpo.ipynb` fine-tunes the quickstart's model on its calls and then trains it with GRPO.
"""

import re

SUM = re.compile(r"(\d{1,6}) ([+-]) (\d{1,6})")


class Calculator:
    """An episode is one problem of demo/arithmetic; it ends with the first result."""

    done = False
    success = False
    reward_range = (0.0, 1.0)

    def reset(self, **row):
        """Begins an episode with the columns of a row; what it returned would be added to the prompt."""
        self.expected = int(row["answer"])
        self.done = self.success = False

    def calculate(self, expression: str) -> str:
        """Calculates a sum or a difference.

        Args:
            expression: Two numbers with + or - between, such as 23 + 5.
        """
        found = SUM.fullmatch(expression)
        if found is None:
            return "error: expected two numbers with + or - between"
        left, sign, right = found.groups()
        result = int(left) + int(right) if sign == "+" else int(left) - int(right)
        self.done, self.success = True, result == self.expected
        return str(result)

    def get_reward(self) -> float:
        """Returns a part for a result, and the rest for the right one."""
        return 0.3 * self.done + 0.7 * self.success
