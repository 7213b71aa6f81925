"""The named types of settings that several stages have: bounds, spellings and TRL field, each written once. A stage
picks the name and the default. Help is the docstring of a field where it is first declared."""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator

from llmlab.settings.base import Alias, Help, Resume, Trl
from llmlab.settings.paths import PathName, Reads

RLHF = (  # the LLM-Lab document keeps the settings of all three in one file
    "llmlab.settings.rl:PPOSettings",
    "llmlab.settings.preference:DPOSettings",
    "llmlab.settings.rl:GRPOSettings",
)
LARGEST_SEED = 2**32 - 1  # NumPy's


def read_names(value: Any) -> Any:
    """Returns one name, names with commas, or a list of them as a list, each once and without `none`."""
    entries = value if isinstance(value, list) else [value]
    names = [name.strip() for entry in entries for name in str(entry).split(",")]
    return [name for name in dict.fromkeys(names) if name.lower() not in ("none", "null")]


# A resumed run may change how its optimizer steps, not what the optimizer has accumulated
LearningRate = Annotated[float, Gt(0), Trl("learning_rate"), Alias("lr"), Resume.NEW_OPTIMIZER]
WeightDecay = Annotated[float, Ge(0), Trl("weight_decay"), Resume.NEW_OPTIMIZER]
MaxGradNorm = Annotated[float, Ge(0), Trl("max_grad_norm"), Alias("grad_clip"), Resume.NEW_OPTIMIZER]
Warmup = int | Annotated[float, Lt(1)]
WarmupSteps = Annotated[Warmup, Ge(0), Trl("warmup_steps"), Alias("warmup_ratio"), Resume.NEW_OPTIMIZER]

MaxSteps = Annotated[int, Gt(0), Trl("max_steps"), Resume.FREE]
Epochs = Annotated[float | None, Gt(0), Trl("num_train_epochs"), Alias("num_epochs"), Resume.FREE]
BatchSize = Annotated[int, Gt(0), Trl("per_device_train_batch_size"), Alias("per_device_batch_size"), Resume.SPLIT]
Accumulation = Annotated[int, Gt(0), Trl("gradient_accumulation_steps"), Resume.SPLIT]
EffectiveBatchSize = Annotated[int, Gt(0)]
EvalEvery = Annotated[int, Gt(0), Alias("eval_interval", "eval_steps"), Resume.FREE]
EvalBatches = Annotated[int, Gt(0), Resume.FREE, Help("Validation batches of one evaluation.")]
SaveEvery = Annotated[int, Gt(0), Alias("save_steps", "save_interval"), Resume.FREE]
SaveBestOnly = Annotated[bool, Alias("load_best_model_at_end"), Resume.FREE]
SaveTotalLimit = Annotated[int | None, Gt(0), Trl("save_total_limit"), Resume.FREE]
Seed = Annotated[int, Ge(0), Le(LARGEST_SEED), Trl("seed")]
Tracker = Literal["none", "trackio", "tensorboard", "wandb", "mlflow"]
ReportTo = Annotated[list[Tracker], BeforeValidator(read_names), Trl("report_to"), Resume.LOCAL]
OutputDir = Annotated[PathName, Trl("output_dir"), Resume.LOCAL, Help("Run folder to write.")]
MaxNewTokens = Annotated[int, Gt(0), Alias("max_completion_length"), Help("Longest completion in tokens.")]
TopK = Annotated[int, Ge(0), Help("Sample among the k most likely tokens; 0 is all.")]
TopP = Annotated[float, Gt(0), Le(1), Help("Nucleus sampling: the smallest set of tokens with this probability.")]
Dtype = Literal["auto", "bf16", "fp16", "fp32"]

ValidationFraction = Annotated[float, Ge(0), Lt(1)]
MaxLength = Annotated[int, Gt(1), Trl("max_length"), Alias("max_seq_len", "max_seq_length")]
AllowTruncated = Annotated[
    float,
    Ge(0),
    Le(1),
    Resume.FREE,
    Help("Largest share of rows that may lose all trained tokens to the length limit; more is an error."),
]
PolicyCheckpoint = Annotated[PathName, Reads("model"), Alias("model_name_or_path", "base_model", "init_from")]
ReferenceCheckpoint = Annotated[
    PathName | None,
    Reads("model"),
    Alias("ref_model"),
    Help("Frozen reference model: a run folder or hub id; none is the initial policy, with LoRA at no extra memory."),
]
