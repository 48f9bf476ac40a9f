"""The LoRA adapter of a trained model: switched off, merged into the weights, or written as a PEFT directory."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_s2d.config.lora import LoraConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.models.lora import AdapterSource, SeededAdapter, adapters_off, add_adapters, gather_adapters
from megatron_s2d.models.peft_files import PeftAdapter, check_adapter, write_adapter
from megatron_s2d.parallel.collectives import broadcast_from_rank0
from megatron_s2d.parallel.layout import Layout


@dataclasses.dataclass(frozen=True, eq=False)
class ModelAdapter:
    """The adapter beside the frozen weights of ``chunks``; all methods but ``off`` are collective."""

    chunks: Sequence[torch.nn.Module]
    spec: ModelSpec
    layout: Layout
    lora: LoraConfig

    @classmethod
    def add(
        cls, chunks: Sequence[torch.nn.Module], spec: ModelSpec, layout: Layout, lora: LoraConfig, seed: int
    ) -> ModelAdapter:
        """Freeze the weights and add the adapter, from ``lora.adapter`` or drawn from ``seed``."""
        source: AdapterSource = SeededAdapter(seed)
        if lora.adapter is not None:
            check_adapter("lora", lora, spec)
            source = PeftAdapter(lora.adapter, spec)
        add_adapters(chunks, spec, layout, lora, source)
        return cls(chunks, spec, layout, lora)

    def off(self) -> contextlib.AbstractContextManager[None]:
        """Let the model compute without the adapter inside the block."""
        return adapters_off(self.chunks)

    def merge(self) -> None:
        """Add the adapter to the weights, as ``export_buckets`` does, and set it to zero."""
        for chunk in self.chunks:
            chunk.adapter.merge()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return A and B of every target by name, on every rank."""
        return gather_adapters(self.chunks, self.spec, self.layout, self.lora)

    def write(self, directory: Path, base: str) -> None:
        """Write a PEFT directory in place of one that is there. base: see ``peft_files.config_document``."""
        tensors = self.tensors()

        def write() -> None:
            shutil.rmtree(directory, ignore_errors=True)
            write_adapter(directory, self.lora, tensors, base)

        broadcast_from_rank0(write)
        dist.barrier()
