"""FP8 settings, and the hardware and shapes that each FP8 recipe needs. No torch here.

Only the linear layers of the transformer run in FP8 (Transformer Engine quantises their operands); attention, norms,
embedding and output layer, and with it every probability, stay in bfloat16, gradients and masters in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from megatron_s2d.config.base import Config
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.errors import UserError

RecipeName = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]


class Fp8Config(Config):
    """FP8 matrix products in the transformer's layers (docs/gpu.md); needs Transformer Engine and ``bfloat16``."""

    recipe: RecipeName = Field(
        "tensorwise",
        description="how operands are scaled: delayed (by earlier maxima), tensorwise (by the tensor's own maximum), "
        "blockwise (128 x 128 and 1 x 128 blocks), mxfp8 (blocks of 32; Blackwell)",
    )
    parameters: bool = Field(
        False, description="keep the layers' weights in FP8 beside their float32 masters, instead of in bfloat16"
    )
    frozen: bool = Field(
        False, description="teachers and references run their layers in FP8 too; by default in bfloat16"
    )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Requirements of a recipe in Transformer Engine 2.20."""

    least_capability: tuple[int, int]  # CUDA compute capability
    below_capability: tuple[int, int] | None  # the first that does not support it any more
    least_cuda: tuple[int, int]
    tokens: int  # the tokens of a micro-batch on a rank must be a multiple of it
    widths: int  # every width of a rank's matrices must be a multiple of it
    format: Literal["hybrid", "e4m3"]  # hybrid: gradients have a longer exponent (e5m2)


RECIPES: dict[str, Recipe] = {
    "delayed": Recipe((8, 9), None, (12, 1), 16, 16, "hybrid"),
    "tensorwise": Recipe((8, 9), None, (12, 1), 16, 16, "hybrid"),
    "blockwise": Recipe((9, 0), None, (12, 9), 128, 128, "e4m3"),
    "mxfp8": Recipe((10, 0), (12, 0), (12, 8), 32, 32, "e4m3"),
}


def check_chip(fp8: Fp8Config, capability: tuple[int, int], chip: str) -> None:
    """Raise ``UserError`` if a chip of this compute capability does not support the recipe."""
    recipe = RECIPES[fp8.recipe]
    if _has(recipe, capability):
        return
    usable = [name for name, other in RECIPES.items() if _has(other, capability)]
    limit = f" and below {_dotted(recipe.below_capability)}" if recipe.below_capability else ""
    advice = f"choose {' or '.join(usable)}" if usable else "leave fp8 out"
    raise UserError(
        f"fp8.recipe: {fp8.recipe} needs compute capability {_dotted(recipe.least_capability)} or higher{limit}, and "
        f"{chip} has {_dotted(capability)}: {advice}"
    )


def check_overlap(fp8: Fp8Config | None, is_packed: Mapping[str, bool]) -> None:
    """Raise ``ValueError`` unless ``parallel.tp_comm_overlap`` suits the recipe and ``is_packed`` (by stage)."""
    if fp8 is not None and fp8.recipe == "blockwise":
        raise ValueError(
            "Transformer Engine cannot exchange operands of fp8.recipe blockwise during products: choose another "
            "recipe, or leave parallel.tp_comm_overlap out"
        )
    for name, packed in is_packed.items():
        if not packed:  # padded micro-batches have different shapes, and the buffers have one
            raise ValueError(
                f"stages.{name}: parallel.tp_comm_overlap needs packed sequences: set "
                "micro_batch.sequence_packing to true"
            )


def check_shapes(fp8: Fp8Config, spec: ModelSpec, parallel: ParallelConfig) -> None:
    """Raise ``UserError`` if a matrix of a rank has a width that is not a multiple of the recipe's block."""
    tensor, multiple = parallel.tensor_model_parallel_size, RECIPES[fp8.recipe].widths
    widths = {
        "hidden_size": spec.hidden_size,
        "query channels": spec.q_dim // tensor,
        "query, key and value channels": (spec.q_dim + 2 * spec.kv_dim) // tensor,
    }
    if spec.num_experts:
        widths["moe_ffn_hidden_size"] = spec.moe_ffn_hidden_size
    else:
        widths["ffn_hidden_size"] = spec.ffn_hidden_size // tensor
    for name, width in widths.items():
        if width % multiple:
            raise UserError(
                f"fp8.recipe: {fp8.recipe} needs widths that are multiples of {multiple}, and {name} is {width} on a "
                f"rank at tensor_model_parallel_size {tensor}: use fewer tensor ranks, or leave fp8 out"
            )


def _has(recipe: Recipe, capability: tuple[int, int]) -> bool:
    return capability >= recipe.least_capability and (
        recipe.below_capability is None or capability < recipe.below_capability
    )


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
