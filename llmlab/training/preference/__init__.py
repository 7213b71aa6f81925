"""Stages that learn from preference pairs: DPO, ORPO, reward models; and pairs from a model's own completions."""
