"""Rejection-sampled fine-tuning: the best sample of each prompt, where it is good enough, is what the policy learns.

The loop and the loss are those of `llmlab sft`; only the tokens that were sampled are trained.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial

from llmlab.data.samples import Sample, group_samples
from llmlab.rewards.loading import locate_rewards
from llmlab.runs.callbacks import StageMetrics
from llmlab.runs.record import RunResult
from llmlab.runs.run import training_stage
from llmlab.settings.rs_sft import RSSFTSettings
from llmlab.training.offline.run import Chosen, OfflineRun, RewardFunction, SampleRows, mean_reward
from llmlab.training.sft import LLMLabSFTTrainer


def keep_best(samples: list[Sample], threshold: float) -> Chosen:
    """Returns the best sample of each prompt, of those that ended by themselves, with a reward above the threshold."""
    left_out: Counter[str] = Counter()
    best = []
    for group in group_samples(samples):
        ended = [each for each in group if each.ended and each.reward is not None]
        left_out["without a reward"] += sum(each.reward is None for each in group)
        left_out["cut off at the length limit"] += sum(each.reward is not None and not each.ended for each in group)
        good = [each for each in ended if each.reward > threshold]
        left_out[f"reward not above {threshold:g}"] += len(ended) - len(good)
        left_out["not the best of its prompt"] += max(len(good) - 1, 0)
        best += [max(good, key=lambda each: each.reward)] if good else []
    results = {"kept_share": len(best) / len(samples), "kept_reward": mean_reward(best)} if best else {}
    return Chosen([(each, 1.0) for each in best], +left_out, results)


@training_stage(OfflineRun, prepare=locate_rewards)
def rs_sft(run: OfflineRun[RSSFTSettings], *, rewards: Sequence[RewardFunction] = ()) -> RunResult:
    """Samples completions or episodes, keeps the best of each prompt, fine-tunes on them and writes the run folder.

    Args:
        settings: `RSSFTSettings`: which model, what prompts, what is rewarded, what is kept.
        rewards: custom reward functions in addition to the settings', as in `llmlab.grpo`.

    Returns:
        The run folder and its last metrics: `kept_share` of the samples, the mean reward of those as `kept_reward`,
        `loss` in nats per trained token, `eval_loss` on the kept samples of validation prompts, ...

    Source: seed, RL guide, section 3; Yuan et al. 2023 (arXiv:2308.01825).
    """
    choose = partial(keep_best, threshold=run.settings.reward_threshold)
    trainer = run.make_sample_trainer(LLMLabSFTTrainer, SampleRows(run.load_policy(), choose, rewards))
    return run.train_samples(trainer, callbacks=[StageMetrics()])
