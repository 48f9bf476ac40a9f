"""Shared by the CPU benchmarks: one set of weights as a Megatron and a transformers model, and interleaved timing."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch
import transformers

from megatron_s2d.config.hf_config import hf_config_from_spec
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.models.build import build_model
from megatron_s2d.models.hf_checkpoint import HfCheckpoint
from megatron_s2d.models.weights import export_buckets, import_weights
from megatron_s2d.parallel.layout import Layout, build_layout, initialize_distributed


def start() -> Layout:
    """Initialize one process with one thread."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    initialize_distributed()
    return build_layout(ParallelConfig())


def same_model_twice(
    preset: str, vocab_size: int, layout: Layout
) -> tuple[ModelSpec, list[torch.nn.Module], transformers.PreTrainedModel]:
    """Build the Megatron model (one chunk) and the transformers model of a preset, with the same weights."""
    spec = ModelConfig(preset=preset).resolve(vocab_size)
    chunks = build_model(spec, layout, seed=1)
    config = transformers.AutoConfig.for_model(**hf_config_from_spec(spec, "float32"))
    reference = transformers.AutoModelForCausalLM.from_config(config)
    weights = dict(chain.from_iterable(export_buckets(chunks, spec, layout)))
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    tied = ["lm_head.weight"] if spec.tie_word_embeddings else []
    assert list(missing) == tied and not unexpected, (missing, unexpected)
    reference.tie_weights()
    return spec, chunks, reference


def published_model_twice(
    directory: Path, layout: Layout
) -> tuple[ModelSpec, list[torch.nn.Module], transformers.PreTrainedModel]:
    """Load the weights of a Hugging Face directory in float32 into both."""
    spec = ModelConfig(path=directory).resolve()
    chunks = build_model(spec, layout)
    import_weights(chunks, spec, layout, HfCheckpoint(directory))
    return spec, chunks, transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def interleaved_minima(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the minimum process CPU seconds of each case over ``repeats`` interleaved rounds, after one warm-up round.

    CPU time and minima, because a shared machine can only add to a measurement.
    """
    best = dict.fromkeys(cases, float("inf"))
    for round_number in range(repeats + 1):
        for name, run in cases.items():
            begin = time.process_time()
            run()
            if round_number:
                best[name] = min(best[name], time.process_time() - begin)
    return best
