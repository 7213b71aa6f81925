"""What stages that learn from their own completions share: policy, reference, prompts, rewards, arguments, plan.

How a completion's reward becomes a gradient is each trainer's own business.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from peft import PeftModel
from rich.text import Text
from transformers import TrainerCallback

from llmlab.data.chat.prompts import PromptMaker, as_read
from llmlab.data.chat.rows import Rows, build_rows
from llmlab.hardware import Hardware
from llmlab.rewards.compose import ComposedReward, compose
from llmlab.rewards.loading import may_run_code
from llmlab.rewards.reward import Reward
from llmlab.runs._trl import show_head_bias
from llmlab.runs.arguments import build_arguments, rhythm_arguments
from llmlab.runs.policy import Policy, load_policy
from llmlab.runs.progress import quiet_libraries
from llmlab.runs.record import RunResult
from llmlab.runs.run import Run, describe_evaluation, describe_optimizer
from llmlab.runs.start import S, Start
from llmlab.settings.errors import UserError
from llmlab.settings.rl import OnlineSettings
from llmlab.training.online.callbacks import NothingToLearn, OnlineMetrics, RolloutState
from llmlab.training.online.kl import AdaptiveKL, KLController
from llmlab.training.preference.dpo import load_reference

RewardFunction = Reward | Callable[..., Any]


class OnlineRun(Run[S]):
    """A run of a stage that samples: opened with its rewards, policy and reference, then given a trainer.

    Args:
        stage: the stage's name.
        start: what `begin` yields; `self.settings` tells everything in steps.
        load_optimizer: with `resume`, whether to restore the optimizer's state.
        rewards: functions beside those that the settings name.

    Raises:
        UserError: a reward, the policy, its reference or vLLM cannot be had.
    """

    def __init__(self, stage: str, start: Start[S], *, load_optimizer: bool, rewards: Sequence[RewardFunction] = ()):
        super().__init__(stage, start)
        self.load_optimizer = load_optimizer
        self.settings = settings = self.settings.in_steps(self.process.num_processes)
        check_vllm(settings)
        self.reward = make_reward(self, rewards)
        self.reference, self.held = None, "none, since init_kl_coef is 0"
        with quiet_libraries():
            self.policy = load_policy(
                settings.policy_checkpoint, settings, self.hardware, chat_template=settings.chat_template, attach=False
            )
            if settings.init_kl_coef > 0:
                self.reference, self.held = load_reference(settings, self.policy)
        self.with_adapters = settings.use_lora or isinstance(self.policy.model, PeftModel)
        if self.with_adapters and self.reference is not None:
            raise UserError(
                f"reference_checkpoint = {settings.reference_checkpoint}: not supported with LoRA, whose reference is "
                "the policy with its adapters off; leave it out, or set use_lora=false"
            )

    def make_trainer(
        self, trainer: type, config: type, *, arguments: dict[str, Any] | None = None, **more: Any
    ) -> Any:
        """Reads the prompts and returns the stage's trainer.

        Args:
            trainer: its class.
            config: the class of its arguments.
            arguments: of the trainer, which only this stage has.
            more: what only this stage's trainer is made with.

        Raises:
            UserError: as in `read_prompts`.
        """
        settings, policy = self.settings, self.policy
        self.prompts = read_prompts(self, policy)
        steps = settings.steps_for(len(self.prompts.train), self.process.num_processes)
        self.settings = settings = settings.model_copy(update={"max_steps": steps})
        evaluates = self.prompts.validation is not None
        with quiet_libraries():
            made = trainer(
                settings=settings,
                load_optimizer=self.load_optimizer,
                reference=self.reference,
                model=policy.model,
                reward_funcs=self.reward,
                args=online_arguments(
                    config,
                    settings,
                    self.hardware,
                    evaluates=evaluates,
                    processes=self.process.num_processes,
                    eval_on_start=evaluates and self.checkpoint is None,
                    **(arguments or {}),
                ),
                train_dataset=self.prompts.train,
                eval_dataset=self.prompts.validation,
                processing_class=policy.tokenizer,
                peft_config=policy.new_adapters(settings),
                callbacks=self.callbacks(evaluates=evaluates, best_is="reward"),
                **more,
            )
        if isinstance(made.model, PeftModel):
            show_head_bias(made.model)
        return made

    def learn(
        self,
        trainer: Any,
        *,
        temperature: float,
        plan: list[tuple[str, str]] | None = None,
        parents: list[str] | None = None,
    ) -> RunResult:
        """Trains what `make_trainer` returned, as `train` does.

        Args:
            trainer: of the stage.
            temperature: of sampling, for the plan.
            plan: lines that only this stage has.
            parents: run folders or hub ids beside the policy's.
        """
        return self.train(
            trainer,
            steps=self.settings.max_steps,
            plan=[
                *self.policy.rows(trainer.model),
                ("reference", self.held),
                *(plan or []),
                *plan_rows(self, self.prompts, self.reward, temperature=temperature),
            ],
            parents=self.policy.parents + (parents or []),
            data={**self.prompts.record(), "rewards": weights_of(self.reward)},
            callbacks=online_callbacks(self, trainer),
        )


def read_prompts(run: Run[Any], policy: Policy) -> Rows:
    """Returns the prompts of a stage's sources, as the trainer and rewards read them.

    Raises:
        UserError: a source cannot be used, or there are fewer prompts than a rollout takes.
    """
    settings, processes = run.settings, run.process.num_processes
    maker = PromptMaker(policy.tokenizer, max_prompt_length=settings.prompt_limit)
    with run.process.main_process_first(), run.reading():
        rows = build_rows(
            settings,
            maker,
            seed=settings.seed,
            validation_rows=settings.eval_batches * settings.mini_batch_size * processes,
            max_samples=settings.max_samples,
            **run.extent(settings.batch_size / settings.rollout(processes).updates),
        )
        if len(rows.train) < settings.batch_size:
            raise UserError(
                f"batch_size = {settings.batch_size}: there are only {len(rows.train)} prompts to train on; "
                "give more, or a smaller batch_size"
            )
        validation = None if rows.validation is None else as_read(rows.validation)
        return Rows(as_read(rows.train), validation, rows.reports)


def make_reward(run: Run[Any], functions: Sequence[RewardFunction] = ()) -> ComposedReward:
    """Returns what completions are rewarded for: what the settings name, and functions beside it.

    Raises:
        UserError: there is no such reward, a parameter is wrong, or code would run that nobody allowed by hand.
    """
    settings = run.settings
    allow_code = may_run_code(run.resolved)
    named = settings.all_rewards() if settings.rewards or settings.reward_model or not functions else []
    return compose([*named, *functions], normalize=settings.normalize_rewards, allow_code=allow_code)


def weights_of(reward: ComposedReward) -> dict[str, float]:
    """Returns the weight of each component."""
    return {name: part.weight for name, part in reward.components.items()}


def check_vllm(settings: OnlineSettings) -> None:
    """Raises UserError where vLLM is asked for and not there."""
    if settings.use_vllm and find_spec("vllm") is None:
        raise UserError("use_vllm = true: vLLM is not installed: pip install vllm (it needs a GPU)")


def online_arguments(
    config: type, settings: OnlineSettings, hardware: Hardware, *, evaluates: bool, processes: int, **fixed: Any
) -> Any:
    """Returns the arguments of a TRL online trainer for these settings, told in steps, on this machine.

    Validation prompts get one completion each, and the best checkpoint is the one with the highest reward on them.
    """
    best = {"metric_for_best_model": "eval_reward", "greater_is_better": True} if evaluates else {}
    return build_arguments(
        config,
        settings,
        hardware,
        generation_batch_size=settings.rollout(processes).completions,
        per_device_eval_batch_size=settings.mini_batch_size,
        num_generations_eval=1,
        **{**rhythm_arguments(settings, evaluates=evaluates), **best},
        **fixed,
    )


def plan_rows(
    run: Run[Any], data: Rows, reward: ComposedReward, *, temperature: float
) -> list[tuple[str, str | Text]]:
    """Returns the lines about prompts, rewards, rollouts and steps for the plan of a run."""
    settings, rollout = run.settings, run.settings.rollout(run.process.num_processes)
    data.went_through(settings.max_steps / rollout.updates * settings.batch_size / len(data.train))
    sampling = f"temperature {temperature:g}, top_p {settings.top_p:g}, top_k {settings.top_k}"
    if settings.top_p < 1 or settings.top_k:
        # the loss counts the probabilities of the whole distribution
        sampling += " (top_p and top_k other than 1 and 0 bias the gradient)"
    weights = ", ".join(f"{name} x {weight:g}" for name, weight in weights_of(reward).items())
    return [
        ("data", data.summary()),
        ("rewards", weights + (", to [0, 1]" if reward.normalize else "")),
        (
            "rollout",
            f"{settings.batch_size} prompts, {rollout.completions} completions of up to {settings.max_new_tokens} "
            f"tokens; {sampling}",
        ),
        (
            "steps",
            f"{settings.max_steps:,}: {rollout.updates} for each rollout ({settings.ppo_epochs} passes, "
            f"{rollout.per_update} completions a step)",
        ),
        describe_evaluation(settings, settings.eval_batches, evaluates=data.validation is not None),
        describe_optimizer(settings, settings.max_steps),
        *run.hardware.rows(),
    ]


def online_callbacks(run: Run[Any], trainer: Any) -> list[TrainerCallback]:
    """Returns the callbacks of a stage's trainer; the last is the first that is called."""
    settings = run.settings
    callbacks: list[TrainerCallback] = [
        RolloutState(trainer, run.checkpoint),
        NothingToLearn(settings.stop_patience, max_new_tokens=settings.max_new_tokens),
    ]
    if settings.adaptive_kl:
        controller = KLController(settings.init_kl_coef, target=settings.target_kl, horizon=settings.kl_horizon)
        sampled = settings.rollout(run.process.num_processes)
        per_step = sampled.completions / sampled.updates
        callbacks.append(AdaptiveKL(trainer, controller, samples_per_step=per_step, checkpoint=run.checkpoint))
    return [*callbacks, OnlineMetrics()]
