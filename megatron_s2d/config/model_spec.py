"""``ModelSpec``: the complete description of a model's architecture, as plain data. No torch here."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from megatron_s2d.config.families import FAMILIES, Family, Name
from megatron_s2d.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency-dependent stretching of rotary embeddings."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN's stretching of rotary embeddings (Peng et al. 2023)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    """Turns over the original positions from which on a pair of channels is not stretched."""
    beta_slow: float
    """Turns up to which it is stretched by ``factor``; in between the two blend."""
    attention_factor: float
    """Factor of rotated queries and keys."""
    truncate: bool = True
    """Whether the channels between which the two blend are rounded to integers."""


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by ``factor``."""

    factor: float


AnyScaling = RopeScaling | YarnScaling | LinearScaling


def scaling_from_dict(fields: dict[str, Any]) -> AnyScaling:
    """Return the rope scaling that has ``fields``; raise ``TypeError`` if none has."""
    if set(fields) == {"factor"}:
        return LinearScaling(**fields)
    return YarnScaling(**fields) if "beta_fast" in fields else RopeScaling(**fields)


_OPTIONAL = ("sliding_window", "layer_types", "sliding_rope_theta", "query_pre_attn_scalar")
"""Fields that ``to_dict`` leaves out at their defaults: descriptions of models without them stay as they were."""


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """All settings of a model's parameters and function; equal specs are the same architecture.

    ``vocab_size`` is the true vocabulary, without the rows that pad it for tensor parallelism.
    """

    family: Name
    """Row of ``config/families.py``, which has the parts that all its models share."""
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
    rope_scaling: AnyScaling | None = None
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
    sliding_window: int | None = None
    """Positions that a token of a sliding layer attends to, its own included; None: no layer slides."""
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] = ()
    """Kinds of the first layers, repeated over the others; empty: all layers slide if there is a window.

    Brought to its shortest form.
    """
    sliding_rope_theta: float | None = None
    """Base of the unscaled rotary embeddings of sliding layers; None: that of the others."""
    query_pre_attn_scalar: int | None = None
    """Attention scores are divided by its square root; None: by that of ``head_dim``."""

    def __post_init__(self) -> None:
        problem = _inconsistency(self)
        if problem is not None:
            raise UserError(f"model: {problem}")
        if self.layer_types:
            kinds = [self.layer_types[layer % len(self.layer_types)] for layer in range(self.num_layers)]
            object.__setattr__(self, "layer_types", _shortest_period(kinds) if "full_attention" in kinds else ())

    @property
    def parts(self) -> Family:
        """The parts that all models of the family share."""
        return FAMILIES[self.family]

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return self.parts.qk_norm

    def window_of_layer(self, layer: int) -> int | None:
        """Return the sliding window of ``layer``, counted from 0 over the full model; None: it attends to all."""
        if self.sliding_window is None or not self.layer_types:
            return self.sliding_window
        kind = self.layer_types[layer % len(self.layer_types)]
        return self.sliding_window if kind == "sliding_attention" else None

    @property
    def q_dim(self) -> int:
        """Channels of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Channels of all key heads together (as many again for the values)."""
        return self.num_query_groups * self.head_dim

    @property
    def expert_index_dtype(self) -> Literal["uint8", "int16"]:
        """Name of the smallest dtype that holds the index of an expert, in numpy and torch."""
        return "uint8" if self.num_experts <= 256 else "int16"

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
        attention += (self.q_dim + 2 * self.kv_dim) if self.parts.qkv_bias else 0
        norms = (4 if self.parts.post_norms else 2) * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        if self.parts.attention_sinks:
            attention += self.num_attention_heads
        if self.parts.linear_biases:  # of the attention's output, the router and the experts
            attention += (
                self.hidden_size + self.num_experts + experts * (2 * self.moe_ffn_hidden_size + self.hidden_size)
            )
        if self.num_experts:
            mlp = self.hidden_size * (self.num_experts + 3 * self.moe_ffn_hidden_size * experts)
        else:
            mlp = 3 * self.hidden_size * self.ffn_hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.hidden_size + self.num_layers * (attention + norms + mlp)

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as plain JSON types, for ``from_dict``."""
        fields = dataclasses.asdict(self) | {"layer_types": list(self.layer_types)}
        return {name: value for name, value in fields.items() if name not in _OPTIONAL or value}

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> ModelSpec:
        """Invert ``to_dict``; raise ``UserError`` for unknown or missing fields."""
        names = {field.name for field in dataclasses.fields(ModelSpec)}
        unknown = sorted(set(fields) - names)
        if unknown:
            raise UserError(f"model: unknown field {unknown[0]!r}; written by another version?")
        scaling = fields.get("rope_scaling")
        try:
            plain = {"rope_scaling": scaling_from_dict(scaling) if scaling else None}
            return ModelSpec(**{**fields, **plain, "layer_types": tuple(fields.get("layer_types", ()))})
        except TypeError as error:
            raise UserError(f"model: incomplete description ({error})") from None


# Several times the largest published: a larger size is a slip of the keyboard, and its plan would take for ever.
_LARGEST_SIZE = 1_000_000
_LARGEST_SIZES = {"num_layers": 2_000, "vocab_size": 10_000_000, "max_position_embeddings": 1_000_000_000}


def _inconsistency(spec: ModelSpec) -> str | None:
    if not isinstance(spec.family, str) or spec.family not in FAMILIES:
        return f"unknown family {spec.family!r}"
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim")
    for name in (*sizes, "vocab_size", "max_position_embeddings"):
        value = getattr(spec, name)
        if type(value) is not int or value < 1:
            return f"{name} is {value!r}; it must be an integer of at least 1"
        if value > _LARGEST_SIZES.get(name, _LARGEST_SIZE):
            return (
                f"{name} is {value:,}, larger than in any model (at most {_LARGEST_SIZES.get(name, _LARGEST_SIZE):,})"
            )
    if not spec.rope_theta >= 1:
        return f"rope_theta is {spec.rope_theta}; rotary embeddings need a base of at least 1"
    if not spec.norm_eps > 0:
        return f"norm_eps is {spec.norm_eps}; it must be positive"
    if spec.hidden_size % 2:
        return f"hidden_size {spec.hidden_size} is odd; kernels and tensor-parallel shards need even widths"
    if spec.head_dim % 2:
        return f"head_dim {spec.head_dim} is odd; rotary embeddings need pairs"
    if spec.num_attention_heads % spec.num_query_groups:
        return (
            f"num_attention_heads {spec.num_attention_heads} is not a multiple of "
            f"num_query_groups {spec.num_query_groups}"
        )
    if spec.parts.has_experts != (spec.num_experts > 0):
        with_experts = " and ".join(name for name, family in FAMILIES.items() if family.has_experts)
        return f"family {spec.family} with num_experts {spec.num_experts}; only {with_experts} have experts"
    if spec.num_experts and not (0 < spec.num_experts_per_tok <= spec.num_experts and spec.moe_ffn_hidden_size > 0):
        return (
            f"a mixture of {spec.num_experts} experts needs num_experts_per_tok between 1 and that (it is "
            f"{spec.num_experts_per_tok}) and a moe_ffn_hidden_size (it is {spec.moe_ffn_hidden_size})"
        )
    return _inconsistent_windows(spec)


def _shortest_period(kinds: list[Any]) -> tuple[Any, ...]:
    """Return the shortest beginning of ``kinds`` that gives all of them when it is repeated."""
    fits = (size for size in range(1, len(kinds)) if all(a == b for a, b in zip(kinds, kinds[size:], strict=False)))
    return tuple(kinds[: next(fits, len(kinds))])


def _inconsistent_windows(spec: ModelSpec) -> str | None:
    window = spec.sliding_window
    if window is not None and (type(window) is not int or not 0 < window <= _LARGEST_SIZES["max_position_embeddings"]):
        return f"sliding_window is {window!r}; it must be an integer of at least 1"
    if window is not None and spec.parts.windows == "none":
        return f"family {spec.family} has no sliding windows (sliding_window is {window})"
    if unknown := set(spec.layer_types) - {"full_attention", "sliding_attention"}:
        return f"layer_types has {min(map(str, unknown))!r}; it may have full_attention and sliding_attention"
    if spec.layer_types and window is None:
        return "layer_types without a sliding_window"
    if spec.sliding_rope_theta is not None and not (spec.sliding_rope_theta >= 1 and window is not None):
        return f"sliding_rope_theta {spec.sliding_rope_theta} needs a sliding_window and a base of at least 1"
    if spec.query_pre_attn_scalar is not None and not spec.query_pre_attn_scalar > 0:
        return f"query_pre_attn_scalar is {spec.query_pre_attn_scalar}; it must be positive"
    return None
