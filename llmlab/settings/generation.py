"""How text is sampled, and the settings of the `generate` stage that writes samples of a model into a run folder."""

from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le
from pydantic import Field

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Settings
from llmlab.settings.paths import PathName, Reads


class SamplingSettings(Settings):
    """Source: seed, LLM-Lab document, "Model Inference and Testing"."""

    panel: ClassVar[str] = "Sampling"

    temperature: Annotated[float, Ge(0)] = Field(
        0.7, description="Sharpness of the choice; 0 takes the likeliest token."
    )
    top_p: Annotated[float, Gt(0), Le(1)] = Field(
        0.9, description="Choose among the tokens that hold this probability."
    )
    top_k: Annotated[int, Ge(0)] = Field(0, description="Choose among this many tokens; 0 is all.")
    max_new_tokens: Annotated[int, Gt(0)] = Field(256, description="Longest completion in tokens.")
    repetition_penalty: Annotated[float, Gt(0)] = Field(1.0, description="Above 1 makes repeated tokens less likely.")


class GenerateSettings(SamplingSettings):
    """Write completions of prompts, to see what a model learned."""

    panel: ClassVar[str] = "Generate"

    model: Annotated[PathName, Reads("model"), Alias("policy_checkpoint")] = Field(
        description="Run folder or hub id.", min_length=1
    )
    prompts: list[str] = Field(description="Texts to continue, or to answer where the model chats.", min_length=1)
    num_samples: Annotated[int, Gt(0)] = Field(1, description="Completions of each prompt.")
    seed: v.Seed = 42
    output_dir: v.OutputDir = "runs/generate"
