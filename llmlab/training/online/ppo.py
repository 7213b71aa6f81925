"""Proximal policy optimization: policy, reference model and critic, prompts, rewards, trainer.

The algorithm is `ppo_trainer.py`'s; prompts, rewards and metrics are what `llmlab grpo` has.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmlab.adapters import lora_config
from llmlab.data.tokenizer import load_tokenizer
from llmlab.model import fit_vocabulary, load_classifier, load_config, read_adapter
from llmlab.optim.sophia import next_token_logits
from llmlab.rewards.loading import locate_rewards
from llmlab.runs.progress import human, quiet_libraries
from llmlab.runs.record import RunResult
from llmlab.runs.run import training_stage
from llmlab.runs.trainer import StageTrainer
from llmlab.settings.errors import UserError
from llmlab.settings.ppo import PPOSettings
from llmlab.training.online._trl import ResumableRollouts
from llmlab.training.online.episodes import EpisodeRollouts
from llmlab.training.online.ppo_trainer import PPOConfig, PPOTrainer
from llmlab.training.online.run import OnlineRun, RewardFunction

STOP_KL_FACTOR = 1.5
"""Times target_kl: the KL to the sampling policy at which the epochs over a rollout stop."""


class LLMLabPPOTrainer(EpisodeRollouts, ResumableRollouts, StageTrainer, PPOTrainer):
    """PPOTrainer with llmlab's optimizers, which resumes in the middle of a rollout."""

    def predict(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with self.critic.collect_values() as values:
            logits = next_token_logits(model, batch)
        return logits + 0 * values[0].sum()  # DDP requires every parameter in the graph

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # which load the policy's weights alone
            self.critic.load(Path(checkpoint))


@training_stage(OnlineRun, prepare=locate_rewards)
def ppo(run: OnlineRun[PPOSettings], *, rewards: Sequence[RewardFunction] = ()) -> RunResult:
    """Trains a policy with PPO (clipped objective, learned critic, GAE) and writes the run folder.

    Args:
        settings: `PPOSettings`: which model, what prompts, what is rewarded, for how long.
        rewards: custom reward functions in addition to the settings', as in `grpo`.

    Returns:
        The run folder and its last metrics: `reward`, `reward/NAME` of each component, `kl` (from the reference),
        `kl_coef`, `policy_kl` (to the sampling policy), `value_loss`, `explained_variance`, `entropy`, `loss`,
        ...; of the validation prompts those that apply with `eval_` before them.

    Source: seed, LLM-Lab document, "PPO" and "LoRA for RLHF"; RL guide, section 4; arXiv:1707.06347.
    """
    settings = run.settings
    run.load(rewards)
    with quiet_libraries():
        scorer = load_value_model(run)
    trainer = run.make_online_trainer(
        LLMLabPPOTrainer,
        PPOConfig,
        arguments={
            "kl_penalty": settings.kl_penalty,
            "cliprange_value": settings.cliprange_value,
            "stop_kl": STOP_KL_FACTOR * settings.target_kl if settings.early_stop else None,
        },
        scorer=scorer,
    )
    return run.train_online(
        trainer,
        temperature=settings.temperature,
        plan=[("critic", describe_critic(settings, trainer))],
        parents=[settings.value_checkpoint] if settings.value_checkpoint else [],
    )


def load_value_model(run: OnlineRun[PPOSettings]) -> PreTrainedModel | PeftModel | None:
    """Returns the reward model that initializes the critic, with adapters where the policy has them."""
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


def describe_critic(settings: PPOSettings, trainer: PPOTrainer) -> str:
    """Returns the plan's line about the value function."""
    trained = human(sum(tensor.numel() for tensor in trainer.critic.trained().values()))
    if settings.value_model == "shared":
        return f"a head on the policy: {trained} parameters"
    return f"its own, from {settings.value_checkpoint or 'the policy'}: {trained} trained parameters"
