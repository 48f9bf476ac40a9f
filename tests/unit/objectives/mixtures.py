"""Weighted sums of objectives for tests."""

from __future__ import annotations

import dataclasses

from megatron_s2d.objectives.terms import Objective


def weighted_sum(*parts: tuple[float, Objective]) -> Objective:
    """Return the sum of coefficient * objective; its ``kl`` is that of the first objective."""
    terms = (
        dataclasses.replace(term, coefficient=coefficient * term.coefficient)
        for coefficient, objective in parts
        for term in objective.terms
    )
    first = parts[0][1]
    return Objective(tuple(terms), first.kl_metric, first.token_kl)
