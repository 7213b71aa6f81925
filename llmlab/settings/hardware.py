"""Where and in which arithmetic a stage runs; what the machine has is probed by `llmlab.hardware`."""

from typing import ClassVar

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Settings


class HardwareSettings(Settings):
    """Everything is `auto` until somebody knows better."""

    panel: ClassVar[str] = "Machine"

    device: v.Device = "auto"
    dtype: v.Dtype = "auto"
    compile: v.Compile = "auto"
    gradient_checkpointing: v.GradientCheckpointing = False
    dataloader_num_workers: v.DataloaderNumWorkers = 0
