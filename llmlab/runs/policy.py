"""Loads the policy: the model a stage trains (full fine-tuning or LoRA), its tokenizer and its chat template; and
decides whether compiling its layers pays for a run. Data and losses are the stages'."""

import copy
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from torch._functorch import config as partitioning
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmlab.adapters import lora_config, trainable_share
from llmlab.data.chat.rendering import add_chat_template
from llmlab.data.tokenizer import load_tokenizer, stop_token_ids
from llmlab.hardware import Hardware
from llmlab.inference import context_length
from llmlab.model import fit_vocabulary, load_classifier, load_model, read_adapter
from llmlab.model.attention import BIAS_IMPLEMENTATIONS
from llmlab.model.causal_blocks import use_blocks
from llmlab.model.norms import use_fast_norms
from llmlab.runs._trl import expose_head_bias
from llmlab.runs.progress import human, quiet_libraries
from llmlab.settings.base import fields_of, show
from llmlab.settings.errors import UserError, reading
from llmlab.settings.lora import LoraSettings
from llmlab.terminal import duration

LORA_FIELDS = {  # setting -> LoraConfig field that must agree when an adapter is trained further
    **{name: name for name in ("lora_alpha", "lora_dropout", "use_dora", "use_rslora")},
    **{f"lora_{name}": name for name in ("r", "bias", "target_modules")},
}


# of compiling: measured once (benchmarks/train_step.py), not by a trial in every run
WARM_UP = 30.0  # seconds that compiling training (20 to 26) and evaluation (3 to 7) takes, from an empty cache
SAVED = {"cpu": 0.1, "cuda": 0.2}  # share of a step that compiling saves, of a small model's twice as much
SAVED_DYNAMIC = 0.5  # of that, where batches vary in length
SPEED = {"cpu": 1e11, "cuda": 2e14}  # eager training FLOP/s (a CPU's for each core), rather over- than underrated
MARGIN = 1.25  # a machine may be slower to compile than ours


@dataclass(frozen=True)
class Policy:
    """A model ready to be trained, and its tokenizer with a chat template."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    parents: list[str]  # the folder or hub id it comes from, and the base model of an adapter
    stops: tuple[int, ...]  # token ids that end generation
    new_tokens: list[str]  # added for the chat template

    @property
    def continues_adapter(self) -> bool:
        """Whether the adapters are those of an earlier run."""
        return isinstance(self.model, PeftModel) and len(self.parents) > 1

    def new_adapters(self, settings: LoraSettings) -> LoraConfig | None:
        """Returns the LoraConfig for the trainer to attach; None without LoRA or with adapters attached already."""
        if not settings.use_lora or isinstance(self.model, PeftModel):
            return None
        return lora_config(self.model, settings, self.tokenizer.convert_tokens_to_ids(self.new_tokens))

    def cap_length(self, length: int) -> int:
        """Caps a length in tokens at the model's context length."""
        return min(length, context_length(self.model) or length)

    def rows(self, model: PreTrainedModel | PeftModel) -> list[tuple[str, str]]:
        """Returns the plan's rows about the model; pass the trainer's model, which may have adapters attached."""
        trainable, total = trainable_share(model)
        rows = [("model", f"{' on '.join(self.parents)}: {human(total)} parameters")]
        if isinstance(model, PeftModel):
            adapter = model.active_peft_config
            kind = "DoRA" if adapter.use_dora else "rsLoRA" if adapter.use_rslora else "LoRA"
            targets = ", ".join(sorted(adapter.target_modules))
            rows.append(("adapter", f"{kind} r {adapter.r}, alpha {adapter.lora_alpha:g} on {targets}"))
            rows.append(("trained", f"{human(trainable)} parameters, {trainable / total:.2%} of all"))
        if self.new_tokens:
            rows.append(("new tokens", f"{', '.join(self.new_tokens)}: their embeddings are trained"))
        return rows


