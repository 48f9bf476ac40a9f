"""A teacher cache without files: samples of the longest length and distributions without values.

Shapes: r response tokens of a sample, k top-k entries, v vocabulary, h hidden size.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from megatron_s2d.config.forward_kl import TeacherCacheConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.data.cache import CachedDistribution, CacheHeader
from megatron_s2d.data.stored_samples import ListedSamples
from megatron_s2d.estimate.stage_memory import StageShape
from megatron_s2d.records import Sample

_DTYPES = {"ids": torch.int32}
_SAFETENSORS = {torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclasses.dataclass(frozen=True, eq=False)
class MadeUpCache:
    """Answers like ``data.cache.TeacherCache``."""

    header: CacheHeader
    samples: tuple[Sample, ...]
    directory: Path
    dtype: torch.dtype  # of hidden states

    @classmethod
    def of(
        cls, stage: TeacherCacheConfig, teacher: ModelSpec, shape: StageShape, domain: str, dtype: torch.dtype
    ) -> MadeUpCache:
        """Return the cache that a stage would leave. shape: of the stage that reads it."""
        header = CacheHeader(
            representation=stage.representation,
            teacher_digest="",
            tokenizer_fingerprint="",
            template_fingerprint="",
            temperature=1.0 if stage.representation == "hidden_states" else stage.sampling.temperature or 1.0,
            vocab_size=teacher.vocab_size,
            k=min(stage.top_k, teacher.vocab_size) if stage.representation == "top_k" else None,
            hidden_size=teacher.hidden_size if stage.representation == "hidden_states" else None,
        )
        random = np.random.default_rng(0)
        samples = tuple(_sample(index, shape, domain, teacher.vocab_size, random) for index in range(shape.responses))
        return cls(header, samples, Path("a cache that was made up"), dtype)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def longest_response(self) -> int:
        """See ``TeacherCache``."""
        return max(sample.response_length for sample in self.samples)

    def stored(self, *, temperature: float) -> ListedSamples:
        """See ``TeacherCache``."""
        return ListedSamples(lambda index: dataclasses.replace(self.samples[index], temperature=temperature))

    def distribution(self, sample: Sample) -> CachedDistribution:
        """Return tensors of the right shapes; ids are distinct in a row."""
        tensors = {}
        for name, size in self.header.shapes(sample.response_length).items():
            dtype = self.dtype if name == "hidden" else _DTYPES.get(name, torch.float32)
            tensors[name] = torch.zeros(size, dtype=dtype)
        if "ids" in tensors:
            tensors["ids"] += torch.arange(self.header.k, dtype=torch.int32)
        return CachedDistribution(**tensors)


def _sample(index: int, shape: StageShape, domain: str, vocab_size: int, random: np.random.Generator) -> Sample:
    name = f"cached-{index}"
    return Sample(
        id=name,
        prompt_id=name,
        group_id=name,
        domain=domain,
        seed=0,
        token_ids=random.integers(0, vocab_size, shape.length),
        response_mask=np.arange(shape.length) >= shape.prompt_length,
        temperature=1.0,
        finish_reason="length",
    )


def write_output_layer(path: Path, spec: ModelSpec, dtype: torch.dtype) -> None:
    """Write an output layer [v, h] of zeros as a sparse safetensors file, which takes no space."""
    size = spec.vocab_size * spec.hidden_size * dtype.itemsize
    tensor = {"dtype": _SAFETENSORS[dtype], "shape": [spec.vocab_size, spec.hidden_size], "data_offsets": [0, size]}
    header = json.dumps({"weight": tensor}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
