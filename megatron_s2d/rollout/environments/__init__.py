"""Environments: what answers the model between its turns, and the episodes that they make (docs/environments.md)."""
