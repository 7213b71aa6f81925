"""Environments in which a policy acts by calling tools: the contract, llmlab's own tool world, wrappers of others."""
