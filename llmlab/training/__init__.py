"""Training: one file a stage, read top to bottom; importing this package costs nothing."""
