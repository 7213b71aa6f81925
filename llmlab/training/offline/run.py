"""What RS-SFT and AWR share: samples drawn and scored in the run folder, or of an earlier run, and their rows. Which
samples are trained on, and with which weights, is each stage's own business."""

import statistics
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset, Features
from transformers import TrainerCallback, set_seed
from trl import SFTConfig

from llmlab.data import samples as store
from llmlab.data.chat.makers import IDS, PromptEncoder, decode_prompts
from llmlab.data.chat.rows import Rows, RowsReport, build_rows
from llmlab.data.samples import Prompt, Sample, group_samples
from llmlab.data.splits import text_hash
from llmlab.inference import context_length, end_tokens, generate_tokens
from llmlab.runs.failures import record_failures
from llmlab.runs.progress import ProgressLine, quiet_libraries
from llmlab.runs.record import RunResult
from llmlab.runs.start import S
from llmlab.settings.base import show
from llmlab.settings.errors import UserError
from llmlab.settings.files import dump, read_json
from llmlab.settings.generation import SamplingSettings
from llmlab.settings.paths import expand
from llmlab.settings.rewards import EnvironmentSettings
from llmlab.terminal import draw_bars, safe, track
from llmlab.training.offline import sampling
from llmlab.training.online.run import RewardedRun

DRAWN = (  # what has no effect on samples of an earlier run
    *(*SamplingSettings.model_fields, *EnvironmentSettings.model_fields, "num_samples_per_prompt", "datasets"),
    *("max_prompts", "max_prompt_length", "max_seq_len", "validation_fraction", "validation_datasets"),
)
SCORED = ("rewards", "reward_model", "normalize_rewards")

Weighted = list[tuple[Sample, float]]
Choose = Callable[[list[Sample]], tuple[Weighted, Counter[str]]]
"""Returns the samples to train on with their weights, and counts of the others by reason."""


def to_dataset(samples: Weighted, columns: Features) -> Dataset | None:
    """Returns samples as rows of a trainer, with these of their columns; None where there are none."""
    values = {
        "input_ids": [each.prompt_ids + each.completion_ids for each, _ in samples],
        "labels": [each.labels for each, _ in samples],
        "weight": [weight for _, weight in samples],
    }
    return Dataset.from_dict({name: values[name] for name in columns}, columns) if samples else None


