"""Which activations the backward pass recomputes instead of reading them, in Megatron-Core's terms. No torch here."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Recomputed = Literal["none", "selective", "full"]
Module = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act"]
OF_EXPERTS = ("layernorm", "moe", "moe_act")  # a dense layer's norms are fused with the products behind them
WITH_TRANSFORMER_ENGINE = ("layernorm", "moe_act")
Method = Literal["uniform", "block"]


@dataclasses.dataclass(frozen=True)
class Recompute:
    """The settings of a model; see ``ModelConfig`` for their meaning."""

    what: Recomputed = "none"
    modules: tuple[Module, ...] = ("core_attn",)  # with selective
    method: Method = "uniform"  # with full
    num_layers: int = 1  # with full

    def recomputes(self, module: Module) -> bool:
        """Return whether ``module`` alone is recomputed in every layer."""
        return self.what == "selective" and module in self.modules

    def num_recomputed(self, num_layers: int) -> int:
        """Return how many of a chunk's ``num_layers`` layers are recomputed as a whole."""
        if self.what != "full":
            return 0
        return num_layers if self.method == "uniform" else min(self.num_layers, num_layers)

    def megatron_fields(self) -> dict[str, Any]:
        """Return the fields of Megatron's ``TransformerConfig``."""
        if self.what == "none":
            return {}
        if self.what == "selective":
            return {"recompute_granularity": "selective", "recompute_modules": list(self.modules)}
        return {
            "recompute_granularity": "full",
            "recompute_method": self.method,
            "recompute_num_layers": self.num_layers,
        }


NO_RECOMPUTE = Recompute()
