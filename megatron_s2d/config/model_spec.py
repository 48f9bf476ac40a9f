"""``ModelSpec``: the complete description of a model's architecture, as plain data. No torch here."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from megatron_s2d.errors import UserError

Family = Literal["qwen3", "qwen3_moe", "llama"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency-dependent stretching of rotary embeddings."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """All settings of a model's parameters and function; equal specs are the same architecture.

    ``vocab_size`` is the true vocabulary, without the rows that pad it for tensor parallelism.
    """

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Width of the dense MLP (unused by a mixture of experts, but part of published configurations)."""
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads."""
    head_dim: int
    """Channels of one head; need not be hidden_size / num_attention_heads."""
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    """Standard deviation of newly initialised weights."""
    num_experts: int = 0
    """Experts per layer; 0 for a dense model."""
    num_experts_per_tok: int = 0
    moe_ffn_hidden_size: int = 0
    """Width of one expert."""
    norm_topk_prob: bool = True
    """Whether the router weights of the selected experts are scaled to sum to one."""

    def __post_init__(self) -> None:
        problem = _inconsistency(self)
        if problem is not None:
            raise UserError(f"model: {problem}")

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return self.family != "llama"

    @property
    def q_dim(self) -> int:
        """Channels of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Channels of all key heads together (as many again for the values)."""
        return self.num_query_groups * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters, without padding; a tied embedding counts once."""
        return self._parameters(self.num_experts)

    @property
    def num_active_parameters(self) -> int:
        """Number of parameters used for one token; fewer than ``num_parameters`` in a mixture of experts."""
        return self._parameters(self.num_experts_per_tok)

    def _parameters(self, experts: int) -> int:
        attention = self.hidden_size * (2 * self.q_dim + 2 * self.kv_dim)
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        if self.num_experts:
            mlp = self.hidden_size * (self.num_experts + 3 * self.moe_ffn_hidden_size * experts)
        else:
            mlp = 3 * self.hidden_size * self.ffn_hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.hidden_size + self.num_layers * (attention + norms + mlp)

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as plain JSON types, for ``from_dict``."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> ModelSpec:
        """Invert ``to_dict``; raise ``UserError`` for unknown or missing fields."""
        names = {field.name for field in dataclasses.fields(ModelSpec)}
        unknown = sorted(set(fields) - names)
        if unknown:
            raise UserError(f"model: unknown field {unknown[0]!r}; written by another version?")
        scaling = fields.get("rope_scaling")
        try:
            return ModelSpec(**{**fields, "rope_scaling": RopeScaling(**scaling) if scaling else None})
        except TypeError as error:
            raise UserError(f"model: incomplete description ({error})") from None


def _inconsistency(spec: ModelSpec) -> str | None:
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim")
    for name in (*sizes, "vocab_size", "max_position_embeddings"):
        if getattr(spec, name) < 1:
            return f"{name} is {getattr(spec, name)}; it must be at least 1"
    if spec.hidden_size % 2:
        return f"hidden_size {spec.hidden_size} is odd; kernels and tensor-parallel shards need even widths"
    if spec.head_dim % 2:
        return f"head_dim {spec.head_dim} is odd; rotary embeddings need pairs"
    if spec.num_attention_heads % spec.num_query_groups:
        return (
            f"num_attention_heads {spec.num_attention_heads} is not a multiple of "
            f"num_query_groups {spec.num_query_groups}"
        )
    if (spec.family == "qwen3_moe") != (spec.num_experts > 0):
        return f"family {spec.family} with num_experts {spec.num_experts}; only qwen3_moe has experts"
    if spec.num_experts and not (0 < spec.num_experts_per_tok <= spec.num_experts and spec.moe_ffn_hidden_size > 0):
        return (
            f"a mixture of {spec.num_experts} experts needs num_experts_per_tok between 1 and that (it is "
            f"{spec.num_experts_per_tok}) and a moe_ffn_hidden_size (it is {spec.moe_ffn_hidden_size})"
        )
    return None
