"""Environments in which a policy acts by calling tools: the contract, llmlab's own tool world, wrappers of others."""

from llmlab.simulator.environment import Environment, from_gymnasium, from_openenv
from llmlab.simulator.world import Simulator

__all__ = ["Environment", "Simulator", "from_gymnasium", "from_openenv"]
