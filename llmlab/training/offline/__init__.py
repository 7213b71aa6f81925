"""Stages that learn from samples which are drawn and scored once."""
