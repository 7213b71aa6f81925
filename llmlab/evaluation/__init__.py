"""How good a model is: gates on generated answers, with intervals, and perplexity."""
