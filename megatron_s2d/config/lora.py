"""LoRA: which matrices of a model get an adapter, and the checks of rank, targets and layout. No torch here.

A target is a projection under its name in Hugging Face checkpoints. ``models/families.py`` says which Megatron
parameter it is a part of.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.precision import Fp8Config
from megatron_s2d.errors import UserError

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Group = Literal["all-linear", "experts"]

CONFIG_NAME = "adapter_config.json"  # of a PEFT directory
WEIGHTS_NAME = "adapter_model.safetensors"
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
_MLP = PROJECTIONS[4:]


class LoraConfig(Config):
    """Train low-rank adapters W + alpha / rank * B A; the weights W stay as they are at the start of the stage."""

    rank: int = Field(ge=1, le=4096, description="rows of A and columns of B")
    alpha: float = Field(32.0, gt=0, description="the product B A is multiplied by alpha / rank")
    targets: list[Projection | Group] = Field(
        ["all-linear"],
        min_length=1,
        description="matrices with an adapter: " + ", ".join(PROJECTIONS) + ", experts (the last three in every expert "
        "of a mixture of experts, each with its own adapter) or all-linear (all of them)",
    )

    adapter: Path | None = Field(
        None,
        description="PEFT directory (adapter_config.json, adapter_model.safetensors) of this rank, alpha and targets "
        "whose A and B are the start; by default A is random and B zero",
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _refuse_dropout(cls, document: Any) -> Any:
        if isinstance(document, dict) and "dropout" in document:
            raise ValueError(
                "dropout is not implemented (engine and trainer would compute different models): remove it"
            )
        return document

    @property
    def scale(self) -> float:
        """Factor of the product B A."""
        return self.alpha / self.rank

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The targets by projection, in the order of ``PROJECTIONS``."""
        named: set[str] = set(self.targets)
        named |= set(PROJECTIONS if "all-linear" in named else _MLP if "experts" in named else ())
        return tuple(name for name in PROJECTIONS if name in named)


def check_lora(where: str, lora: LoraConfig, spec: ModelSpec, parallel: ParallelConfig, fp8: Fp8Config | None) -> None:
    """Raise ``UserError`` for an adapter that the model or the layout cannot have. where: the key of ``lora``."""
    if "experts" in lora.targets and not spec.num_experts:
        raise UserError(
            f"{where}.targets: the model is dense, it has no experts: name gate_proj, up_proj and down_proj"
        )
    if spec.parts.fused_experts and set(lora.projections) & set(_MLP):
        raise UserError(
            f"{where}.targets: files of family {spec.family} have all experts of a layer in one tensor, for which "
            "adapters are not implemented: name q_proj, k_proj, v_proj and o_proj"
        )
    for name in lora.projections:
        least = min(projection_shape(spec, name))
        if lora.rank > least:
            raise UserError(
                f"{where}.rank: {lora.rank} is more than {least}, the smaller side of {name}: lower it, or leave "
                f"{name} out of targets"
            )
    tensor = parallel.tensor_model_parallel_size
    if spec.num_query_groups % tensor and set(lora.projections) & {"q_proj", "k_proj", "v_proj"}:
        raise UserError(
            f"{where}.targets: with {spec.num_query_groups} key heads (num_query_groups) at "
            f"tensor_model_parallel_size {tensor} tensor ranks share a head, for which adapters of q_proj, k_proj and "
            f"v_proj are not implemented: lower tensor_model_parallel_size, or leave them out"
        )
    if fp8 is not None:
        raise UserError(f"{where}: adapters beside layers in FP8 are not implemented: remove fp8, or lora")


def projection_shape(spec: ModelSpec, name: Projection) -> tuple[int, int]:
    """Return (rows, columns) of a projection's weight; of one expert's in a mixture of experts."""
    hidden = spec.hidden_size
    ffn = spec.moe_ffn_hidden_size if spec.num_experts else spec.ffn_hidden_size
    return {
        "q_proj": (spec.q_dim, hidden),
        "k_proj": (spec.kv_dim, hidden),
        "v_proj": (spec.kv_dim, hidden),
        "o_proj": (hidden, spec.q_dim),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }[name]


def server_arguments(loras: Sequence[LoraConfig]) -> list[str]:
    """Return the arguments of an SGLang server that loads adapters of each of ``loras``.

    Its batches have two slots: the newest adapter, and none (health checks).
    """
    targets = [name for name in PROJECTIONS if any(name in lora.projections for lora in loras)]
    rank = max(lora.rank for lora in loras)
    return [
        "--enable-lora", "--max-loras-per-batch", "2", "--max-lora-rank", str(rank), "--lora-target-modules", *targets
    ]  # fmt: skip


def num_adapter_values(spec: ModelSpec, lora: LoraConfig) -> int:
    """Return the number of trained values of all adapters."""
    of_layer = 0
    for name in lora.projections:
        copies = spec.num_experts if spec.num_experts and name in _MLP else 1
        of_layer += copies * lora.rank * sum(projection_shape(spec, name))
    return spec.num_layers * of_layer
