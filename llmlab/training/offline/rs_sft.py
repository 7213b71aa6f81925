"""Rejection-sampled fine-tuning: the best sample of each prompt, where it is good enough, is what the policy learns.
The loop and the loss are those of `llmlab sft`; only the tokens that were sampled are trained."""

from collections import Counter
from functools import partial

from llmlab.data.samples import Sample, group_samples
from llmlab.rewards.loading import locate_rewards
from llmlab.runs.callbacks import StageMetrics
from llmlab.runs.record import RunResult
from llmlab.runs.run import training_stage
from llmlab.settings.offline import RSSFTSettings
from llmlab.training.offline.run import OfflineRun, Weighted
from llmlab.training.sft import LLMLabSFTTrainer


def keep_best(samples: list[Sample], threshold: float) -> tuple[Weighted, Counter[str]]:
    """Returns the best sample of each prompt, of those that ended by themselves, with a reward above the threshold. An
    episode that did not solve its task is none, however many of its calls were rewarded."""
    left_out: Counter[str] = Counter()
    best: Weighted = []
    for group in group_samples(samples):
        scored = [each for each in group if each.reward is not None]
        ended = [each for each in scored if each.ended]
        solved = [each for each in ended if each.success is not False]
        good = [each for each in solved if each.reward > threshold]
        left_out["without a reward"] += len(group) - len(scored)
        left_out["cut off at the length limit"] += len(scored) - len(ended)
        left_out["episodes that failed"] += len(ended) - len(solved)
        left_out[f"reward not above {threshold:g}"] += len(solved) - len(good)
        left_out["not the best of its prompt"] += len(good[1:])
        best += [(max(good, key=lambda each: each.reward), 1.0)] if good else []
    return best, +left_out


@training_stage(OfflineRun, prepare=locate_rewards)
def rs_sft(run: OfflineRun[RSSFTSettings]) -> RunResult:
    """Samples completions or episodes, keeps the best of each prompt, fine-tunes on them and writes the run folder.

    Args:
        settings: `RSSFTSettings`: which model, what prompts, what is rewarded, what is kept.

    Returns:
        The run folder and its last metrics: `kept_share` of the samples and their mean reward as `kept_reward`,
        `loss` in nats per trained token, `eval_loss` on what is kept of the validation prompts' samples, ...

    Source: seed, RL guide, section 3; Yuan et al. 2023 (arXiv:2308.01825).
    """
    choose = partial(keep_best, threshold=run.settings.reward_threshold)
    return run.train_samples(LLMLabSFTTrainer, choose, lambda *_: StageMetrics())
