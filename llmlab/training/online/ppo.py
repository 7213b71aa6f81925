"""Proximal policy optimization (PPO) as a stage: what `llmlab grpo` has, with a critic.

To understand PPO from end to end, read `run.py` (from settings to a trainer), this file, `ppo_trainer.py` (the
algorithm), `advantages.py` (its formulas), `critic.py`, `_trl.py` (the steps of a rollout and what they hand to the
loss) and `callbacks.py` (what is logged, and when a run stops).
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from llmlab.optim.sophia import next_token_logits
from llmlab.rewards.loading import locate_rewards
from llmlab.runs.progress import human, quiet_libraries
from llmlab.runs.record import RunResult
from llmlab.runs.run import training_stage
from llmlab.settings.ppo import PPOSettings
from llmlab.training.online.critic_file import load_scorer
from llmlab.training.online.episodes import EpisodeRollouts
from llmlab.training.online.ppo_trainer import PPOConfig, PPOTrainer
from llmlab.training.online.run import OnlineRun, RewardFunction

STOP_KL_FACTOR = 1.5
"""Times target_kl: the KL to the sampling policy at which the epochs over a rollout stop."""


class LLMLabPPOTrainer(EpisodeRollouts, PPOTrainer):
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
        scorer = load_scorer(run)
    arguments = {
        "kl_penalty": settings.kl_penalty,
        "cliprange_value": settings.cliprange_value,
        "stop_kl": STOP_KL_FACTOR * settings.target_kl if settings.early_stop else None,
    }
    trainer = run.make_online_trainer(LLMLabPPOTrainer, PPOConfig, arguments=arguments, scorer=scorer)
    trained = human(sum(tensor.numel() for tensor in trainer.critic.trained().values()))
    critic = f"its own, from {settings.value_checkpoint or 'the policy'}: {trained} trained parameters"
    if settings.value_model == "shared":
        critic = f"a head on the policy: {trained} parameters"
    parents = [settings.value_checkpoint] if settings.value_checkpoint else []
    return run.train_online(trainer, temperature=settings.temperature, plan=[("critic", critic)], parents=parents)
