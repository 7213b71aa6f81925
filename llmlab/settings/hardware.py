"""Where and in which precision a stage runs; what the machine has is probed by `llmlab.hardware`."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Resume, Settings, Trl

LAUNCH = "processes are started from outside: --accelerate ddp --num-processes N, or accelerate launch -m llmlab"
TRAINER_ARGS = ("ddp_find_unused_parameters", "ddp_bucket_cap_mb")  # of the RL guide's block for several GPUs


class DeviceSettings(Settings, panel="Hardware", resume=Resume.FREE):
    """Device and precision."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device; auto prefers CUDA, then MPS, then the CPU."""
    dtype: v.Dtype = "auto"
    """Precision of the computation; auto is bf16 where the device supports it, else fp16 on GPUs and fp32 on CPUs."""


class HardwareSettings(DeviceSettings, resume=Resume.FREE):
    """Device, precision, and what trades compute for memory or start-up time for speed."""

    inapplicable = dict.fromkeys(("distributed_strategy", "num_processes"), LAUNCH)

    tf32: bool | None = None
    """TF32 matrix products on CUDA devices that have them; none keeps torch's default."""
    compile: Literal["auto", True, False] = "auto"
    """torch.compile; auto enables it where the run is long enough to regain the compile time."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_2"] = "auto"
    """Attention kernels; auto is the model's own choice, sdpa for most. flash_attention_2 needs flash-attn, a CUDA GPU
    and bf16 or fp16."""
    use_liger_kernel: Annotated[bool, Trl("use_liger_kernel")] = False
    """Liger's fused layers, on CUDA, for architectures that liger-kernel knows."""
    gradient_checkpointing: Annotated[Literal["auto", True, False], Trl("gradient_checkpointing")] = False
    """Recompute activations in the backward pass: about a third slower, with much less memory; auto does so where the
    planned step does not fit into the device's memory without."""
    dataloader_num_workers: Annotated[int, Ge(0), Le(256), Trl("dataloader_num_workers")] = 0
    """Worker processes of the data loader; 0 loads in the training process."""

    @classmethod
    def translate(cls, values: dict[str, Any], warn: Callable[[str], None]) -> None:
        """Reads the RL guide's `bf16` and `fp16` ("use BF16 if available", "fallback if no BF16") as a dtype."""
        for key in values.keys() & TRAINER_ARGS:
            values[f"trainer_args.{key}"] = values.pop(key)
        if "dtype" not in values and values.keys() & {"bf16", "fp16"}:
            bf16, fp16 = values.pop("bf16", None), values.pop("fp16", None)
            if bf16 is not None or fp16 is not False:
                values["dtype"] = "auto" if bf16 else "fp16" if fp16 else "fp32"
        super().translate(values, warn)
