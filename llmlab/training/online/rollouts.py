"""What rollouts of GRPO and PPO need beside the algorithm: they survive a kill, a smaller batch can take them over,
reports look at them, Sophia's estimate shares them, and they say so when the policy diverged. With tools they are
episodes: in which environments, at which difficulty, and what TRL's trainer gets of them.

How an episode is played is `llmlab/episodes.py`; TRL's own loop is not used: it runs tools one after the other, and
no tool can end an episode.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from itertools import groupby, islice
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from trl.trainer.utils import split_tensor_dict

from llmlab.episodes import NO_TURN, Episode, Task, play
from llmlab.runs.trainer import StageTrainer
from llmlab.settings.errors import UserError, did_you_mean
from llmlab.simulator.tasks import Curriculum
from llmlab.training.online._trl import RolloutSteps
from llmlab.training.online.passes import policy_mask

Factories = Mapping[str | None, Callable[[], Any]]
"""Makes environments, by the name in a row's column `environment`; None is the one of all rows."""
# how torch refuses to sample from probabilities that are not finite, on a CPU and on CUDA
NO_DISTRIBUTION = ("probability tensor contains either", "device-side assert triggered")
LIMITS = ("max_episode_length", "max_new_tokens", "tool_timeout")  # settings that `play` takes


