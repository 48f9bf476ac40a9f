"""Model configuration: the settings of a user (``ModelConfig``) and the complete description (``ModelSpec``).

A model comes from a preset, from the ``config.json`` of a Hugging Face directory, or from explicit fields; fields of a
preset can be overridden. No torch here.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config
from megatron_s2d.config.families import Name
from megatron_s2d.config.hf_config import spec_from_directory
from megatron_s2d.config.model_spec import ModelSpec, RopeScaling, scaling_from_dict
from megatron_s2d.config.presets import PRESETS
from megatron_s2d.config.recompute import OF_EXPERTS, Method, Module, Recompute
from megatron_s2d.errors import UserError


class RopeScalingConfig(Config):
    """Llama 3's rope scaling; see ``RopeScaling``."""

    factor: float = Field(gt=0)
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)
    original_max_position_embeddings: int = Field(8192, ge=1)


class ModelConfig(Config):
    """A model: by ``preset``, by ``path``, or field by field; fields beside a preset override it."""

    preset: str | None = Field(None, description="one of " + ", ".join(PRESETS))
    path: Path | None = Field(
        None,
        description="Hugging Face directory (its config.json describes the model, its safetensors are the weights), or "
        "a Megatron checkpoint: a converted one, or the model/ of a finished stage",
    )
    tokenizer: str | None = Field(
        None,
        description="tokenizer of this model, with its chat template: a directory or hub name with the same token ids "
        "as the workflow's `tokenizer`, which is the default",
    )
    chat_template: Path | None = Field(None, description="file of a Jinja chat template instead of the tokenizer's own")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="activations to recompute in the backward pass: none, some modules, or whole layers"
    )
    recompute_modules: list[Module] | None = Field(
        None,
        description="with recompute selective: core_attn (the default); mlp; of mixtures of experts moe (all of it) "
        "and, with Transformer Engine, layernorm (the norm before it) and moe_act (its activation function)",
    )
    recompute_method: Method | None = Field(
        None,
        description="with recompute full: uniform (the default) recomputes all layers, in units of "
        "recompute_num_layers that save their input only; block recomputes the first recompute_num_layers layers of "
        "each pipeline rank (of each virtual stage) and no others",
    )
    recompute_num_layers: int | None = Field(None, ge=1, description="see recompute_method; 1 by default")
    moe_aux_loss_coeff: float = Field(0.0, ge=0, description="weight of the router's load-balancing loss in training")

    family: Name | None = None
    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    head_dim: int | None = None
    vocab_size: int | None = Field(None, description="by default the tokenizer's size")
    max_position_embeddings: int | None = None
    rope_theta: float | None = None
    rope_scaling: RopeScalingConfig | None = None
    tie_word_embeddings: bool | None = None
    norm_eps: float | None = None
    initializer_range: float | None = None
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_ffn_hidden_size: int | None = None
    norm_topk_prob: bool | None = None

    @pydantic.model_validator(mode="after")
    def _check_one_source(self) -> ModelConfig:
        _check_recompute(self)
        overrides = sorted(self._overrides())
        if self.preset is not None and self.preset not in PRESETS:
            close = difflib.get_close_matches(self.preset, PRESETS, n=1, cutoff=0.4)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(PRESETS)}"
            raise ValueError(f"unknown preset '{self.preset}' ({hint})")
        if self.preset is not None and self.path is not None:
            raise ValueError("set either preset or path, not both")
        if self.path is not None and overrides:
            raise ValueError(f"{overrides[0]} is set by the config.json in `path`: leave it out")
        if self.preset is None and self.path is None:
            required = [field.name for field in dataclasses.fields(ModelSpec) if _is_required(field)]
            missing = [name for name in required if name not in overrides and name != "vocab_size"]
            if missing:
                raise ValueError(f"set a preset or a path, or these fields too: {', '.join(missing)}")
        return self

    @property
    def recomputation(self) -> Recompute:
        """The settings ``recompute*`` with their defaults."""
        return Recompute(
            self.recompute,
            tuple(self.recompute_modules or ("core_attn",)),
            self.recompute_method or "uniform",
            self.recompute_num_layers or 1,
        )

    def _overrides(self) -> dict[str, Any]:
        # Windows and their kind come from a config.json or a preset only.
        names = {field.name for field in dataclasses.fields(ModelSpec)} & set(ModelConfig.model_fields)
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.rope_scaling is not None:
            values["rope_scaling"] = RopeScaling(**self.rope_scaling.model_dump())
        return values

    def resolve(self, vocab_size: int | None = None) -> ModelSpec:
        """Return the complete specification. vocab_size: the tokenizer's, the default and lower bound of the model's.

        Raises ``UserError`` for contradictory fields, an unreadable ``path``, or a model smaller than its tokenizer.
        """
        if self.path is not None:
            spec = spec_from_directory(self.path)
        else:
            fields = dict(PRESETS[self.preset]) if self.preset is not None else {}
            if isinstance(fields.get("rope_scaling"), dict):
                fields["rope_scaling"] = scaling_from_dict(fields["rope_scaling"])
            fields.update(self._overrides())
            if fields.get("vocab_size") is None:
                if vocab_size is None:
                    raise UserError("model: vocab_size is not given and there is no tokenizer to take it from")
                fields["vocab_size"] = vocab_size
            spec = ModelSpec(**fields)
        for module in self.recompute_modules or ():
            if module in OF_EXPERTS and not spec.num_experts:
                raise UserError(
                    f"model: recompute_modules: {module} needs a mixture of experts, and the model is dense"
                )
            if module == "mlp" and spec.num_experts:
                raise UserError("model: recompute_modules: mlp is of a dense model; a mixture of experts has moe")
        if vocab_size is not None and vocab_size > spec.vocab_size:
            raise UserError(
                f"model: the tokenizer has {vocab_size} tokens, the model only {spec.vocab_size}; "
                "use the model's own tokenizer"
            )
        return spec


def _check_recompute(model: ModelConfig) -> None:
    if model.recompute_modules is not None and model.recompute != "selective":
        raise ValueError(f"recompute_modules needs recompute: selective (it is {model.recompute})")
    if model.recompute_modules is not None and not model.recompute_modules:
        raise ValueError("recompute_modules is empty: set recompute to none")
    for name in ("recompute_method", "recompute_num_layers"):
        if getattr(model, name) is not None and model.recompute != "full":
            raise ValueError(f"{name} needs recompute: full (it is {model.recompute})")


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
