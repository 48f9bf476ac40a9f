"""The cases that kl_worker.py computes and test_kl_sharded.py checks."""

from __future__ import annotations

import dataclasses

import torch

ALL = ("log_probs", "entropy", "forward_kl", "reverse_kl")


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem; ``layout``: "padded" (Megatron's), "empty" (ranks without a valid column), "uneven"."""

    outputs: tuple[str, ...]
    layout: str = "padded"
    beta: float | None = None
    dtype: torch.dtype = torch.float64
    sequence_parallel: bool = False
    tail: str | None = None
    vocab: int = 37
    sizes: tuple[int, ...] = (1, 2, 4)


def _cases() -> dict[str, Case]:
    cases = {
        "all": Case(ALL),
        "sequence parallel": Case(ALL, sequence_parallel=True),
        "sequence parallel, jsd": Case(("jsd", *ALL), beta=0.3, sequence_parallel=True),
        "one column": Case(ALL, vocab=1),
        "three columns": Case(("jsd", *ALL), beta=0.5, vocab=3),
    }
    for layout in ("padded", "empty", "uneven"):
        for dtype in (torch.float64, torch.float32):
            cases[f"{layout} {dtype}"] = Case(ALL, layout, dtype=dtype)
            for name in ("jsd", "skew_forward_kl", "skew_reverse_kl"):
                cases[f"{name} {layout} {dtype}"] = Case((name, "log_probs"), layout, 0.3, dtype)
        for tail in ("bucket", "renormalise", "truncate"):
            cases[f"{tail} {layout}"] = Case((*ALL, "captured_mass", "student_captured_mass"), layout, tail=tail)
    cases["large float32"] = Case(("skew_reverse_kl", *ALL), beta=0.3, dtype=torch.float32, vocab=5003)
    return cases


CASES = _cases()
# Broken step -> the case whose answer it must change.
CONTROLS = {"no gather": "all", "no scale": "all", "no hidden reduction": "all"}
