"""Metrics of routing replay: how far the replayed experts are the ones that the trainer's routers would choose.

They show that the routes fit the tokens: routes of other tokens, layers or models agree about as often as chance does.
Shapes: l layers of the whole model.
"""

from __future__ import annotations

import torch

from megatron_s2d.objectives.terms import Metric


def replay_metrics(counts: torch.Tensor) -> dict[str, Metric]:
    """Return the metrics of ``counts`` [2, l]: choices that were replayed, and those among the routers' own.

    ``moe/replayed_agreement``: the share of the replayed choices that are also the trainer's own.
    ``moe/replayed_agreement_min``: that of the layer with the smallest. Nothing if nothing was replayed.
    """
    replayed, agreeing = counts
    if not replayed.all():
        return {}
    one = torch.ones((), dtype=torch.float64)
    return {
        "moe/replayed_agreement": Metric(agreeing.sum(), replayed.sum(), "mean"),
        "moe/replayed_agreement_min": Metric((agreeing / replayed).amin(), one, "min"),
    }
