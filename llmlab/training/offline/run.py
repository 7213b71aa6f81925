"""What RS-SFT and AWR share: samples drawn and scored in the run folder, or of an earlier run, and their rows.

Which samples are trained on, and with which weights, is each stage's own business.
"""

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features
from rich.markup import escape
from transformers import TrainerCallback, set_seed
from trl import SFTConfig

from llmlab.data.chat.makers import IDS, PromptEncoder, decode_prompts
from llmlab.data.chat.rows import Rows, RowsReport, build_rows
from llmlab.data.samples import (
    DESCRIPTION,
    SAMPLES,
    Prompt,
    Sample,
    append_samples,
    group_samples,
    read_samples,
    recover_samples,
    write_samples,
)
from llmlab.inference import context_length, end_tokens
from llmlab.rewards.compose import compose
from llmlab.rewards.function import Reward
from llmlab.rewards.loading import may_run_code
from llmlab.runs.policy import Policy
from llmlab.runs.progress import quiet_libraries
from llmlab.runs.record import RECORD, RunResult
from llmlab.runs.run import Run
from llmlab.runs.signals import Interrupted
from llmlab.runs.start import S
from llmlab.settings.errors import UserError
from llmlab.settings.files import dump, read_json
from llmlab.settings.paths import expand
from llmlab.terminal import draw_bars, track
from llmlab.training.offline.sampling import (
    Fill,
    complete,
    draw_samples,
    generate_with,
    generate_with_vllm,
    play_episodes,
    score_samples,
)

