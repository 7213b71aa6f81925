"""Data sources, corpora and tokenizers."""
