"""Stages that learn from their own completions: GRPO and PPO."""
