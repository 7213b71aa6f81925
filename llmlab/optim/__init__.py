"""Optimizers of the training stages: `build` chooses, `groups` sorts the parameters, `sophia` and `muon` are ours.

This file imports nothing, so that naming the package costs nothing; learning-rate schedules are Transformers' own.
"""