class OfflineRun(RewardedRun[S]):
    """A run of RS-SFT or AWR."""

    results: dict[str, float] = {}

    def train_samples(
        self, trainer: type, choose: Choose, metrics: Callable[[Any, ProgressLine], TrainerCallback], **columns: Any
    ) -> RunResult:
        """Trains the policy on the samples that `choose` returns, as rows that may have further columns."""
        settings, rows_per_step = self.settings, self.batch.rows
        self.choose, self.policy = choose, self.load_policy()
        shape = SimpleNamespace(columns=Features({"input_ids": IDS, "labels": IDS, **columns}), counts=("tokens",))
        data = self.build_rows(shape, rows_per_step=rows_per_step)
        arguments = {
            "per_device_eval_batch_size": settings.batch_size,
            "prediction_loss_only": True,
            "max_length": None,
            "remove_unused_columns": False,
            **({} if settings.epochs is None else {"max_steps": -1}),  # then epochs decide
        }
        model, tokenizer = self.policy.model, self.policy.tokenizer
        made = self.make_trainer(trainer, SFTConfig, model, tokenizer, data, arguments=arguments)
        self.progress.tokens_per_step = round(data.reports[0].counts["tokens"] / len(data.train) * rows_per_step)
        options = {"batch": f"{rows_per_step} samples", "results": self.results}
        return self.train_rows(made, self.policy, data, callbacks=[metrics(made, self.progress)], **options)

    def build_rows(self, shape: Any, *, rows_per_step: float) -> Rows:
        """Returns the rows of the chosen samples, which are drawn and scored first where there are none yet."""
        self.path, description, record = self.folder / "samples.jsonl", self.folder / "samples.json", None
        main = self.process.is_main_process
        if main and self.resumed is None:
            record = self.make_record(self.policy.parents, {"sources": []})
            record.start()
        with record_failures(self.stage, self.folder, record, ProgressLine(self.console)), quiet_libraries():
            if not description.is_file():
                samples, described = self._reuse() if self.settings.samples else self._draw()
                self.process.wait_for_everyone()
                if main:
                    store.write_samples(self.path, samples)
                    dump({**described, "vocabulary": self._vocabulary()}, description)
                self.process.wait_for_everyone()
            set_seed(self.settings.seed)  # what follows does not depend on how much was drawn in this part of the run
            return self._choose_rows(store.read_samples(self.path), shape.columns)

    def _draw(self) -> tuple[list[Sample], dict[str, Any]]:
        """Draws and scores the samples of all prompts that have none yet; processes share the batches."""
        settings, model, process, count = self.settings, self.policy.model, self.process, self.process.num_processes
        reward, fill, (prompts, training) = self.compose_rewards(()), self._make_fill(), self._read_prompts()
        with process.main_process_first():
            here = self.path.is_file()
            samples = store.read_samples(self.path, count=settings.num_samples_per_prompt) if here else []
            if process.is_main_process and here:
                store.write_samples(self.path, samples)
        done = {each.prompt_id for each in samples}
        counts = settings.num_samples_per_prompt, settings.sampling_batch_size
        batches = sampling.make_batches(self.policy.tokenizer, prompts, *counts)
        batches = [batch for batch in batches if any(each.prompt_id not in done for each in batch)]
        self.console.print(f"sampling for {len(prompts) - len(done):,} prompts into {safe(self.path)}", soft_wrap=True)
        mode, rounds = model.training, range(0, len(batches), count)
        model.eval()
        for first in track(rounds, len(rounds), "Sampling") if process.is_main_process else rounds:
            mine = batches[first : first + count][process.process_index :][:1]
            for batch in mine:
                sampling.draw(batch, fill, reward, settings.seed)
            for group in group_samples(gather_object([each for batch in mine for each in batch])):
                for each in group:
                    each.validation = each.prompt_id >= training
                if process.is_main_process and group[0].prompt_id not in done:
                    store.append_samples(self.path, group)
        model.train(mode)
        process.wait_for_everyone()
        return store.read_samples(self.path), settings.recorded()

    def _make_fill(self) -> Callable[[list[Sample]], None]:
        """Returns what adds completions or episodes to samples."""
        settings, tokenizer, model = self.settings, self.policy.tokenizer, self.policy.model
        ends, sample = end_tokens(model, tokenizer), self._sample
        if not settings.use_qlora:
            model.to(self.hardware.device)
        if settings.use_vllm:
            if find_spec("vllm") is None or self.policy.continues_adapter or self.process.num_processes > 1:
                raise UserError("use_vllm = true: it takes vLLM (pip install vllm), one process and a merged model")
            options = {name: getattr(settings, name) for name in ("temperature", "top_p", "repetition_penalty")}
            options |= {"top_k": settings.top_k or -1, "max_tokens": settings.max_new_tokens}
            sample = sampling.vllm_sampler(settings.policy_checkpoint, ends, settings.seed, **options)
        if settings.environment is None:
            return partial(sampling.complete, sample=sample, tokenizer=tokenizer, ends=ends)
        limits = {name: getattr(settings, name) for name in ("max_episode_length", "max_new_tokens", "tool_timeout")}
        limits["max_length"] = self.policy.cap_length(settings.max_seq_len or sys.maxsize)
        options = {"sample": sample, "tokenizer": tokenizer, "factories": self.load_environments(), "ends": ends}
        return partial(sampling.play_episodes, **options, **limits)

    def _sample(self, rows: list[list[int]]) -> list[list[int]]:
        dtype = self.hardware.torch_dtype
        with torch.autocast(self.hardware.device, dtype, enabled=dtype != torch.float32):
            size = self.settings.sampling_batch_size
            return generate_tokens(self.policy.model, self.policy.tokenizer, rows, self.settings, batch_size=size)

    def _read_prompts(self) -> tuple[dict[int, Prompt], int]:
        """Returns the prompts by number, those for training first, and how many these are."""
        settings, context = self.settings, context_length(self.policy.model) or sys.maxsize
        limit = min(settings.prompt_limit or sys.maxsize, context - 1)
        maker = PromptEncoder(self.policy.tokenizer, max_prompt_length=limit)
        options = {"validation_rows": self.batch.validation_rows, "max_samples": settings.max_prompts}
        with self.process.main_process_first():
            rows = build_rows(settings, maker, seed=settings.seed, **options)
        self.console.print(rows.summary(), markup=False, highlight=False)
        decoded = [row for part in (rows.train, rows.validation) if part for row in decode_prompts(part)]
        prompts = [Prompt(row.pop("prompt"), row, row.get("tools")) for row in decoded]
        return dict(enumerate(prompts)), len(rows.train)

    def _vocabulary(self) -> int:
        return text_hash(str(sorted(self.policy.tokenizer.get_vocab().items())))

    def _reuse(self) -> tuple[list[Sample], dict[str, Any]]:
        """Returns the samples of an earlier run, scored again if asked, after checking that they suit this one."""
        settings, path = self.settings, expand(self.settings.samples)
        path = path / "samples.jsonl" if path.is_dir() else path
        samples, side, vocabulary = store.read_samples(path), path.with_suffix(".json"), self._vocabulary()
        before, now = read_json(side) if side.is_file() else {}, settings.recorded()
        if before.get("vocabulary", vocabulary) != vocabulary:
            whose = f"another vocabulary than that of {settings.policy_checkpoint}"
            raise UserError(f"samples = {path}: its tokens are of {whose}; expected the same tokenizer")
        changed = {name for name in settings.model_fields_set if before.get(name, now.get(name)) != now.get(name)}
        if settings.rescore:
            reward, before = self.compose_rewards(()), {**before, **{name: now[name] for name in SCORED}}
            for group in group_samples(samples):
                sampling.score_samples(group, reward)
        elif rewards := sorted(changed & {*SCORED}):
            raise UserError(f"{rewards[0]}: the samples in {path} were scored by others; expected rescore=true beside")
        for name in sorted(changed & {*DRAWN}):
            note = f"{name} = {show(now[name])} has no effect: the samples were drawn with {show(before[name])}"
            self.console.print(f"[yellow]note[/yellow] {safe(note)}", soft_wrap=True)
        return samples, before

    def _choose_rows(self, samples: list[Sample], columns: Features) -> Rows:
        training, held_out = ([each for each in samples if each.validation is side] for side in (False, True))
        (rows, left_out), (validation, _) = self.choose(training), self.choose(held_out)
        most = self.settings.max_samples or len(rows)
        if len(rows) > most:
            left_out["more than max_samples"] = len(rows) - most
            rows = [rows[k] for k in np.random.default_rng(self.settings.seed).permutation(len(rows))[:most]]
        if not rows:
            raise UserError(self._explain(training, left_out))
        mean = statistics.fmean(each.reward for each, _ in rows)  # type: ignore[misc]
        self.results = {"kept_share": len(rows) / len(training), "kept_reward": mean}
        counts = {"tokens": sum(len(each.prompt_ids) + len(each.completion_ids) for each, _ in rows)}
        report = RowsReport(self.path.name, "samples", 1.0, len(training), len(rows), counts, left_out)
        return Rows(to_dataset(rows, columns), to_dataset(validation, columns), [report])

    def _explain(self, samples: list[Sample], reasons: Counter[str]) -> str:
        """Returns why no sample is trained on, with a histogram of the rewards and the thresholds that keep some."""
        counted = ", ".join(f"{count:,} x {reason}" for reason, count in reasons.most_common())
        rewards = [each.reward for each in samples if each.reward is not None] or [0.0]
        counts, edges = np.histogram(rewards, bins=40)
        quantiles = ", ".join(f"{share:.0%} {np.quantile(rewards, share):.3g}" for share in (0.5, 0.75, 0.9, 0.99))
        bars = "\n".join([*draw_bars(counts.tolist(), 3), f"{edges[0]:<20.3g}{edges[-1]:>20.3g}"])
        return (
            f"none of the {len(samples):,} samples is left to train on: {counted}\n{bars}\nquantiles of the rewards: "
            f"{quantiles}; to train on the same samples with other settings: samples={self.path} output_dir=..."
        )
