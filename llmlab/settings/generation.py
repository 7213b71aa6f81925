"""How text is sampled and where models run (what the machine has is probed by `llmlab.hardware`), and the settings of
the `sample` stage that writes samples of a model into a run folder."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, MinLen

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Resume, Settings
from llmlab.settings.paths import PathName, Reads


class SamplingSettings(Settings, panel="Sampling"):
    """Source: seed, LLM-Lab document, "Model Inference and Testing"."""

    temperature: Annotated[float, Ge(0)] = 0.7
    """Sampling temperature; 0 is greedy decoding."""
    top_p: v.TopP = 0.9
    top_k: v.TopK = 0
    max_new_tokens: v.MaxNewTokens = 256
    repetition_penalty: Annotated[float, Gt(0)] = 1.0
    """Above 1, repeated tokens become less likely."""


class DeviceSettings(Settings, panel="Hardware", resume=Resume.FREE):
    """Device and precision."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device; auto prefers CUDA, then MPS, then the CPU."""
    dtype: v.Dtype = "auto"
    """Precision of the computation; auto is bf16 where the device supports it, else fp16 on GPUs and fp32 on CPUs."""


class InferenceSettings(SamplingSettings, DeviceSettings):
    """Sampling, and the device and precision to do it with."""


class SampleSettings(SamplingSettings, panel="Sample"):
    """Completions of fixed prompts."""

    model: Annotated[PathName, Reads("model"), Alias("policy_checkpoint")]
    """Run folder or hub id."""
    prompts: Annotated[list[str], MinLen(1)]
    """Texts to complete, or user messages for a chat model."""
    num_samples: Annotated[int, Gt(0)] = 1
    """Completions of each prompt."""
    seed: v.Seed = 42
    """Seed of the sampling."""
    output_dir: v.OutputDir = "runs/sample"
