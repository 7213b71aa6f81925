"""What can go wrong in a run, how it shows in its metrics, and what the guides do about it. Pure functions over metric
histories: what a run does about an event while it trains is `llmlab.runs.health`."""
