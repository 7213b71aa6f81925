"""The named types of settings that several stages have: bounds, spellings, TRL field and help, each written once.

A stage picks the name and the default. A setting of one class is declared there, with a docstring as its help.
"""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import JsonValue
from pydantic_core import PydanticCustomError

from llmlab.settings.base import Alias, Help, Resume, Trl
from llmlab.settings.paths import PathName, Reads

RLHF = (  # the LLM-Lab document keeps the settings of all three in one file
    "llmlab.settings.ppo:PPOSettings",
    "llmlab.settings.dpo:DPOSettings",
    "llmlab.settings.grpo:GRPOSettings",
)
LARGEST_SEED = 2**32 - 1  # NumPy's


def conflict(message: str, *keys: str) -> PydanticCustomError:
    """Returns the error of a check between fields; the loader adds where the last of the keys was set."""
    return PydanticCustomError("conflict", "{message}", {"message": message, "keys": list(keys)})


# Optimization: a resumed run may change what its optimizer does, not what it has accumulated

LearningRate = Annotated[
    float, Gt(0), Trl("learning_rate"), Alias("lr"), Resume.NEW_OPTIMIZER, Help("Peak learning rate, after warmup.")
]
WeightDecay = Annotated[
    float,
    Ge(0),
    Trl("weight_decay"),
    Resume.NEW_OPTIMIZER,
    Help("Decoupled weight decay; norms, biases and embeddings get none."),
]
MaxGradNorm = Annotated[
    float,
    Ge(0),
    Trl("max_grad_norm"),
    Alias("grad_clip"),
    Resume.NEW_OPTIMIZER,
    Help("Clip the global gradient norm to this; 0 turns clipping off."),
]
WarmupSteps = Annotated[
    int | Annotated[float, Lt(1)],
    Ge(0),
    Trl("warmup_steps"),
    Alias("warmup_ratio"),
    Resume.NEW_OPTIMIZER,
    Help("Optimizer steps of linear warmup; below 1, a share of all steps."),
]
MaxSteps = Annotated[int, Gt(0), Trl("max_steps"), Resume.FREE, Help("Optimizer steps of the whole run.")]
Epochs = Annotated[
    float | None,
    Gt(0),
    Trl("num_train_epochs"),
    Alias("num_epochs"),
    Resume.FREE,
    Help("Epochs over the training rows (prompts in grpo and ppo), instead of max_steps."),
]
BatchSize = Annotated[
    int,
    Gt(0),
    Trl("per_device_train_batch_size"),
    Alias("per_device_batch_size"),
    Help("Sequences of one forward pass, per device."),
]
GradientAccumulationSteps = Annotated[
    int,
    Gt(0),
    Trl("gradient_accumulation_steps"),
    Help("Forward passes of one optimizer step: the effective batch is batch_size times this, per device."),
]
EffectiveBatchSize = Annotated[int, Gt(0), Help("Pairs of one optimizer step, over all devices.")]
MiniBatchSize = Annotated[
    int,
    Gt(0),
    Trl("per_device_train_batch_size"),
    Alias("per_device_batch_size"),
    Help("Rows of one forward pass, per device: pairs, or completions in grpo and ppo."),
]

# Logging, evaluation, checkpoints

EvalEvery = Annotated[
    int,
    Gt(0),
    Alias("eval_interval", "eval_steps"),
    Resume.FREE,
    Help("Optimizer steps between evaluations on the validation data."),
]
EvalBatches = Annotated[int, Gt(0), Resume.FREE, Help("Validation batches of one evaluation.")]
SaveEvery = Annotated[
    int,
    Gt(0),
    Alias("save_steps", "save_interval"),
    Resume.FREE,
    Help("Optimizer steps between checkpoints to resume from; those of the best evaluations come in addition."),
]
SaveBestOnly = Annotated[
    bool,
    Alias("load_best_model_at_end"),
    Resume.FREE,
    Help(
        "End with the weights of the best evaluation (lowest loss; highest reward in grpo and ppo) and save only "
        "evaluations that improve on it. The last step is saved in any case, so that the run can be resumed."
    ),
]
SaveTotalLimit = Annotated[
    int | None,
    Gt(0),
    Trl("save_total_limit"),
    Resume.FREE,
    Help("Checkpoints to keep: the best and the last ones, or the newest without validation; none keeps all."),
]

# Models, devices, folders

PolicyCheckpoint = Annotated[
    PathName,
    Reads("model"),
    Alias("model_name_or_path", "base_model", "init_from"),
    Help("Model to train: a run folder, a hub id, or a folder of LoRA adapters."),
]
ReferenceCheckpoint = Annotated[
    PathName | None,
    Reads("model"),
    Alias("ref_model"),
    Help("Frozen reference model: a run folder or hub id; none is the initial policy, with LoRA at no extra memory."),
]
Seed = Annotated[
    int, Ge(0), Le(LARGEST_SEED), Trl("seed"), Help("Seed of initialization, data order, dropout and sampling.")
]
OutputDir = Annotated[PathName, Trl("output_dir"), Resume.LOCAL, Help("Run folder to write.")]
Dtype = Literal["auto", "bf16", "fp16", "fp32"]
TrainerArgs = Annotated[
    dict[str, JsonValue],
    Resume.FREE,
    Help("Further fields of the stage's TRL or Transformers configuration; names and types are checked."),
]

# Data

ValidationFraction = Annotated[
    float, Ge(0), Lt(1), Help("Share of the rows held out for validation, by hash, unless validation_datasets is set.")
]
MaxLength = Annotated[
    int,
    Gt(1),
    Trl("max_length"),
    Alias("max_seq_len", "max_seq_length"),
    Help("Longest row in tokens; longer ones are truncated at the end, counted and reported."),
]
MaxSamples = Annotated[int | None, Gt(0), Help("Training rows at most, a random sample; none is all.")]
ChatTemplate = Annotated[
    PathName | None,
    Help("Chat template: chatml or a Jinja file; none keeps the tokenizer's, or uses chatml where it has none."),
]
AllowTruncated = Annotated[
    float,
    Ge(0),
    Le(1),
    Resume.FREE,
    Help("Largest share of rows that may lose all trained tokens to the length limit; more is an error."),
]
