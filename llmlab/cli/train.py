"""The commands that train: each resolves its settings, then calls its stage's function."""

from pathlib import Path
from typing import Any

from llmlab.cli.options import option, stage_command
from llmlab.settings.pretrain import PretrainSettings
from llmlab.settings.sources import Resolved
from llmlab.stages import STAGES


def _pretrain(resolved: Resolved[PretrainSettings], resume: Path | None, load_optimizer: bool) -> Any:
    return STAGES["pretrain"].function(resolved, resume=resume, load_optimizer=load_optimizer)


pretrain = stage_command(
    "pretrain",
    PretrainSettings,
    _pretrain,
    option("resume", Path | None, "--resume", help="Continue this run folder from its last checkpoint."),
    option(
        "load_optimizer",
        bool,
        "--load-optimizer/--no-load-optimizer",
        help="With --resume: restore the optimizer's state, or only weights and step count.",
        default=True,
    ),
)
