"""The named types that settings are made of: bounds, spellings, TRL field and help, each written once.

A stage picks only the name it uses and the default.  Nothing here imports more than pydantic.
"""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field, JsonValue
from pydantic_core import PydanticCustomError

from llmlab.settings.base import Alias, Trl, When
from llmlab.settings.paths import PathName, Reads

RLHF = (  # one file may hold the settings of all three
    "llmlab.settings.ppo:PPOSettings",
    "llmlab.settings.dpo:DPOSettings",
    "llmlab.settings.grpo:GRPOSettings",
)
LOWEST_LOSS = {"metric_for_best_model": "the best checkpoint is the one with the lowest validation loss"}
IMPLIED_BEST = {"metric_for_best_model": ("eval_loss", "loss")}


def conflict(message: str, *keys: str) -> PydanticCustomError:
    """Returns the error of a check between fields; the loader prefixes where the last of the keys was given."""
    return PydanticCustomError("conflict", "{message}", {"message": message, "keys": list(keys)})


# Optimization -----------------------------------------------------------------------------------------------------

LearningRate = Annotated[
    float, Gt(0), Trl("learning_rate"), Alias("lr"), Field(description="Peak learning rate, reached after warmup.")
]
WeightDecay = Annotated[
    float,
    Ge(0),
    Trl("weight_decay"),
    Field(description="Decoupled weight decay; norms, biases and embeddings are spared."),
]
MaxGradNorm = Annotated[
    float,
    Ge(0),
    Trl("max_grad_norm"),
    Alias("grad_clip"),
    Field(description="Gradients are scaled down to this norm; 0 turns clipping off."),
]
MaxSteps = Annotated[int, Gt(0), Trl("max_steps"), Field(description="Optimizer updates in all.")]
BatchSize = Annotated[
    int,
    Gt(0),
    Trl("per_device_train_batch_size"),
    Alias("per_device_batch_size"),
    Field(description="Sequences in one forward pass, on each device."),
]
GradientAccumulationSteps = Annotated[
    int,
    Gt(0),
    Trl("gradient_accumulation_steps"),
    Field(description="Forward passes added up before one update: the effective batch is batch_size times this."),
]
ADAMW = ("adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")  # the others in Transformers' words
LION = ("lion", "lion_8bit", "paged_lion_8bit", "paged_lion_32bit")
OptimizerName = Annotated[
    Literal[
        "adamw",
        "adafactor",
        "lion",
        "sophia",
        "muon",
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "lion_8bit",
        "paged_lion_8bit",
        "paged_lion_32bit",
    ],
    Field(
        description="Optimizer. muon takes 2-D hidden weights, and AdamW at 0.1 x the rate all others; the 8-bit and "
        "paged ones need bitsandbytes."
    ),
]
Beta = Annotated[float, Ge(0), Lt(1)]
AdamwBeta1 = Annotated[Beta, When("optimizer", *ADAMW), Field(description="Decay of AdamW's first moment.")]
AdamwBeta2 = Annotated[Beta, When("optimizer", *ADAMW), Field(description="Decay of AdamW's second moment.")]
AdamwEps = Annotated[float, Gt(0), When("optimizer", *ADAMW), Field(description="AdamW's term against division by 0.")]
LionBeta1 = Annotated[
    Beta, When("optimizer", *LION), Field(description="Lion's weight of the momentum in the update.")
]
LionBeta2 = Annotated[Beta, When("optimizer", *LION), Field(description="Decay of Lion's momentum.")]
SophiaBeta1 = Annotated[Beta, When("optimizer", "sophia"), Field(description="Decay of Sophia's momentum.")]
SophiaBeta2 = Annotated[Beta, When("optimizer", "sophia"), Field(description="Decay of Sophia's Hessian diagonal.")]
SophiaRho = Annotated[float, Gt(0), When("optimizer", "sophia"), Field(description="Sophia's clipping threshold.")]
SophiaUpdateEvery = Annotated[
    int,
    Gt(0),
    When("optimizer", "sophia"),
    Field(description="Steps between two estimates of Sophia's Hessian diagonal."),
]
MuonMomentum = Annotated[Beta, When("optimizer", "muon"), Field(description="Muon's momentum.")]
MuonNesterov = Annotated[bool, When("optimizer", "muon"), Field(description="Nesterov's form of Muon's momentum.")]
Scheduler = Annotated[
    Literal["none", "cosine", "linear", "polynomial"],
    Alias("lr_scheduler_type"),
    Field(description="How the learning rate falls after warmup; none keeps it."),
]
WarmupSteps = Annotated[
    int | Annotated[float, Lt(1)],
    Ge(0),
    Trl("warmup_steps"),
    Alias("warmup_ratio"),
    Field(description="Updates over which the learning rate rises to its peak; below 1 it is a share of all."),
]
GradientCheckpointing = Annotated[
    bool,
    Trl("gradient_checkpointing"),
    Field(description="Recompute activations in the backward pass: about a third slower, much less memory."),
]

Epochs = Annotated[
    float | None,
    Gt(0),
    Trl("num_train_epochs"),
    Alias("num_epochs"),
    Field(description="Passes over the training rows, instead of max_steps."),
]

# Rhythm -----------------------------------------------------------------------------------------------------------

