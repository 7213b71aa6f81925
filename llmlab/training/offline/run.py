"""What RS-SFT and AWR share: samples drawn and scored in the run folder, or of an earlier run, and their rows.

Which samples are trained on, and with which weights, is each stage's own business.
"""

import hashlib
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

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
from llmlab.inference import context_length, end_tokens, generate_tokens
from llmlab.runs.failures import record_failures
from llmlab.runs.progress import ProgressLine, quiet_libraries
from llmlab.runs.record import RunResult
from llmlab.runs.start import S
from llmlab.settings.errors import UserError
from llmlab.settings.files import dump, read_json
from llmlab.settings.paths import expand
from llmlab.terminal import draw_bars, safe, track
from llmlab.training.offline.sampling import (
    complete,
    make_batches,
    play_episodes,
    score_samples,
    seed_batch,
    vllm_sampler,
)
from llmlab.training.online.run import RewardedRun

DRAWN = (  # settings that samples depend on
    *("policy_checkpoint", "datasets", "environment", "max_episode_length", "seed", "num_samples_per_prompt"),
    *("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "sampling_batch_size"),
)
SCORED = ("rewards", "reward_model", "normalize_rewards")
QUANTILES, BINS = (0.5, 0.75, 0.9, 0.99), 40

Weighted = list[tuple[Sample, float]]
Choose = Callable[[list[Sample]], tuple[Weighted, Counter[str]]]
"""Returns the samples to train on with their weights, and counts of the others by reason."""


class RowShape(NamedTuple):
    """Columns and counts of the rows, for `Run.build_rows`."""

    columns: Features
    counts: tuple[str, ...] = ("tokens", "trained_tokens")


class OfflineRun(RewardedRun[S]):
    """A run of RS-SFT or AWR."""

    choose: Choose
    results: dict[str, float] = {}

    def build_rows(self, shape: RowShape, *, rows_per_step: float) -> Rows:
        """Returns the rows of the chosen samples, which are drawn and scored first where there are none yet."""
        self.path, description, record = self.folder / "samples.jsonl", self.folder / "samples.json", None
        if self.process.is_main_process and self.resumed is None:
            record = self.make_record(self.policy.parents, {"sources": []})
            record.start()
        with record_failures(self.stage, self.folder, record, ProgressLine(self.console)), quiet_libraries():
            if not description.is_file():
                samples, described = self._reuse() if self.settings.samples else self._draw()
                self.process.wait_for_everyone()
                if self.process.is_main_process:
                    store.write_samples(self.path, samples)
                    dump({**described, "vocabulary": self._vocabulary()}, description)
                self.process.wait_for_everyone()
            set_seed(self.settings.seed)  # what follows does not depend on how much was drawn in this part of the run
            return self._choose_rows(store.read_samples(self.path), shape)

    def _draw(self) -> tuple[list[Sample], dict[str, Any]]:
        """Draws and scores the samples of all prompts that have none yet; processes share the batches."""
        settings, policy, process, count = (
            self.settings,
            self.policy,
            self.process,
            self.settings.num_samples_per_prompt,
        )
        reward, fill, (prompts, training) = self.compose_rewards(()), self._make_fill(), self._read_prompts()
        with process.main_process_first():
            done = {each.prompt_id for each in store.recover_samples(self.path, count)}
        batches = make_batches(policy.tokenizer, prompts, count, settings.sampling_batch_size)
        batches = [batch for batch in batches if any(each.prompt_id not in done for each in batch)]
        left = len(prompts) - len(done)
        self.console.print(
            f"sampling {left * count:,} samples of {left:,} prompts into {safe(self.path)}", soft_wrap=True
        )
        mode, rank, processes = policy.model.training, process.process_index, process.num_processes
        policy.model.eval()
        rounds = range(0, len(batches), processes)
        for first in track(rounds, len(rounds), "Sampling") if process.is_main_process else rounds:
            samples: list[Sample] = []
            for batch in batches[first + rank : first + rank + 1]:
                seed_batch(batch, settings.seed)
                fill(batch)
                for group in group_samples(batch):
                    score_samples(group, reward)
                    samples += group
            for group in group_samples(gather_object(samples)):
                if process.is_main_process and group[0].prompt_id not in done:
                    for each in group:
                        each.validation = each.prompt_id >= training
                    store.append_samples(self.path, group)
        policy.model.train(mode)
        process.wait_for_everyone()
        return store.read_samples(self.path), settings.model_dump(mode="json", include={*DRAWN, *SCORED})

    def _make_fill(self) -> Callable[[list[Sample]], None]:
        """Returns what adds completions or episodes to samples."""
        settings, tokenizer, model = self.settings, self.policy.tokenizer, self.policy.model
        if not settings.use_qlora:
            model.to(self.hardware.device)
        if settings.use_vllm and (self.policy.continues_adapter or self.process.num_processes > 1):
            raise UserError("use_vllm = true: not supported with adapters (merge them first) or several processes")
        sample = vllm_sampler(model, tokenizer, settings) if settings.use_vllm else self._sample
        if settings.environment is None:
            return partial(complete, sample=sample, tokenizer=tokenizer, ends=end_tokens(model, tokenizer))
        return partial(
            play_episodes,
            sample=sample,
            tokenizer=tokenizer,
            factories=self.load_environments(),
            max_episode_length=settings.max_episode_length,
            max_new_tokens=settings.max_new_tokens,
            max_length=self.policy.cap_length(settings.max_seq_len or sys.maxsize),
            tool_timeout=settings.tool_timeout,
        )

    def _sample(self, rows: list[list[int]]) -> list[list[int]]:
        dtype, model = self.hardware.torch_dtype, self.policy.model
        with torch.autocast(self.hardware.device, dtype, enabled=dtype != torch.float32):
            return generate_tokens(model, self.policy.tokenizer, rows, self.settings)

    def _read_prompts(self) -> tuple[dict[int, Prompt], int]:
        """Returns the prompts by number, those for training first, and how many these are."""
        settings, context = self.settings, context_length(self.policy.model) or sys.maxsize
        maker = PromptEncoder(
            self.policy.tokenizer, max_prompt_length=min(settings.prompt_limit or sys.maxsize, context - 1)
        )
        options = {"validation_rows": self.batch.validation_rows, "max_samples": settings.max_prompts}
        with self.process.main_process_first():
            rows = build_rows(settings, maker, seed=settings.seed, **options)
        self.console.print(rows.summary(), markup=False, highlight=False)
        decoded = [row for part in (rows.train, rows.validation) if part for row in decode_prompts(part)]
        prompts = [Prompt(row.pop("prompt"), row, row.get("tools")) for row in decoded]
        return dict(enumerate(prompts)), len(rows.train)

    def _vocabulary(self) -> str:
        words = sorted(self.policy.tokenizer.get_vocab().items())
        return hashlib.blake2b(str(words).encode(), digest_size=8).hexdigest()

    def _reuse(self) -> tuple[list[Sample], dict[str, Any]]:
        """Returns the samples of an earlier run, scored again if asked, after checking that they suit this one."""
        settings, path = self.settings, expand(self.settings.samples)
        path = path / "samples.jsonl" if path.is_dir() else path
        samples, side = store.read_samples(path), path.with_suffix(".json")
        before = read_json(side) if side.is_file() else {}
        largest = max(max(each.prompt_ids + each.completion_ids) for each in samples)
        if before.get("vocabulary", self._vocabulary()) != self._vocabulary() or largest >= len(self.policy.tokenizer):
            whose = f"its tokens are of another vocabulary than that of {settings.policy_checkpoint}"
            raise UserError(f"samples = {path}: {whose}; expected samples of a model with the same tokenizer")
        now = settings.model_dump(mode="json", include={*DRAWN, *SCORED})
        changed = [
            name for name in now if name in settings.model_fields_set and before.get(name, now[name]) != now[name]
        ]
        for name in changed:
            if name in SCORED and not settings.rescore:
                raise UserError(
                    f"{name}: the samples in {path} were scored by others; expected rescore=true beside it"
                )
            if name in DRAWN:
                note = f"{name} = {now[name]} has no effect: the samples were drawn with {before[name]}"
                self.console.print(f"[yellow]note[/yellow] {safe(note)}", soft_wrap=True)
        if settings.rescore:
            reward, before = self.compose_rewards(()), {**before, **{name: now[name] for name in SCORED}}
            for group in group_samples(samples):
                score_samples(group, reward)
        return samples, before

    def _choose_rows(self, samples: list[Sample], shape: RowShape) -> Rows:
        rows, left_out = self.choose([each for each in samples if not each.validation])
        most = self.settings.max_samples or len(rows)
        if len(rows) > most:
            left_out["more than max_samples"] = len(rows) - most
            rows = [rows[k] for k in np.random.default_rng(self.settings.seed).permutation(len(rows))[:most]]
        if not rows:
            raise UserError(self._explain(samples, left_out))
        mean = statistics.fmean(each.reward for each, _ in rows)  # type: ignore[misc]
        self.results = {"kept_share": len(rows) / len(samples), "kept_reward": mean}
        validation, _ = self.choose([each for each in samples if each.validation])
        report = RowsReport(self.path.name, "samples", 1.0, len(samples), len(rows), dropped=left_out)
        labels = [each.labels for each, _ in rows]
        trained = sum(len(row) - row.count(-100) for row in labels)
        report.counts = {"tokens": sum(map(len, labels)), "trained_tokens": trained}
        return Rows(_dataset(rows, shape), _dataset(validation, shape) if validation else None, [report])

    def _explain(self, samples: list[Sample], reasons: Counter[str]) -> str:
        """Returns why no sample is trained on, with a histogram of the rewards and the thresholds that keep some."""
        counted = ", ".join(f"{count:,} x {reason}" for reason, count in reasons.most_common())
        lines = [f"none of the {len(samples):,} samples is left to train on: {counted}"]
        if rewards := [each.reward for each in samples if each.reward is not None]:
            counts, edges = np.histogram(rewards, bins=BINS)
            quantiles = ", ".join(f"{share:.0%} {np.quantile(rewards, share):.3g}" for share in QUANTILES)
            lines += [*draw_bars(counts.tolist(), 3), f"{edges[0]:<{BINS // 2}.3g}{edges[-1]:>{BINS // 2}.3g}"]
            lines += [f"quantiles of the rewards: {quantiles}; a reward_threshold below one of them keeps some of the"]
            lines += [f"same samples: samples={self.path}, in another output_dir"]
        return "\n".join(lines)

    def make_sample_trainer(self, trainer: type, choose: Choose, **columns: Any) -> Any:
        """Returns the trainer of the policy on the samples that `choose` returns, with further `columns`."""
        settings, self.choose, self.policy = self.settings, choose, self.load_policy()
        shape = RowShape(Features({"input_ids": IDS, "labels": IDS, **columns}))
        self.data = self.build_rows(shape, rows_per_step=self.batch.rows)
        arguments = {
            "per_device_eval_batch_size": settings.batch_size,
            "prediction_loss_only": True,
            "max_length": None,
            "remove_unused_columns": False,
            **({} if settings.epochs is None else {"max_steps": -1}),  # then epochs decide
        }
        policy = self.policy
        made = self.make_trainer(trainer, SFTConfig, policy.model, policy.tokenizer, self.data, arguments=arguments)
        counted = self.data.reports[0].counts["tokens"] / len(self.data.train)
        self.progress.tokens_per_step = round(counted * self.batch.rows)
        return made

    def train_samples(self, trainer: Any, callbacks: Sequence[TrainerCallback]) -> RunResult:
        """Trains the policy on the samples."""
        options = {"batch": f"{self.batch.rows} samples", "results": self.results, "callbacks": callbacks}
        return self.train_rows(trainer, self.policy, self.data, **options)


def _dataset(rows: Weighted, shape: RowShape) -> Dataset:
    values = (
        {"input_ids": each.prompt_ids + each.completion_ids, "labels": each.labels, "weight": weight}
        for each, weight in rows
    )
    return Dataset.from_list([{name: row[name] for name in shape.columns} for row in values], shape.columns)