def load_policy(
    source: str,
    settings: LoraSettings,
    hardware: Hardware,
    *,
    chat_template: str | None,
    attach: bool = True,
    task: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM",
) -> Policy:
    """Loads the policy from a run folder or hub id of a full model or of LoRA adapters, to train these further. Whole
    models are kept in fp32 and trained under autocast; with adapters the frozen weights have the run's dtype.
    `attach=False` leaves new adapters to the trainer; the task `SEQ_CLS` is a reward model with a new scalar head."""
    classifies = task == "SEQ_CLS"
    adapter = read_adapter(source, lora_only=not classifies)
    if adapter is not None and classifies:
        raise UserError(
            f"policy_checkpoint = {source}: a reward model starts from a whole model; merge it: llmlab merge"
        )
    if adapter is not None:
        _check_same_adapter(source, adapter.config, settings)
    quantization = None
    if settings.use_qlora:
        kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=hardware.torch_dtype, **kind)
    frozen = adapter is not None or settings.use_lora
    options = {"dtype": hardware.torch_dtype if frozen else torch.float32, "quantization_config": quantization}
    load = load_classifier if classifies else load_model
    model = load(source, **options) if adapter is None else adapter.load_base(load, **options)
    tokenizer = load_tokenizer(source if adapter is None else adapter.tokenizer_source)
    new_tokens = add_chat_template(tokenizer, chat_template)
    if new_tokens and adapter is not None:
        problem = f"it adds tokens ({', '.join(new_tokens)}), which the adapter in {source} cannot train"
        raise UserError(f"chat_template = {chat_template}: {problem}; merge it first: llmlab merge")
    fit_vocabulary(model, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"{source}: its tokenizer has no eos token: is its tokenizer_config.json missing?")
    stops = set_stop_tokens(model, tokenizer)
    if quantization is not None:
        from bitsandbytes.nn import Linear4bit

        for module in model.modules():
            if isinstance(module, Linear4bit):
                # evaluation on CPUs repacks 4-bit weights, which rounds their scales in the middle of a run
                module.support_avx512bf16_for_cpu = False
        # Trainer enables gradient checkpointing itself
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if adapter is not None:
        model = adapter.attach(model, is_trainable=True)
        check_head(model, source)
    elif settings.use_lora and attach:
        ids = tokenizer.convert_tokens_to_ids(new_tokens)
        model = get_peft_model(model, lora_config(model, settings, ids, task=task))
    if isinstance(model, PeftModel):
        expose_head_bias(model)
    parents = [source] if adapter is None else [source, adapter.base]
    return Policy(model, tokenizer, parents, stops, new_tokens)


def check_head(model: PeftModel, source: str) -> None:
    """Refuses LoRA weights of the output head, which losses that read the head's weight would leave out."""
    if isinstance(model.get_base_model().get_output_embeddings(), LoraLayer):
        problem = "its adapter has LoRA weights of the output head, which the losses do not support"
        raise UserError(f"policy_checkpoint = {source}: {problem}; merge it first: llmlab merge")


def load_reference(settings: Any, policy: Policy) -> tuple[PreTrainedModel | None, str]:
    """Returns the frozen reference model and its description; None where it is the policy without its adapters."""
    named = settings.reference_checkpoint
    same = [named is not None and os.path.abspath(named) == os.path.abspath(parent) for parent in policy.parents]
    if named is None or same[0]:
        if policy.continues_adapter:
            return None, "a frozen copy of the initial adapters"
        if settings.use_lora:
            return None, "the policy with its adapters disabled"
        return copy.deepcopy(policy.model), "a frozen copy of the initial policy"
    if policy.continues_adapter and same[1]:
        problem = f"not supported with the adapters of {policy.parents[0]}, which began there"
        advice = "leave it out (the initial adapters), or merge them first: llmlab merge"
        raise UserError(f"reference_checkpoint = {named}: {problem}; {advice}")
    tokenizer = load_tokenizer(named)
    if tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        sizes = f"({len(tokenizer):,} tokens) than the policy ({len(policy.tokenizer):,})"
        problem = f"it has another vocabulary {sizes}, so their probabilities cannot be compared"
        raise UserError(f"reference_checkpoint = {named}: {problem}")
    dtype = next(policy.model.parameters()).dtype if settings.use_lora else torch.float32
    with quiet_libraries():
        reference = load_model(named, dtype=dtype)
    fit_vocabulary(reference, policy.tokenizer)
    return reference, named


def set_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Adds the end-of-turn token to the generation config's eos ids, and returns all; classifiers have none."""
    if not model.can_generate():
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        return ()
    config = model.generation_config
    known = config.eos_token_id
    known = known if isinstance(known, list) else [known]
    stops = tuple(dict.fromkeys(stop for stop in [*stop_token_ids(tokenizer), *known] if stop is not None))
    config.eos_token_id = list(stops)
    config.pad_token_id = tokenizer.pad_token_id
    return stops