LogEvery = Annotated[
    int, Gt(0), Trl("logging_steps"), Alias("log_interval"), Field(description="Steps between two logged lines.")
]
EvalEvery = Annotated[
    int,
    Gt(0),
    Alias("eval_interval"),
    Field(description="Steps between two evaluations on the validation data."),
]
EvalSteps = Annotated[int, Gt(0), Field(description="Validation batches in one evaluation.")]
SaveEvery = Annotated[
    int,
    Gt(0),
    Alias("save_steps", "save_interval"),
    Field(description="Steps between two checkpoints to resume from, beside those of the best evaluations."),
]
SaveBestOnly = Annotated[
    bool,
    Alias("load_best_model_at_end"),
    Field(
        description="End with the weights of the best evaluation, not the last ones, and save no evaluation but a new "
        "best. The last step is always saved too, so that a run can be resumed or extended."
    ),
]
SaveTotalLimit = Annotated[
    int | None,
    Gt(0),
    Trl("save_total_limit"),
    Field(
        description="Checkpoints kept on disk: so many of the best and the last, or the newest where nothing "
        "validates; none keeps all."
    ),
]

# Machine ----------------------------------------------------------------------------------------------------------

PolicyCheckpoint = Annotated[
    PathName,
    Reads("model"),
    Alias("model_name_or_path", "base_model", "init_from"),
    Field(min_length=1, description="What to train: a run folder, a hub id, or a folder of LoRA adapters."),
]
LARGEST_SEED = 2**32 - 1  # of numpy
Seed = Annotated[
    int, Ge(0), Le(LARGEST_SEED), Trl("seed"), Field(description="Seed of weights, data order and dropout.")
]
OutputDir = Annotated[PathName, Trl("output_dir"), Field(description="The run folder to write.")]
Dtype = Annotated[
    Literal["auto", "bf16", "fp16", "fp32"],
    Field(description="Arithmetic: auto is bf16 where the device computes it, fp16 on other GPUs, else fp32."),
]
Tf32 = Annotated[
    bool | None,
    Field(description="TF32 products on CUDA devices that have them; none leaves torch's choice."),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda", "mps"],
    Field(description="Where to compute; auto takes the accelerator that is there."),
]
Compile = Annotated[
    Literal["auto", True, False],
    Field(description="torch.compile; auto turns it on when the run is long enough to earn its warm-up back."),
]
DataloaderNumWorkers = Annotated[
    int,
    Ge(0),
    Le(256),
    Trl("dataloader_num_workers"),
    Field(description="Processes that load batches beside the training one."),
]
TrainerArgs = Annotated[
    dict[str, JsonValue],
    Field(description="Any further field of the underlying TRL or Transformers configuration, checked by name."),
]

# Conversations ----------------------------------------------------------------------------------------------------

MaxSeqLen = Annotated[
    int,
    Gt(1),
    Trl("max_length"),
    Alias("max_seq_length"),
    Field(description="Longest row in tokens; longer ones are cut, counted and reported."),
]
ChatTemplate = Annotated[
    PathName | None,
    Field(
        description="How conversations are written: chatml, or a Jinja file; none keeps the tokenizer's own template, "
        "and takes chatml where there is none."
    ),
]

# Preferences ------------------------------------------------------------------------------------------------------

EffectiveBatchSize = Annotated[
    int,
    Gt(0),
    Field(description="Rows of one update, over all processes and forward passes together."),
]
MiniBatchSize = Annotated[
    int,
    Gt(0),
    Trl("per_device_train_batch_size"),
    Alias("per_device_batch_size"),
    Field(description="Rows in one forward pass, on each device."),
]
Accumulation = Annotated[
    int | None,
    Gt(0),
    Field(description="Forward passes of an update; none follows from batch_size and mini_batch_size."),
]
MaxLength = Annotated[
    int,
    Gt(1),
    Trl("max_length"),
    Alias("max_seq_len", "max_seq_length"),
    Field(description="Longest prompt and completion together, in tokens; completions lose their end."),
]
MaxPromptLength = Annotated[
    int | None,
    Gt(0),
    Field(description="Longest prompt in tokens; longer ones lose their beginning, counted and reported."),
]
MaxSamples = Annotated[int | None, Gt(0), Field(description="Training rows at most, drawn by the seed; none is all.")]
EvalBatches = Annotated[int, Gt(0), Field(description="Validation batches in one evaluation.")]

AllowTruncated = Annotated[
    float,
    Ge(0),
    Le(1),
    Field(
        description="Share of rows that a length limit may leave with nothing to learn before a run refuses to start."
    ),
]

# Data -------------------------------------------------------------------------------------------------------------

Streaming = Annotated[bool, Field(description="Read the sources as they come, without a tokenized copy on disk.")]
NumProc = Annotated[
    int | None,
    Gt(0),
    Le(1024),
    Alias("dataset_num_proc"),
    Field(description="Processes that tokenize; none uses every core."),
]
CacheDir = Annotated[
    PathName | None, Field(description="Folder of tokenized corpora; none is ~/.cache/llmlab (or $LLMLAB_CACHE).")
]
ValidationFraction = Annotated[
    float,
    Ge(0),
    Lt(1),
    Field(description="Share of the documents held out, chosen by hash, where no validation source is named."),
]
AllowDropped = Annotated[
    float,
    Ge(0),
    Le(1),
    Field(description="Share of unusable rows (empty, not text) above which a run refuses to start."),
]
