"""One stage under `accelerate launch`, for launchers that want a script: `llmlab STAGE` with the same arguments.

    accelerate launch recipes/train.py sft --config x.yaml
    accelerate launch --config_file accelerate_configs/fsdp2.yaml recipes/train.py sft --config x.yaml

Where llmlab is installed, `accelerate launch -m llmlab sft --config x.yaml` does the same without this file.
"""

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
if (CHECKOUT / "llmlab").is_dir():  # of the sources: they need not be installed
    sys.path.insert(0, str(CHECKOUT))

from llmlab.cli.app import main  # noqa: E402

if __name__ == "__main__":
    main()
