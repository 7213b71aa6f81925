"""LoRA adapters: which modules a preset means in any Transformers architecture, and the PEFT configuration.

Training, saving and loading adapters is PEFT's; merging them is in `merge.py`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmlab.settings.errors import UserError, did_you_mean
from llmlab.settings.lora import LoraSettings

Role = Literal["attention", "ffn"]

# where a linear layer sits, by the name of a module that holds it
PARENTS: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("attention", re.compile(r"attn|attention|^mixer$", re.IGNORECASE)),
    ("ffn", re.compile(r"mlp|ffn|feed_?forward|expert|moe", re.IGNORECASE)),
)
# where it sits, by its own name, in architectures whose layers hold their projections directly
LEAVES: dict[Role, set[str]] = {"attention": set(), "ffn": {"fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h"}}

QUERY_OR_VALUE = {"q_proj", "v_proj", "query", "value", "q", "v", "wq", "wv", "q_lin", "v_lin"}
FUSED = {"qkv_proj", "c_attn", "query_key_value", "Wqkv", "qkv", "in_proj", "att_proj"}


@dataclass(frozen=True)
class LinearModule:
    """A linear layer of the model: its full name, and where it sits (None: neither attention nor feed-forward)."""

    name: str
    role: Role | None

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def suffix(self) -> str:
        """The last two parts of the name, which tell GPT-2's `attn.c_proj` from its `mlp.c_proj`."""
        return ".".join(self.name.split(".")[-2:])


def linear_modules(model: nn.Module) -> list[LinearModule]:
    """Returns the linear layers of a model, the output head and a classifier's left out."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output and "." in name:
            found.append(LinearModule(name, _role(name)))
    return found


def _role(name: str) -> Role | None:
    *parents, leaf = name.split(".")
    for part in reversed(parents):
        for role, pattern in PARENTS:
            if pattern.search(part):
                return role
    return next((role for role, names in LEAVES.items() if leaf in names), None)


def find_targets(model: nn.Module, preset: str, custom: Iterable[str] | None = None) -> list[str]:
    """Returns the module-name endings that a preset means in this model.

    Args:
        model: any Transformers model.
        preset: `minimal` (queries and values, or the fused projection that holds them), `attention_only`, `ffn_only`,
            `all`, or `custom`.
        custom: the endings that `custom` takes, such as `["q_proj", "mlp.c_proj"]`.

    Raises:
        UserError: the preset matches nothing, or a custom ending names no linear module.

    Source: seed, LLM-Lab document, "LoRA Parameters".
    """
    modules = linear_modules(model)
    if preset == "custom":
        endings = list(custom or ())
        for ending in endings:
            if not any(module.name == ending or module.name.endswith(f".{ending}") for module in modules):
                known = _names(modules)
                raise UserError(
                    f"lora_target_modules: no linear module ends in '{ending}'{did_you_mean(ending, known)}; "
                    f"expected some of {', '.join(known)}"
                )
        return endings
    wanted = {
        "minimal": lambda m: m.role == "attention" and (m.leaf in QUERY_OR_VALUE or m.leaf in FUSED),
        "attention_only": lambda m: m.role == "attention",
        "ffn_only": lambda m: m.role == "ffn",
        "all": lambda m: m.role is not None,
    }[preset]
    chosen = [module for module in modules if wanted(module)]
    if not chosen:
        raise UserError(
            f"lora_preset = {preset}: it matches no module of this architecture; set lora_preset=custom and "
            f"lora_target_modules to some of {', '.join(_names(modules))}"
        )
    others = {module.leaf for module in modules if not wanted(module)}
    return sorted({module.suffix if module.leaf in others else module.leaf for module in chosen})


def _names(modules: list[LinearModule]) -> list[str]:
    return sorted({module.leaf for module in modules})


def lora_config(
    model: PreTrainedModel, settings: LoraSettings, new_tokens: Iterable[int] = (), *, task: str = "CAUSAL_LM"
) -> LoraConfig:
    """Returns the PEFT configuration of these settings for this model.

    Args:
        model: what the adapters will be attached to.
        settings: rank, scale, targets and the like.
        new_tokens: ids whose embedding rows (and output rows) are trained beside the adapters.
        task: PEFT's name of the model's task; with SEQ_CLS the head that scores is trained whole.

    Raises:
        UserError: the targets, or `modules_to_save`, name nothing in this model.
    """
    for name in settings.modules_to_save or ():
        if not any(module.rpartition(".")[2] == name for module, _ in model.named_modules()):
            leaves = sorted({module.rpartition(".")[2] for module, _ in model.named_modules() if module})
            raise UserError(
                f"modules_to_save: no module is called '{name}'{did_you_mean(name, leaves)}; "
                f"expected some of {', '.join(leaf for leaf in leaves if not leaf.isdigit())}"
            )
    whole = set(settings.modules_to_save or ())
    rows = {leaf: list(new_tokens) for leaf in _embeddings(model) if leaf not in whole} if new_tokens else None
    return LoraConfig(
        task_type=task,
        r=settings.lora_r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=find_targets(model, settings.lora_preset, settings.lora_target_modules),
        bias=settings.lora_bias,
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
        modules_to_save=settings.modules_to_save,
        trainable_token_indices=rows or None,
    )


def _embeddings(model: PreTrainedModel) -> list[str]:
    """Returns the last names of the input embedding and, where its weights are its own, of the output head."""
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outputs is None or outputs.weight is inputs.weight  # a classifier has no output embedding
    return [names[id(inputs)], *([] if tied else [names[id(outputs)]])]


def trainable_share(model: PreTrainedModel | PeftModel) -> tuple[int, int]:
    """Returns (trainable parameters, all parameters) of a model; 4-bit weights count as what they stand for."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
