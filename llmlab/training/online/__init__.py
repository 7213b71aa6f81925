"""Online RL stages: GRPO and PPO."""