class Rollouts(StageTrainer, RolloutSteps):
    """A GRPOTrainer with llmlab's optimizers and checks, which resumes in the middle of a rollout; after
    `play_episodes` a rollout is one of episodes."""

    judges_loss = False  # the loss's size says nothing
    factories: Factories = {}
    curriculum: Curriculum | None = None
    prepared: dict[str, Any] | None = None  # the next micro-batch, where it was made already

    def rollout_state(self, step: int) -> dict[str, Any]:
        """Returns the current rollout, its position and unlogged metrics, for a checkpoint."""
        waiting = {name: list(values) for name, values in self._metrics["train"].items()}
        state = {"step": self._step, "rollout": self._buffered_inputs, "metrics": waiting, "split": self._split}
        return state | ({} if self.curriculum is None else {"curriculum": self.curriculum.state()})

    def load_rollout_state(self, state: dict[str, Any]) -> None:
        """Restores `rollout_state`; where the batch is split otherwise now, a new rollout goes on at that step."""
        if self.curriculum is not None:
            self.curriculum.load_state(state["curriculum"])
        split = state["split"]
        if split != self._split:
            self._step = state["step"] // split[1] * self._split[1]
            return
        self._step, self._buffered_inputs = state["step"], state["rollout"]
        for name, values in state["metrics"].items():
            self._metrics["train"][name].extend(values)

    @property
    def _split(self) -> tuple[int, int]:
        return self.args.world_size, self.args.gradient_accumulation_steps * self.parts

    def parts_of(self, batch: Any) -> list[Any]:
        """Returns the same prompts for each part: its rows are the next ones of the rollout."""
        # the loop sets it anew at each step
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
        return [batch] * self.parts

    def divide(self, factor: int) -> None:
        super().divide(factor)
        self._step *= factor
        self.args.steps_per_generation *= factor
        self.args.per_device_train_batch_size //= factor  # in scoring
        rollout = self._buffered_inputs
        self._buffered_inputs = rollout and [part for whole in rollout for part in split_tensor_dict(whole, factor)]

    def newest_completions(self, count: int) -> list[dict[str, Any]]:
        """Returns the first ones of TRL's logged table, with the rewards by function."""
        rows = islice(zip(self._logs["prompt"], self._logs["completion"], strict=True), count)
        scores = {name: list(values) for name, values in self._logs["rewards"].items()}
        return [
            {"prompt": prompt, "completion": completion, "rewards": {name: scores[name][row] for name in scores}}
            for row, (prompt, completion) in enumerate(rows)
        ]

    def estimated_from(self, batch: Any) -> dict[str, Tensor]:
        """Returns the model inputs of Sophia's Hessian estimate: the next micro-batch, labelled at the policy's
        tokens."""
        self.model.train()  # as the step will: in evaluation it samples otherwise
        part = self._prepare_inputs(batch)
        self.prepared = part  # the training step reuses these inputs instead of sampling again
        ids = torch.cat([part["prompt_ids"], part["completion_ids"]], dim=1)
        scored = torch.cat([torch.zeros_like(part["prompt_mask"]), policy_mask(part)], dim=1)
        return {
            "input_ids": ids,
            "attention_mask": torch.cat([part["prompt_mask"], part["completion_mask"]], dim=1),
            "labels": ids.masked_fill(scored == 0, -100),
        }

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if self.prepared is not None:
            part, self.prepared = self.prepared, None
            return part
        return super()._prepare_inputs(generation_batch)

    def _generate(self, prompts: list[Any]) -> Any:
        try:
            return super()._generate(prompts)
        except RuntimeError as error:
            if not any(words in str(error) for words in NO_DISTRIBUTION):
                raise
            raise self.diverged("sum of a next token's probabilities", math.nan) from error

    def play_episodes(self, run: Any) -> None:
        """Makes rollouts of episodes in the environments of an `OnlineRun`."""
        settings, processes = run.settings, run.process.num_processes
        together = self.is_fsdp_enabled or self.is_deepspeed_enabled or settings.use_vllm
        if together and processes > 1:
            problem = "not supported with FSDP2, DeepSpeed or vLLM in several processes, which sample in step"
            advice = "use --accelerate ddp without vLLM"
            raise UserError(f"environment: {problem} while episodes end at different times; {advice}")
        self.factories = run.environments
        if settings.curriculum != "none":
            total = settings.max_steps * run.rollout.completions // run.rollout.updates
            self.curriculum = Curriculum(settings.curriculum, total)
        self.play_options = {name: getattr(settings, name) for name in LIMITS}
        self.play_options["max_length"] = run.policy.cap_length(settings.max_seq_len or sys.maxsize)
        self._pool: dict[str | None, list[Any]] = defaultdict(list)
        self.rollout_func = self._play  # set here, since the constructor warns that it is experimental

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """Renders each prompt with its row's tools, where TRL knows only tools that all prompts share."""
        tools = [row.get("tools") for row in self.rows]
        if not any(tools):
            return super()._tokenize_prompts(prompts)
        options = {"add_generation_prompt": True, "return_dict": True, **self.chat_template_kwargs}
        encode = partial(self.processing_class.apply_chat_template, **options)
        pairs = zip(prompts, tools, strict=True)
        return [encode(prompt, tools=own or None)["input_ids"] for prompt, own in pairs], None, {}

    def _play(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Plays one episode of each row; TRL's `rollout_func`."""
        known: dict[tuple[int, ...], list[float]] = {}
        training = self.model.training
        level = {"difficulty": self.curriculum.level} if self.curriculum is not None and training else {}
        names = [None if None in self.factories else row.get("environment") for row in self.rows]
        rollout, tasks = self._step if training else 0, []
        for name, row in zip(names, self.rows, strict=True):
            # of the whole group, another one in the next rollout
            seed = crc32(f"{self.args.seed} {rollout} {row}".encode(errors="replace"))
            tasks.append(Task(self._take(name), row["prompt"], row | level, seed))

        def sample(rows: list[list[int]]) -> list[list[int]]:
            sampled, log_probs = self._generate_single_turn(rows, None, {}, 1)
            for row, ids, values in zip(rows, sampled, log_probs or (), strict=False):
                known[(*row, *ids)] = values  # equal rows have equal ones
            return sampled

        options = {**self.play_options, "ends": self.eos_token_ids}
        self._episodes = play(tasks, sample, self.processing_class, **options)
        for name, episode in zip(names, self._episodes, strict=True):
            if not episode.abandoned:
                self._pool[name].append(episode.environment)
        self._note_episodes()
        end = self.processing_class.eos_token_id
        return {
            "prompt_ids": [episode.prompt_ids for episode in self._episodes],
            # a prompt that leaves no room for a turn has one token, which is not trained
            "completion_ids": [episode.completion_ids or [end] for episode in self._episodes],
            "logprobs": [_log_probs(episode, known) for episode in self._episodes] if known else None,
            "env_mask": [episode.mask or [0] for episode in self._episodes],
        }

    def _take(self, name: str | None) -> Any:
        if name not in self.factories:
            names = [str(other) for other in self.factories]
            problem = f"a row of the data names none of {', '.join(names)}{did_you_mean(str(name), names)}"
            raise UserError(f"environment = {name}: {problem}")
        return self._pool[name].pop() if self._pool[name] else self.factories[name]()

    def _note_episodes(self) -> None:
        """Notes lengths and successes, and lets the curriculum know."""
        if not any(episode.mask for episode in self._episodes):
            longest = max(len(episode.prompt_ids) for episode in self._episodes)
            limits = f"max_new_tokens = {self.play_options['max_new_tokens']} in {self.play_options['max_length']}"
            prompts = f"prompts of up to {longest} tokens, with the tools and the text of reset"
            room = f"no room for {limits} tokens (max_seq_len, or the model's context)"
            raise UserError(f"environment: {prompts}, leave {room}")
        found = [getattr(episode.environment, "success", None) for episode in self._episodes]
        successes = [-1 if success is None else success for success in found]
        numbers = [successes, [episode.calls for episode in self._episodes]]
        table = torch.tensor(numbers, dtype=torch.float32, device=self.accelerator.device).t().contiguous()
        success, calls = self.accelerator.gather(table).unbind(1)  # (episodes of all processes,)
        self.note("episode_length", calls.mean().item())
        solved = success[success >= 0]
        if len(solved):
            self.note("success_rate", solved.mean().item())
        if self.curriculum is not None and self.model.training:
            self.note("difficulty", self.curriculum.level)
            self.curriculum.update([value > 0 for value in success.tolist()])

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.factories:  # TRL has only text of them
            self.environments = [episode.environment for episode in self._episodes]
            prompts = [episode.prompt for episode in self._episodes]
            completions = [episode.completion or [NO_TURN] for episode in self._episodes]
        try:
            return super()._calculate_rewards(inputs, prompts, completions, *args, **kwargs)
        finally:
            self.environments = None  # else TRL resets them before the next rollout, for its rows


def _log_probs(episode: Episode, known: dict[tuple[int, ...], list[float]]) -> list[float]:
    """Returns the log-probabilities of an episode's sampled tokens, 0 for those of tools, (time,)."""
    values, tokens, position = [], tuple(episode.tokens), len(episode.prompt_ids)
    for sampled, run in groupby(episode.mask):
        length = len(list(run))
        position += length
        values += known[tokens[:position]] if sampled else [0.0] * length
    return values or [0.0]