DRAWN = (  # settings that samples depend on
    *("policy_checkpoint", "datasets", "environment", "max_episode_length", "seed", "num_samples_per_prompt"),
    *("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "sampling_batch_size"),
)
SCORED = ("rewards", "reward_model", "normalize_rewards")
BINS, QUANTILES = 40, (0.5, 0.75, 0.9, 0.99)

RewardFunction = Reward | Callable[..., Any]


class Chosen(NamedTuple):
    """The samples to train on with their weights, how many are left out by reason, and the run's results."""

    rows: list[tuple[Sample, float]]
    left_out: Counter[str]
    results: dict[str, float] = {}


class SampleRows:
    """What a stage makes of samples: the rows' columns, and which samples it trains on."""

    counts = ("tokens", "trained_tokens")
    results: dict[str, float] = {}

    def __init__(
        self,
        policy: Policy,
        choose: Callable[[list[Sample]], Chosen],
        rewards: Sequence[RewardFunction],
        **columns: Any,
    ):
        self.policy, self.choose, self.rewards = policy, choose, rewards
        self.columns = Features({"input_ids": IDS, "labels": IDS, **columns})

    def make(self, rows: Sequence[tuple[Sample, float]]) -> Dataset:
        """Returns the rows of samples: prompt and completion, of which the sampled tokens are trained."""
        values = (
            {"input_ids": each.prompt_ids + each.completion_ids, "labels": each.labels(), "weight": weight}
            for each, weight in rows
        )
        return Dataset.from_list([{name: row[name] for name in self.columns} for row in values], self.columns)


class OfflineRun(Run[S]):
    """A run of RS-SFT or AWR."""

    def build_rows(self, maker: SampleRows, *, rows_per_step: float) -> Rows:
        """Returns the rows of the chosen samples, which are drawn and scored first where there are none yet."""
        path, settings = self.folder / SAMPLES, self.settings
        record = self.make_record(maker.policy.parents, {"sources": []}) if self.process.is_main_process else None
        if record is not None and self.resumed is None:
            record.start()
        try:
            if not (self.folder / DESCRIPTION).is_file():
                with quiet_libraries():
                    self._reuse(maker) if settings.samples else self._draw(maker)
                self.process.wait_for_everyone()
            set_seed(settings.seed)  # what follows does not depend on how much was drawn in this part of the run
            return self._choose(maker, read_samples(path))
        except (Exception, KeyboardInterrupt, Interrupted) as error:
            if record is not None and self.checkpoint is None:
                stopped = not isinstance(error, Exception)
                record.finish("interrupted" if stopped else "failed", reason=str(error))
                if not path.is_file():  # there is nothing to go on with
                    (self.folder / RECORD).unlink()
                elif stopped:
                    self.console.print(
                        f"stopped; continue with: llmlab {self.stage} --resume {escape(str(self.folder))}"
                    )
            raise

    def _draw(self, maker: SampleRows) -> None:
        """Draws and scores the samples of all prompts that have none yet; processes share the prompts."""
        settings, process, count = self.settings, self.process, self.settings.num_samples_per_prompt
        reward, fill = self._compose(maker), self._fill(maker.policy)
        prompts, train = self._read_prompts(maker.policy)
        own, main = self.folder / f"{process.process_index}-{SAMPLES}", self.folder / SAMPLES
        if process.is_main_process:
            self._merge(count)
        process.wait_for_everyone()
        done = {sample.prompt_id for sample in recover_samples(main, count)} if main.is_file() else set()
        path = main if process.is_main_process else own
        process.wait_for_everyone()
        model, mode = maker.policy.model.eval(), maker.policy.model.training
        groups = draw_samples(
            prompts,
            maker.policy.tokenizer,
            fill,
            num_samples=count,
            seed=settings.seed,
            batch_size=settings.sampling_batch_size,
            done=done,
            share=(process.process_index, process.num_processes),
        )
        if process.is_main_process:
            left = len(prompts) - len(done)
            self.console.print(f"sampling: {left * count:,} samples of {left:,} prompts into {escape(str(main))}")
            groups = track(groups, -(-left // process.num_processes), "Sampling")
        for group in groups:
            score_samples(group, reward)
            for sample in group:
                sample.validation = sample.prompt_id >= train
            append_samples(path, group)
        model.train(mode)
        process.wait_for_everyone()
        if process.is_main_process:
            self._merge(count)
            self._describe(maker, settings.model_dump(mode="json", include={*DRAWN, *SCORED}))

    def _merge(self, count: int) -> None:
        """Gathers the whole groups of all processes in one file, ordered by prompt."""
        parts = sorted(self.folder.glob(f"*-{SAMPLES}"))
        found = {}
        for path in (self.folder / SAMPLES, *parts):
            found |= {(each.prompt_id, each.sample): each for each in recover_samples(path, count)}
        if found:
            write_samples(self.folder / SAMPLES, list(found.values()))
        for path in parts:
            path.unlink()

    def _fill(self, policy: Policy) -> Fill:
        """Returns what samples completions or plays episodes."""
        settings, tokenizer, model = self.settings, policy.tokenizer, policy.model
        if not settings.use_qlora:
            model.to(self.hardware.device)
        if not settings.use_vllm:
            generate = generate_with(model, tokenizer, settings, self.hardware.torch_dtype)
        elif policy.continues_adapter or self.process.num_processes > 1:
            raise UserError("use_vllm = true: not supported with adapters or several processes; merge, or use one")
        else:
            generate = generate_with_vllm(settings.policy_checkpoint, model, tokenizer, settings)
        if settings.environment is None:
            return partial(complete, generate=generate, tokenizer=tokenizer, ends=end_tokens(model, tokenizer))
        from llmlab.simulator.loading import load_environment

        specs, named = settings.environment, isinstance(settings.environment, dict)
        options = {"allow_code": may_run_code(self.resolved), "reward_config": settings.reward_config}
        made = {name: load_environment(spec, **options) for name, spec in (specs if named else {"": specs}).items()}

        def make_environment(columns: dict[str, Any]) -> Any:
            name = columns.get("environment") if named else ""
            if name not in made:
                raise UserError(f"environment: a row's column has {name!r}; expected one of {', '.join(made)}")
            return made[name]()

        limits = (context_length(model), settings.max_seq_len)
        return partial(
            play_episodes,
            generate=generate,
            tokenizer=tokenizer,
            make_environment=make_environment,
            settings=settings,
            max_length=min((limit for limit in limits if limit is not None), default=None),
        )

    def _read_prompts(self, policy: Policy) -> tuple[dict[int, Prompt], int]:
        """Returns the prompts by number, those for training first, and how many these are."""
        settings, context = self.settings, context_length(policy.model)
        limits = (settings.prompt_limit, context and context - 1)
        limit = min((limit for limit in limits if limit is not None), default=None)
        quiet = nullcontext() if self.console.is_terminal else quiet_libraries()
        with self.process.main_process_first(), quiet:
            rows = build_rows(
                settings,
                PromptEncoder(policy.tokenizer, max_prompt_length=limit),
                seed=settings.seed,
                validation_rows=self.batch.validation_rows,
                max_samples=settings.max_prompts,
            )
        self.console.print(rows.summary(), markup=False, highlight=False)
        prompts = []
        for part in (rows.train, rows.validation or ()):
            for row in decode_prompts(part) if part else ():
                tools = row.get("tools")
                prompts.append(Prompt(row.pop("prompt"), row, tools))
        return dict(enumerate(prompts)), len(rows.train)

    def _compose(self, maker: SampleRows) -> Any:
        """Returns the rewards of the settings and the stage's caller; None where the environment's is the only one."""
        settings = self.settings
        named = settings.all_rewards() if settings.rewards or settings.reward_model or not maker.rewards else []
        rewards = [*named, *maker.rewards]
        options = {"normalize": settings.normalize_rewards, "allow_code": may_run_code(self.resolved)}
        return compose(rewards, **options) if rewards else None

    def _describe(self, maker: SampleRows, values: dict[str, Any]) -> None:
        """Writes beside the samples what they are, which says that they are complete."""
        dump({**values, "vocabulary": _vocabulary(maker.policy)}, self.folder / DESCRIPTION)

    def _reuse(self, maker: SampleRows) -> None:
        """Takes the samples of an earlier run, scored again if asked, after checking that they suit this one."""
        settings, path = self.settings, expand(self.settings.samples)
        path = path / SAMPLES if path.is_dir() else path
        samples = read_samples(path)
        before = read_json(path.with_suffix(".json")) if path.with_suffix(".json").is_file() else {}
        largest = max(max(each.prompt_ids + each.completion_ids) for each in samples)
        vocabulary = _vocabulary(maker.policy)
        if before.get("vocabulary", vocabulary) != vocabulary or largest >= len(maker.policy.tokenizer):
            raise UserError(
                f"samples = {path}: its tokens are of another vocabulary than {settings.policy_checkpoint}'s"
            )
        now = settings.model_dump(mode="json", include={*DRAWN, *SCORED})
        chosen = [name for name in sorted(now) if name in settings.model_fields_set]
        changed = [name for name in chosen if before.get(name, now[name]) != now[name]]
        rewards = [name for name in changed if name in SCORED]
        if rewards and not settings.rescore:
            raise UserError(f"{rewards[0]}: the samples in {path} have other rewards; expected rescore=true beside it")
        for name in (name for name in changed if name not in SCORED):
            note = f"samples were drawn with {name} = {before[name]}, and {name} = {now[name]} has no effect on them"
            self.console.print(f"[yellow]note[/yellow] {escape(note)}", highlight=False, soft_wrap=True)
        if settings.rescore:
            reward = self._compose(maker)
            for group in group_samples(samples):
                score_samples(group, reward)
            before |= {name: now[name] for name in SCORED}
        if self.process.is_main_process:
            write_samples(self.folder / SAMPLES, samples)
            self._describe(maker, before)

    def _choose(self, maker: SampleRows, samples: list[Sample]) -> Rows:
        settings = self.settings
        train = maker.choose([each for each in samples if not each.validation])
        validation = maker.choose([each for each in samples if each.validation]).rows
        rows = train.rows
        if settings.max_samples is not None and len(rows) > settings.max_samples:
            drawn = np.random.default_rng(settings.seed).permutation(len(rows))[: settings.max_samples]
            rows, train.left_out["more than max_samples"] = [rows[k] for k in sorted(drawn)], len(rows) - len(drawn)
        if not rows:
            raise UserError(self._explain(samples, train.left_out))
        maker.results = train.results
        data = maker.make(rows)
        tokens, trained = (sum(len(ids) - ids.count(-100) for ids in data[name]) for name in ("input_ids", "labels"))
        report = RowsReport(SAMPLES, "samples", 1.0, len(samples), len(rows), dropped=train.left_out)
        report.counts = {"tokens": tokens, "trained_tokens": trained}
        return Rows(data, maker.make(validation) if validation else None, [report])

    def _explain(self, samples: list[Sample], reasons: Counter[str]) -> str:
        """Returns why no sample is trained on, with a histogram of the rewards and the thresholds that keep some."""
        counted = ", ".join(f"{count:,} x {reason}" for reason, count in reasons.most_common())
        rewards = [each.reward for each in samples if each.reward is not None]
        if not rewards:
            return f"none of the {len(samples):,} samples has a reward: no reward applies to them"
        counts, edges = np.histogram(rewards, bins=BINS)
        quantiles = ", ".join(f"{share:.0%} {np.quantile(rewards, share):.3g}" for share in QUANTILES)
        return "\n".join(
            [
                f"none of the {len(samples):,} samples is left to train on: {counted}",
                *draw_bars(counts.tolist(), 3),
                f"{edges[0]:<{BINS // 2}.3g}{edges[-1]:>{BINS // 2}.3g}  rewards of the samples",
                f"quantiles of the rewards: {quantiles}; try a threshold below one of them, on the same samples: "
                f"samples={self.folder / SAMPLES}, in another output_dir",
            ]
        )

    def make_sample_trainer(self, trainer: type, maker: SampleRows) -> Any:
        """Returns the trainer of the policy on the samples that the maker chooses."""
        settings, self.maker = self.settings, maker
        self.data = data = self.build_rows(maker, rows_per_step=self.batch.rows)
        made = self.make_trainer(
            trainer,
            SFTConfig,
            maker.policy.model,
            maker.policy.tokenizer,
            data,
            arguments={
                "per_device_eval_batch_size": settings.batch_size,
                "prediction_loss_only": True,
                "max_length": None,
                "remove_unused_columns": False,
                **({} if settings.epochs is None else {"max_steps": -1}),  # then epochs decide
            },
        )
        self.progress.tokens_per_step = round(data.reports[0].counts["tokens"] / len(data.train) * self.batch.rows)
        return made

    def train_samples(self, trainer: Any, callbacks: Sequence[TrainerCallback]) -> RunResult:
        """Trains the policy on the samples."""
        maker, batch = self.maker, f"{self.batch.rows} samples"
        return self.train_rows(
            trainer, maker.policy, self.data, batch=batch, results=maker.results, callbacks=callbacks
        )


def mean_reward(samples: Collection[Sample]) -> float:
    """Returns the mean reward of the samples that have one."""
    return statistics.fmean(each.reward for each in samples if each.reward is not None)


def _vocabulary(policy: Policy) -> str:
    words = json.dumps(policy.tokenizer.get_vocab(), sort_keys=True)
    return hashlib.blake2b(words.encode(), digest_size=8).hexdigest()
