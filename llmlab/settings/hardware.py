"""Where and in which arithmetic a stage runs; what the machine has is probed by `llmlab.hardware`."""

from collections.abc import Callable
from typing import Any, ClassVar

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Settings

LAUNCH = "processes are started from outside: accelerate launch -m llmlab ..."
TRAINER_ARGS = ("ddp_find_unused_parameters", "ddp_bucket_cap_mb")  # of the RL guide's block for several GPUs


class DeviceSettings(Settings):
    """The device and the precision of the arithmetic."""

    panel: ClassVar[str] = "Hardware"

    device: v.Device = "auto"
    dtype: v.Dtype = "auto"


class HardwareSettings(DeviceSettings):
    """Device, precision and what trades memory for speed."""

    panel: ClassVar[str] = "Hardware"
    inapplicable: ClassVar[dict[str, str]] = dict.fromkeys(("distributed_strategy", "num_processes"), LAUNCH)

    tf32: v.Tf32 = None
    compile: v.Compile = "auto"
    gradient_checkpointing: v.GradientCheckpointing = False
    dataloader_num_workers: v.DataloaderNumWorkers = 0

    @classmethod
    def translate(cls, values: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
        """Reads the RL guide's `bf16` and `fp16` ("use BF16 if available", "fallback if no BF16") as a dtype."""
        values = {f"trainer_args.{key}" if key in TRAINER_ARGS else key: value for key, value in values.items()}
        if not {"bf16", "fp16"} & set(values) or "dtype" in values:
            return super().translate(values, say)
        bf16, fp16 = values.get("bf16"), values.get("fp16")
        rest = {key: value for key, value in values.items() if key not in ("bf16", "fp16")}
        if bf16 is None and fp16 is False:
            return super().translate(rest, say)
        return super().translate({**rest, "dtype": "auto" if bf16 else "fp16" if fp16 else "fp32"}, say)
