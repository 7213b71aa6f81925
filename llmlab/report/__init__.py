"""Pages about finished and running runs: `metrics.jsonl`, record and health events as one self-contained HTML file."""
