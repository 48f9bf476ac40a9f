"""Independent check of a conversion: transformers' model and the converted Megatron model compute equal logits.

The two share no code but PyTorch: transformers reads the Hugging Face directory with its own loader, Megatron-Core the
distributed checkpoint with its own. Both models are in memory at once, in float32, so this is for models that fit.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import transformers

from megatron_s2d.config.hf_config import spec_from_directory
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.errors import UserError
from megatron_s2d.models.build import build_model
from megatron_s2d.parallel.checkpoint import load_checkpoint
from megatron_s2d.parallel.layout import build_layout, initialize_distributed


@dataclasses.dataclass(frozen=True)
class LogitsComparison:
    """Largest absolute difference of the logits, and their standard deviation as its scale."""

    max_difference: float
    standard_deviation: float
    num_positions: int


def compare_logits(
    hf_directory: str | Path,
    megatron_directory: str | Path,
    *,
    num_sequences: int = 2,
    length: int = 64,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> LogitsComparison:
    """Compare logits of random token sequences from both models, in float32 on the CPU or this process's GPU.

    Raises ``UserError`` if they differ by more than ``tolerance`` standard deviations of the logits (at least 1).
    """
    spec = spec_from_directory(hf_directory)
    tokens = torch.randint(0, spec.vocab_size, (num_sequences, length), generator=torch.Generator().manual_seed(seed))
    initialize_distributed()
    layout = build_layout(ParallelConfig())
    chunks = build_model(spec, layout, params_dtype=torch.float32)
    load_checkpoint(Path(megatron_directory), chunks, layout, model_spec=spec.to_dict())
    device = next(chunks[0].parameters()).device
    tokens = tokens.to(device)
    with layout.active(), torch.no_grad():
        positions = torch.arange(length, device=device).expand_as(tokens)
        logits = chunks[0].eval()(tokens, positions, None)[..., : spec.vocab_size]
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        hf_directory, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    with torch.no_grad():
        expected = reference.to(device).eval()(tokens).logits
    result = LogitsComparison(float((logits - expected).abs().max()), float(expected.std()), num_sequences * length)
    if not result.max_difference <= tolerance * max(1.0, result.standard_deviation):
        raise UserError(
            f"logits differ by up to {result.max_difference:.2e} (their standard deviation is "
            f"{result.standard_deviation:.2e}) between {hf_directory} and {megatron_directory}"
        )
    return result
