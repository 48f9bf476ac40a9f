"""Stages: each builds the arguments of the training loop (or of a cache, or an evaluation) and calls it."""
