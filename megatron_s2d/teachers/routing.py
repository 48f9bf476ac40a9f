"""Routing of samples to teachers: one per domain, or one (under the key ``None``) for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from megatron_s2d.errors import UserError
from megatron_s2d.records import AnySample


def is_routed(teachers: Mapping[str | None, object]) -> bool:
    """Return whether each domain has a teacher of its own."""
    return None not in teachers


def teacher_of[T](teachers: Mapping[str | None, T], domain: str | None) -> T:
    """Return the teacher of ``domain``; raise ``UserError`` if it has none."""
    teacher = teachers.get(domain if is_routed(teachers) else None)
    if teacher is None:
        raise UserError(f"there is no teacher for the domain '{domain}' (there is one for {', '.join(teachers)})")
    return teacher


def score_by_domain(
    samples: Sequence[AnySample], score: Callable[[str, list[AnySample]], list[np.ndarray | None]]
) -> list[np.ndarray | None]:
    """Return ``score(domain, samples of that domain)``, in the order of ``samples``."""
    scores: dict[int, np.ndarray | None] = {}
    for domain in sorted({sample.domain for sample in samples}):
        indices = [index for index, sample in enumerate(samples) if sample.domain == domain]
        scores |= dict(zip(indices, score(domain, [samples[index] for index in indices]), strict=True))
    return [scores[index] for index in range(len(samples))]
