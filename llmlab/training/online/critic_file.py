"""Where a critic's weights come from and go to: a reward model that it starts from, a file of its own in checkpoints,
and nothing of it in the policy's files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmlab.adapters import lora_config
from llmlab.data.tokenizer import load_tokenizer
from llmlab.model import fit_vocabulary, load_classifier, load_config, read_adapter
from llmlab.runs._trl import gather, scatter
from llmlab.settings.errors import UserError

FILE = "critic.safetensors"


class PolicyPart(nn.Module):
    """A part of a policy, `policy.critic`, that is in no state dict of it and has a file beside its own."""

    def attach(self, policy: PreTrainedModel | PeftModel) -> None:
        """Makes this a part of the policy."""
        self.register_load_state_dict_post_hook(_forgive)
        policy.critic = self
        object.__setattr__(self, "policy", policy)  # outside the module tree: a parent reference would be a cycle
        if isinstance(policy, PeftModel):  # PEFT would look for the critic's adapters in the policy's files
            policy.save_pretrained = self.detached()(policy.save_pretrained)
            policy.load_adapter = self.detached()(policy.load_adapter)

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Removes the critic from the policy's modules within, or within each call of a method it decorates."""
        del self.policy.critic
        try:
            yield
        finally:
            self.policy.critic = self

    def trained(self) -> dict[str, Tensor]:
        """Returns the trainable parameters by name; frozen ones are restored from their source."""
        return {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}

    def save(self, folder: Path | None) -> None:
        """Saves the trainable parameters, on the process that has a folder; all call it, as they may be sharded."""
        whole = gather(self.trained(), keep=folder is not None)
        if folder is not None:
            save_file({name: tensor.contiguous() for name, tensor in whole.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        saved, mine = load_file(folder / FILE), self.trained()
        if saved.keys() != mine.keys():
            others = sorted(saved.keys() ^ mine.keys())
            raise ValueError(f"{folder / FILE}: a critic with other parameters: {others[:3]} ...")
        for name, tensor in mine.items():
            tensor.copy_(scatter(saved[name], tensor))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Is empty, so that no export of the policy has a part of the critic in it."""
        return kwargs.get("destination", args[0] if args else {})


def _forgive(critic: PolicyPart, keys: Any) -> None:
    """Lets a strict load, which DeepSpeed's is, go without the critic's weights: they have a file of their own."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if "critic." not in key]


def load_scorer(run: Any) -> PreTrainedModel | PeftModel | None:
    """Returns the reward model that initializes the critic of an `OnlineRun`, with adapters where the policy has
    them."""
    settings, policy = run.settings, run.policy
    source = settings.value_checkpoint
    if source is None:
        return None
    where = f"value_checkpoint = {source}:"
    adapter = read_adapter(source)
    kinds = load_config(source).architectures or [] if adapter is None else [str(adapter.config.task_type)]
    if not any(kind.endswith(("ForSequenceClassification", "SEQ_CLS")) for kind in kinds):
        raise UserError(
            f"{where} it has no score head (found {', '.join(kinds) or 'none'}), and a new one would be random; "
            "expected a run folder of llmlab reward"
        )
    scorer = load_classifier(source, dtype=policy.model.dtype if run.with_adapters else torch.float32)
    if not isinstance(getattr(scorer, "score", None), nn.Linear):
        kind = f"model_type = {scorer.config.model_type}"
        raise UserError(f"{where} {kind}: it does not score at each token; expected a run folder of llmlab reward")
    if load_tokenizer(source).get_vocab() != policy.tokenizer.get_vocab():
        raise UserError(f"{where} it has another vocabulary than the policy; leave it out")
    fit_vocabulary(scorer, policy.tokenizer)
    return get_peft_model(scorer, lora_config(scorer, settings, task="SEQ_CLS")) if run.with_adapters else scorer