def choose_kernels(model: PreTrainedModel | PeftModel, settings: Any, on_cpu: bool) -> None:
    """Makes a model compute attention as the settings say, and refuses kernels that its architecture does not have."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    if on_cpu:
        use_fast_norms(model)
    name, kind = settings.attn_implementation, model.config.model_type
    if settings.use_liger_kernel:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # Liger only logs it, and Transformers the next one
            raise UserError(f"use_liger_kernel = true: liger-kernel has no layers for model_type = {kind}")
    if name != "auto":
        wish, biased = f"attn_implementation = {name}", getattr(model.config, "positional_encoding", "") == "alibi"
        with reading(wish, f"kernels of model_type = {kind}"):
            model.set_attn_implementation(name)
        if model.config._attn_implementation != name or biased and name not in BIAS_IMPLEMENTATIONS:
            raise UserError(f"{wish}: not supported by this model (model_type = {kind}); expected auto or sdpa")
    elif on_cpu and hasattr(settings, "policy_checkpoint") and not hasattr(settings, "rollout"):
        use_blocks(model)


def _check_same_adapter(source: str, adapter: PeftConfig, settings: LoraSettings) -> None:
    """Checks that the LoRA settings agree with the adapter that is trained further."""
    for setting in fields_of(type(settings)):
        if setting.name not in LORA_FIELDS:
            continue
        value, trained = setting.of(settings), getattr(adapter, LORA_FIELDS[setting.name])
        if setting.name == "lora_target_modules":
            value, trained = value and sorted(value), sorted(trained)
        if value not in (setting.default, trained):
            problem = f"{source} is trained further, whose adapter has {show(trained)}"
            advice = "leave it out, or merge the adapter first: llmlab merge"
            raise UserError(f"{setting.key} = {show(value)}: {problem}; {advice}")


def decide_compile(
    setting: Literal["auto"] | bool,
    *,
    device_type: str,
    steps: int,
    tokens_per_step: float,
    parameters: int,
    dynamic: bool = False,
) -> tuple[bool, str]:
    """Returns whether to compile, and why, for so many steps of this process; dynamic: batches vary in length."""
    if setting is False:
        return False, "off, as asked"
    missing = missing_tool(device_type)
    if setting is True:
        if missing:
            raise UserError(
                f"compile = true: torch.compile needs {missing}, not found here; install it or leave it off"
            )
        return True, "on, as asked"
    if device_type not in SAVED:
        return False, f"off: not measured on {device_type}"
    if missing:
        return False, f"off: it needs {missing}, not found here"
    speed = SPEED[device_type] * (os.cpu_count() or 1 if device_type == "cpu" else 1)
    share = SAVED[device_type] * (SAVED_DYNAMIC if dynamic else 1)
    saved = share * steps * tokens_per_step * 6 * parameters / speed  # 6: arXiv 2001.08361, section 2.1
    if saved < MARGIN * WARM_UP:
        return False, f"off: this run would save about {duration(saved)} and wait up to {duration(WARM_UP)} for it"
    return True, f"on: saves about {duration(saved)} for up to {duration(WARM_UP)} of waiting at the start"


def missing_tool(device_type: str) -> str | None:
    """Returns what torch.compile needs and this machine lacks, or None."""
    default = "clang++" if sys.platform == "darwin" else "g++"
    compiler = os.environ.get("CXX", default) if device_type == "cpu" else os.environ.get("CC", "gcc")
    if sys.platform != "win32" and shutil.which(compiler) is None:
        return f"a {'C++' if device_type == 'cpu' else 'C'} compiler ({compiler})"
    if not any((Path(sysconfig.get_path(name)) / "Python.h").is_file() for name in ("include", "platinclude")):
        return "Python's C headers (on Debian the package python3-dev)"
    return None


def compile_layers(model: torch.nn.Module, *, dynamic: bool = False) -> bool:
    """Compiles each layer of a decoder in place; returns False where its architecture has no list of layers."""
    layers = next((part for name, part in model.named_modules() if name.endswith("layers")), None)
    for layer in layers.children() if layers is not None else ():
        layer.compile(dynamic=dynamic, **({} if dynamic else {"backend": recompute_elementwise}))
    return layers is not None


def compile_if_worth(model: torch.nn.Module, setting: Literal["auto"] | bool, *, dynamic: bool, **run: Any) -> str:
    """Compiles a decoder's layers where `decide_compile` says so of the run; returns why."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    compiled, reason = decide_compile(setting, parameters=parameters, dynamic=dynamic, **run)
    if compiled and not compile_layers(model, dynamic=dynamic):
        reason = "this architecture has no list of 'layers' to compile"
        if setting is True:
            raise UserError(f"compile = true: {reason}; leave it off")
        return f"off: {reason}"
    return reason


def recompute_elementwise(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Compiles a graph as `inductor` does, but saves only products and attention for the backward pass. What lies
    between them (norms, rotary embeddings, activations, bf16 copies of weights) is recomputed, which takes no longer
    than reading it back and halves the activations' memory."""
    # the second flag is for attention, an operator that is not torch's own
    with partitioning.patch(aggressive_recomputation=True, is_non_builtin_to_include=True):
        return torch._dynamo.lookup_backend("inductor")(graph, example_inputs)
