"""The commands that train: each resolves its settings, then calls its stage's function."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmlab.cli.options import option, stage_command
from llmlab.settings.sources import Resolved
from llmlab.stages import STAGES

RESUME = (
    option(
        "resume",
        Path | None,
        "--resume",
        help="Continue this run folder from its last checkpoint, or from the checkpoint named.",
    ),
    option(
        "load_optimizer",
        bool,
        "--load-optimizer/--no-load-optimizer",
        help="With --resume: restore the optimizer's state, or only weights and step count.",
        default=True,
    ),
    option(
        "allow_changed_data",
        bool,
        "--allow-changed-data",
        help="With --resume: go on although data files changed since the run began.",
        default=False,
    ),
)


def train_command(name: str) -> Callable[..., None]:
    """Returns the command of a training stage."""

    def execute(resolved: Resolved[Any], **resuming: Any) -> Any:
        STAGES[name].check(resolved, resumed=resuming.get("resume") is not None)
        return STAGES[name].function(resolved, **resuming)

    return stage_command(name, STAGES[name].settings_class, execute, *RESUME)


pretrain = train_command("pretrain")
sft = train_command("sft")
dpo = train_command("dpo")
orpo = train_command("orpo")
reward = train_command("reward")
grpo = train_command("grpo")
ppo = train_command("ppo")
