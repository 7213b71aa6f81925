"""Proximal policy optimization: policy, reference and critic, prompts, rewards, trainer, train, save.

The algorithm is `ppo_trainer.py`'s; prompts, rewards and metrics are what `llmlab grpo` has.
"""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from llmlab.adapters import lora_config
from llmlab.data import load_tokenizer
from llmlab.model import load_classifier
from llmlab.settings.errors import UserError
from llmlab.settings.ppo import PPOSettings
from llmlab.settings.sources import Resolved
from llmlab.training._trl import WholeRollouts, show_head_bias
from llmlab.training.compile import compile_dynamic
from llmlab.training.dpo import load_reference
from llmlab.training.online import (
    check_vllm,
    locate_rewards,
    make_reward,
    online_arguments,
    online_callbacks,
    plan_rows,
    read_prompts,
)
from llmlab.training.optimizers import OurOptimizers
from llmlab.training.policy import Policy, fit_vocabulary, load_policy
from llmlab.training.ppo_trainer import PPOConfig, PPOTrainer
from llmlab.training.progress import human, quiet_libraries
from llmlab.training.record import RunResult
from llmlab.training.running import Run

__all__ = ["EpisodeTrainer", "PPOConfig", "PPOTrainer", "load_scorer", "ppo"]

TOO_FAR = 1.5
"""Times target_kl: where the passes over a rollout end."""


class EpisodeTrainer(WholeRollouts, OurOptimizers, PPOTrainer):
    """PPOTrainer with llmlab's optimizers, which goes on in the middle of a rollout."""


def ppo(
    settings: PPOSettings | Resolved[PPOSettings],
    *,
    resume: str | Path | None = None,
    load_optimizer: bool = True,
    console: Console | None = None,
) -> RunResult:
    """Makes those completions of a policy likelier that earn more than foreseen, and writes its run folder.

    Args:
        settings: which model, what prompts, what is rewarded, for how long.
        resume: a run folder of this stage to continue from its last checkpoint.
        load_optimizer: with `resume`, whether to restore the optimizer's state; without, only weights and step count.
        console: where to print; None is the terminal.

    Returns:
        The run folder and its last metrics: `reward`, `reward/NAME` of each component, `kl` (from the reference),
        `kl_coef`, `policy_kl` (from the policy that sampled), `value_loss`, `explained_variance`, `entropy`, `loss`,
        ...; of the validation prompts those that apply with `eval_` before them.

    Raises:
        UserError: anything that the settings, the models, the prompts, the rewards, the machine or the disk make
            impossible, and a run that has nothing to learn from.
        KeyboardInterrupt: after an interrupted run was saved.

    Source: seed, LLM-Lab document, "PPO" and "LoRA for RLHF"; RL guide, section 4; arXiv:1707.06347.
    """
    run = Run("ppo", locate_rewards(settings), resume=resume, load_optimizer=load_optimizer, console=console)
    processes = run.process.num_processes
    run.settings = settings = run.settings.in_steps(processes)
    check_vllm(settings)
    reward = make_reward(run)
    with quiet_libraries():
        policy = load_policy(
            settings.policy_checkpoint, settings, run.hardware, chat_template=settings.chat_template, attach=False
        )
        reference, held = None, "none, since init_kl_coef is 0"
        if settings.init_kl_coef > 0:
            reference, held = load_reference(settings, policy)
        scorer = load_scorer(settings, policy)
    if (settings.use_lora or isinstance(policy.model, PeftModel)) and reference is not None:
        raise UserError(
            f"reference_checkpoint = {settings.reference_checkpoint}: not supported with LoRA, whose reference is the "
            "policy with its adapters off; leave it out, or set use_lora=false"
        )
    data = read_prompts(run, policy)
    evaluates = data.validation is not None
    if settings.compile is True:
        compile_dynamic(policy.model, run.hardware.device)
    with quiet_libraries():
        trainer = EpisodeTrainer(
            settings=settings,
            load_optimizer=load_optimizer,
            reference=reference,
            scorer=scorer,
            model=policy.model,
            reward_funcs=reward,
            args=online_arguments(
                PPOConfig,
                settings,
                run.hardware,
                evaluates=evaluates,
                processes=processes,
                kl_penalty=settings.kl_penalty,
                cliprange_value=settings.cliprange_value,
                stop_kl=TOO_FAR * settings.target_kl if settings.early_stop else None,
            ),
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=policy.tokenizer,
            peft_config=policy.new_adapters(settings),
            callbacks=run.callbacks(evaluates=evaluates, best_is="reward"),
        )
    if isinstance(trainer.model, PeftModel):
        show_head_bias(trainer.model)
    return run.train(
        trainer,
        steps=settings.max_steps,
        plan=[
            *policy.rows(trainer.model),
            ("reference", held),
            ("critic", describe_critic(settings, trainer)),
            *plan_rows(run, data, reward, temperature=settings.temperature),
        ],
        parents=policy.parents + ([settings.value_checkpoint] if settings.value_checkpoint else []),
        data=data.record(),
        callbacks=online_callbacks(run, trainer),
    )


def load_scorer(settings: PPOSettings, policy: Policy) -> PreTrainedModel | PeftModel | None:
    """Returns the reward model that the critic starts from, with adapters where the policy has them; None is none.

    Raises:
        UserError: there is no such model, it does not score token by token, or it has another vocabulary.
    """
    source = settings.value_checkpoint
    if source is None:
        return None
    with_adapters = settings.use_lora or isinstance(policy.model, PeftModel)
    scorer = load_classifier(source, dtype=policy.model.dtype if with_adapters else torch.float32)
    if not isinstance(getattr(scorer, "score", None), nn.Linear):
        raise UserError(
            f"value_checkpoint = {source}: model_type = {scorer.config.model_type}: it does not score at each token; "
            "expected a run folder of llmlab reward"
        )
    if load_tokenizer(source).get_vocab() != policy.tokenizer.get_vocab():
        raise UserError(f"value_checkpoint = {source}: it has another vocabulary than the policy; leave it out")
    fit_vocabulary(scorer, policy.tokenizer)
    return get_peft_model(scorer, lora_config(scorer, settings, task="SEQ_CLS")) if with_adapters else scorer


def describe_critic(settings: PPOSettings, trainer: PPOTrainer) -> str:
    """Returns the plan's line about the value function."""
    trained = human(sum(tensor.numel() for tensor in trainer.critic.trained().values()))
    if settings.value_model == "shared":
        return f"a head on the policy: {trained} parameters"
    return f"its own, from {settings.value_checkpoint or 'the policy'}: {trained} trained parameters"
