"""What every training stage has, and what all but pretraining share: memory and speed, lengths, logging, evaluation,
checkpoints, and what a run does about symptoms in its metrics (`llmlab.health.checks`; defaults of the limits are in
`limits.yaml`). Pretraining and SFT have little beside that, so their settings are here too."""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le
from pydantic import Field, JsonValue, model_validator

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Resume, Settings, Trl, fields_of, settings_of_table, spellings_of
from llmlab.settings.data import Datasets, DataSettings, DataSource, TextDataSettings
from llmlab.settings.gates import GATE, GatesSettings
from llmlab.settings.generation import DeviceSettings
from llmlab.settings.lora import LoraSettings
from llmlab.settings.model import ModelSettings
from llmlab.settings.optimizer import OptimizerSettings
from llmlab.settings.paths import PathName, Reads

BESIDE_TRANSFORMERS_EVAL_STEPS = (
    *("save_steps", "logging_steps", "eval_strategy", "num_train_epochs", "per_device_train_batch_size"),
    "load_best_model_at_end",
)
BATCH = ("batch_size", "gradient_accumulation_steps")  # may be given together where they agree
LORA_KEYS = ("task_type", *(name for setting in fields_of(LoraSettings) for name in setting.spellings))
LAUNCH = "processes are started from outside: --accelerate ddp --num-processes N, or accelerate launch -m llmlab"
TRAINER_ARGS = ("ddp_find_unused_parameters", "ddp_bucket_cap_mb")  # of the RL guide's block for several GPUs

Response = Literal["warn", "stop", "rollback"]

HealthLimits = settings_of_table(
    "HealthLimits",
    __name__,
    "Limits of the checks, each with the name of its symptom; none turns a check off. Source: RL guide, section 7.",
    "limits",
    Annotated[float | None, Gt(0)],
    panel="Health",
    resume=Resume.FREE,
)


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


class HealthSettings(Settings, panel="Health", resume=Resume.FREE):
    """What a run does about symptoms. Source: seed, RL guide, sections 6 and 7."""

    on_warning: Response = "warn"
    """What a run does about a warning: print and record it, end with exit code 4, or go back to the last healthy
    checkpoint with changed settings (symptoms of too little training, and of data, are printed all the same)."""
    on_critical: Response = "warn"
    """The same for critical symptoms. A loss, gradient or weight that is not finite ends a run in any case, unless it
    is rolled back; other limits depend on model and data, so that by default no run is lost to them."""
    max_rollbacks: Annotated[int, Gt(0)] = 3
    """Rollbacks of a run; after them a warning is printed, and a critical symptom ends the run."""
    skip_spikes: Annotated[float | None, Ge(3)] = None
    """Leave out updates whose loss or gradient norm exceeds the mean of the last 128 steps by so many standard
    deviations (6 is usual); none takes all updates that are finite."""
    health: HealthLimits = HealthLimits.model_construct()


