"""Optimizers of the training stages; learning-rate schedules are Transformers' own."""
