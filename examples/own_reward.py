"""Teach the quickstart's model to answer sums with a reward of one's own, from Python.

    python examples/own_reward.py
    llmlab reward-check examples/answers.jsonl --allow-code \
        --rewards '[numeric_match, {name: "examples/own_reward.py:brief", weight: 0.2, min: 0, max: 1}]'

Needs the quickstart's merged model: `make quickstart`.
"""

import llmlab
from llmlab.rewards import Reward


def brief(completions, **columns):
    """One for an empty answer, 0 for 100 characters and more."""
    texts = [turns if isinstance(turns, str) else turns[-1]["content"] for turns in completions]
    return [max(0.0, 1 - len(text) / 100) for text in texts]


if __name__ == "__main__":
    settings = llmlab.GRPOSettings(
        policy_checkpoint="runs/quickstart/merge",
        datasets=["demo/arithmetic | 2MB"],
        rewards=["numeric_match"],
        batch_size=32,
        group_size=8,
        mini_batch_size=128,
        gradient_accumulation_steps=2,
        ppo_epochs=1,
        max_new_tokens=40,
        init_kl_coef=0,
        learning_rate=2e-4,
        max_steps=40,
        eval_every=20,
        output_dir="runs/own_reward",
    )
    result = llmlab.grpo(settings, rewards=[Reward(brief, weight=0.2, low=0, high=1)])
    print({name: round(value, 3) for name, value in result.metrics.items() if name.startswith("eval_reward")})