class TrainingSettings(HardwareSettings, OptimizerSettings, DataSettings, GatesSettings, HealthSettings):
    """What every training stage has. Source: seed, LLM-Lab document, "Base Training"."""

    panel = "Training"
    best_metrics: ClassVar[tuple[str, ...]] = ("eval_loss", "loss")  # metric_for_best_model of these changes nothing
    rows_per_pass: ClassVar[str] = "batch_size"  # the setting that counts the rows of a forward pass on a device

    output_dir: v.OutputDir
    max_steps: v.MaxSteps = 10000
    """Optimizer steps of the whole run."""
    weight_decay: v.WeightDecay = 0.0
    """Decoupled weight decay; norms, biases and embeddings get none."""
    warmup_steps: v.WarmupSteps = 0.1
    """Optimizer steps of linear warmup; below 1, a share of all steps."""
    auto_batch: Annotated[bool, Resume.LOCAL] = False
    """Out of memory, halve the rows of a forward pass, double the accumulation and take the step again, until one row
    is left."""
    log_every: Annotated[int, Gt(0), Trl("logging_steps"), Alias("log_interval"), Resume.FREE] = 10
    """Optimizer steps between logged lines."""
    eval_every: v.EvalEvery = 500
    """Optimizer steps between evaluations on the validation data."""
    save_best_only: v.SaveBestOnly = True
    """End with the weights of the best evaluation (lowest loss; highest reward in grpo and ppo) and save only
    evaluations that improve on it. The last step is saved in any case, so that the run can be resumed."""
    save_total_limit: v.SaveTotalLimit = 2
    """Checkpoints to keep: the best and the last ones, or the newest without validation; none keeps all."""
    report: Annotated[bool, Resume.LOCAL] = True
    """Write report.html at the end of the run: curves, health events, settings, and completions sampled on its way."""
    seed: v.Seed = 42
    """Seed of initialization, data order, dropout and sampling."""
    report_to: v.ReportTo = []
    """Trackers that get what metrics.jsonl gets, one or several; none are needed to watch a run. What sends metrics
    off this machine (wandb, mlflow) is said on the command line, not in a file."""
    trainer_args: Annotated[dict[str, JsonValue], Resume.FREE] = Field(default_factory=dict)
    """Further fields of the stage's TRL or Transformers configuration; names and types are checked."""

    @classmethod
    def translate(cls, values: dict[str, Any], warn: Callable[[str], None]) -> None:
        """Reads `eval_steps` as batches beside `eval_every`, and as the interval beside Transformers' words. The
        LLM-Lab document ("Evaluation Steps") counts batches with it, Transformers and the RL guide steps."""
        best = values.get("metric_for_best_model")
        if isinstance(best, str) and not best.startswith(GATE):
            del values["metric_for_best_model"]
            if best not in cls.best_metrics:
                kind = cls.best_metrics[0].replace("eval_", "validation ")
                warn(f"no effect here: 'metric_for_best_model' ({best} decides nothing: the {kind} does, or a gate)")
        batches = "eval_steps" if "eval_steps" in cls.model_fields else "eval_batches"
        own = spellings_of(cls)["eval_steps"].name
        beside = next((name for name in BESIDE_TRANSFORMERS_EVAL_STEPS if name in values), None)
        meaning, sense = own, ""
        if "eval_every" in values and (batches == "eval_steps" or batches not in values):
            meaning, beside, sense = batches, "eval_every", "validation batches of one evaluation"
        elif beside is not None and "eval_every" not in values:
            meaning, sense = "eval_every", "steps between evaluations"
        if "eval_steps" in values and meaning != own:
            values[meaning] = values.pop("eval_steps")
            warn(f"eval_steps = {values[meaning]} is set beside {beside}, so it counts {sense} ({meaning})")
        super().translate(values, warn)

    def contradictions(self) -> Iterator[str]:
        for names in self.alternatives:
            chosen = [name for name in names if name in self.model_fields_set and getattr(self, name) is not None]
            if chosen[1:] and names != BATCH:
                yield f"{chosen[0]} and {chosen[1]} set one quantity in two units; keep one"

    def accumulation(self, processes: int) -> int:
        """Returns the forward passes of one optimizer step on each of so many processes."""
        return self.gradient_accumulation_steps  # type: ignore[attr-defined]

    def effective_batch(self, processes: int) -> int:
        """Returns the rows of one optimizer step over all processes."""
        return getattr(self, self.rows_per_pass) * self.accumulation(processes) * processes


class PretrainSettings(TrainingSettings, TextDataSettings):
    """Pretraining on plain text. Source: seed, LLM-Lab document, "Base Training (Pretraining)"."""

    inapplicable = {
        **dict.fromkeys(LORA_KEYS, "pretraining updates all weights; adapters are for the stages after it"),
        **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs"), "pretraining counts in steps: max_steps"),
        **dict.fromkeys(("save_every", "save_steps"), "checkpoints are saved at evaluations: eval_every"),
        "max_samples": "pretraining reads as much text as max_steps takes",
    }

    model: ModelSettings = ModelSettings()
    init_from: Annotated[PathName | None, Reads("model"), Alias("policy_checkpoint", "model_name_or_path")] = None
    """Model to continue pretraining from, with its shape and tokenizer: a run folder or hub id (llmlab, Llama,
    Mistral, Qwen2, Qwen3)."""
    output_dir: v.OutputDir = "runs/pretrain"
    lr: v.LearningRate = 3e-4
    """Peak learning rate, after warmup."""
    weight_decay: v.WeightDecay = 0.1
    warmup_steps: v.WarmupSteps = 1000
    batch_size: v.BatchSize = 1
    """Sequences of one forward pass, per device."""
    gradient_accumulation_steps: v.Accumulation = 64
    """Forward passes of one optimizer step: the effective batch is batch_size times this, per device."""
    grad_clip: v.MaxGradNorm = 1.0
    """Clip the global gradient norm to this; 0 turns clipping off."""
    eval_steps: v.EvalBatches = 100

    def contradictions(self) -> Iterator[str]:
        if self.head_lr is not None and self.model.tie_word_embeddings and self.init_from is None:
            yield (
                f"head_lr = {self.head_lr:g} beside tie_word_embeddings: the head is the embedding, whose rate is "
                "embedding_lr; set tie_word_embeddings = false, or leave head_lr out"
            )

    def recorded(self) -> dict[str, Any]:
        """Leaves out the shape beside init_from, whose model has its own."""
        shape = {"model": {"max_seq_len": self.model.max_seq_len}} if self.init_from else {}
        return super().recorded() | shape


