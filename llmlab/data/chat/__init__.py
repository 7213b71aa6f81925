"""Conversations, preference pairs and prompts to rows of token ids."""
