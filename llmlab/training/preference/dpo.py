"""Direct preference optimization: policy and reference model, pairs, trainer. The loop and the loss are TRL's
DPOTrainer; the pairs reach it as token ids, prompts already truncated."""

from trl import DPOConfig, DPOTrainer

from llmlab.runs._trl import TokenizedPairs
from llmlab.runs.policy import load_reference
from llmlab.runs.record import RunResult
from llmlab.runs.run import training_stage
from llmlab.runs.trainer import StageTrainer
from llmlab.settings.preference import DPOSettings
from llmlab.training.preference.run import PreferenceRun, StepMeanLoss


class LLMLabDPOTrainer(StageTrainer, TokenizedPairs, StepMeanLoss, DPOTrainer):
    """TRL's DPOTrainer with llmlab's optimizers, on pairs of token ids."""

    rows_per_example = 2


@training_stage(PreferenceRun)
def dpo(run: PreferenceRun[DPOSettings]) -> RunResult:
    """Trains a policy on preference pairs with DPO and writes its run folder.

    Args:
        settings: `DPOSettings`: which model, what pairs, for how long.

    Returns:
        The run folder and its last metrics: `loss`, `win_rate`, `margin`, `kl`, `chosen_logp`, `rejected_logp`, and
        the same of the validation pairs with `eval_` before them.

    Source: seed, LLM-Lab document, "DPO" and "LoRA for RLHF"; arXiv:2305.18290.
    """
    policy = run.load_policy(attach=False)
    reference, description = load_reference(run.settings, policy)
    options = {"plan": [("reference", description)], "beta": run.settings.beta}
    models = {"ref_model": reference, "peft_config": policy.new_adapters(run.settings)}
    return run.train_pairs(LLMLabDPOTrainer, DPOConfig, policy, run.read_pairs(policy), **options, **models)