class FineTuningSettings(LoraSettings, TrainingSettings, panel="Training", alternatives=(("max_steps", "epochs"),)):
    """What the stages share that start from a trained model."""

    policy_checkpoint: v.PolicyCheckpoint = "sft_checkpoints"
    """Model to train: a run folder, a hub id, or a folder of LoRA adapters."""
    epochs: v.Epochs = None
    """Epochs over the training rows (prompts in grpo and ppo), instead of max_steps."""
    learning_rate: v.LearningRate = 1.4e-5
    """Peak learning rate, after warmup."""
    max_grad_norm: v.MaxGradNorm = 1.0
    """Clip the global gradient norm to this; 0 turns clipping off."""
    max_samples: Annotated[int | None, Gt(0)] = None
    """Training rows at most, drawn at random from the beginning of each source (8,192 rows or more); none is all."""
    chat_template: PathName | None = None
    """Chat template: chatml, chatml_compact (tools without their JSON schemas) or a Jinja file; none keeps the
    tokenizer's, or uses chatml where it has none."""
    save_every: v.SaveEvery = 500
    """Optimizer steps between checkpoints to resume from; those of the best evaluations come in addition."""
    save_best_only: v.SaveBestOnly = False

    @model_validator(mode="before")
    @classmethod
    def prefer_given_steps(cls, values: Any) -> Any:
        """Takes `max_steps` alone as the length of the run, where a stage counts in epochs by default."""
        if isinstance(values, dict) and "max_steps" in values and "epochs" not in values:
            return {**values, "epochs": None}
        return values


class SFTSettings(FineTuningSettings):
    """Supervised fine-tuning. Source: seed, LLM-Lab document, "Supervised Fine-Tuning (SFT)" and "LoRA for SFT"."""

    inapplicable = {
        "streaming": "every row is checked before the first step; large sources are read as far as the run needs"
    }

    policy_checkpoint: v.PolicyCheckpoint = "runs/pretrain"
    datasets: Datasets = [DataSource.model_construct(name="HuggingFaceTB/smoltalk2", subset="SFT")]
    validation_fraction: v.ValidationFraction = 0.05
    output_dir: v.OutputDir = "sft_checkpoints"
    batch_size: v.BatchSize = 4
    """Sequences of one forward pass, per device."""
    gradient_accumulation_steps: v.Accumulation = 16
    """Forward passes of one optimizer step: the effective batch is batch_size times this, per device."""
    max_steps: v.MaxSteps = 5000
    learning_rate: v.LearningRate = 5e-6
    weight_decay: v.WeightDecay = 0.01
    warmup_steps: v.WarmupSteps = 100
    max_seq_len: v.MaxLength = 1024
    """Longest row in tokens; longer ones are truncated at the end, counted and reported."""
    packing: Annotated[bool, Trl("packing")] = False
    """Pack several conversations into one row; attention does not cross their borders."""
    loss_on: Literal["assistant", "completion", "all"] = "assistant"
    """Tokens in the loss: all assistant turns, only the last one (completion), or all tokens."""
    only_label: bool | None = None
    """For unpaired preferences (KTO): train only on completions with this `label`."""
    allow_truncated: v.AllowTruncated = 0.05
    eval_steps: v.EvalBatches = 50
    save_best_only: v.SaveBestOnly = True
