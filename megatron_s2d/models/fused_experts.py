"""Experts of GPT-OSS: files have those of a layer in one tensor; the rest of the package names each projection of each.

``gate_up_proj`` [e, h, 2 f] has the channels of gate and up in turn, ``down_proj`` is [e, f, h], and their biases are
[e, 2 f] and [e, h]. Published files have the two matrices in MXFP4, transposed: ``_blocks`` [e, out, in / 32, 16]
uint8, the lower half of a byte before the upper one, and ``_scales`` [e, out, in / 32] uint8, exponents of two plus
127. They are dequantised when they are read, as transformers does.

Shapes: e experts, h hidden size, f width of an expert.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from pathlib import Path

import torch

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.errors import UserError
from megatron_s2d.models.tensor_files import TensorInfo, read_rows

_BLOCK = 32  # values with one scale
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_PARTS = {"gate_proj": ("gate_up_proj", slice(0, None, 2)), "up_proj": ("gate_up_proj", slice(1, None, 2)),
          "down_proj": ("down_proj", slice(None))}  # fmt: skip
_NAME = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|bias)")


def split_experts(
    tensors: dict[str, TensorInfo], spec: ModelSpec, dtype: torch.dtype, directory: Path
) -> dict[str, TensorInfo]:
    """Return ``tensors`` with those of single experts in place of the fused ones. dtype: of dequantised values.

    Raises ``UserError`` for one that is missing or has another shape.
    """
    result = dict(tensors)
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        for module, (fused, rows) in _PARTS.items():
            out, in_ = _shape(spec, module)
            fused_out = _shape(spec, "down_proj")[0] if module == "down_proj" else 2 * out
            bias = _take(result, tensors, f"{prefix}{fused}_bias", (spec.num_experts, fused_out), directory)
            read = functools.partial(_read_bias, bias, rows)
            _add(result, f"{prefix}%d.{module}.bias", spec.num_experts, bias, (out,), bias.dtype, read)
            blocks_name = f"{prefix}{fused}_blocks"
            if blocks_name in tensors:
                shape = (spec.num_experts, fused_out, in_ // _BLOCK)
                stored = _take(result, tensors, blocks_name, (*shape, _BLOCK // 2), directory)
                scales = _take(result, tensors, f"{prefix}{fused}_scales", shape, directory)
                if {stored.dtype, scales.dtype} != {torch.uint8}:
                    raise UserError(f"{directory}: {blocks_name} and its scales are not U8")
                read, values = functools.partial(_read_mxfp4, stored, scales, dtype, rows), dtype
            else:
                stored = _take(result, tensors, prefix + fused, (spec.num_experts, in_, fused_out), directory)
                read, values = functools.partial(_read_transposed, stored, rows), stored.dtype
            _add(result, f"{prefix}%d.{module}.weight", spec.num_experts, stored, (out, in_), values, read)
    return result


def _shape(spec: ModelSpec, module: str) -> tuple[int, int]:
    """Return (out, in) of an expert's projection."""
    pair = (spec.moe_ffn_hidden_size, spec.hidden_size)
    return pair if module != "down_proj" else pair[::-1]


def _take(
    result: dict[str, TensorInfo], tensors: dict[str, TensorInfo], name: str, shape: tuple[int, ...], directory: Path
) -> TensorInfo:
    """Return the fused tensor ``name`` and remove it from ``result``."""
    result.pop(name, None)
    if name not in tensors:
        raise UserError(f"{directory}: tensor {name} is missing")
    if tensors[name].shape != shape:
        raise UserError(f"{directory}: {name} is {tensors[name].shape}, the model needs {shape}")
    return tensors[name]


def _add(
    result: dict[str, TensorInfo], pattern: str, count: int, stored: TensorInfo, shape: tuple[int, ...],
    dtype: torch.dtype, read: functools.partial[torch.Tensor],
) -> None:  # fmt: skip
    num_bytes = math.prod(shape) * dtype.itemsize
    for expert in range(count):
        result[pattern % expert] = dataclasses.replace(
            stored, dtype=dtype, shape=shape, stop=stored.start + num_bytes, compute=functools.partial(read, expert)
        )


def _read_bias(stored: TensorInfo, rows: slice, expert: int) -> torch.Tensor:
    return read_rows(stored, expert, expert + 1)[0, rows].contiguous()


def _read_transposed(stored: TensorInfo, rows: slice, expert: int) -> torch.Tensor:
    return read_rows(stored, expert, expert + 1)[0].T[rows].contiguous()


def _read_mxfp4(blocks: TensorInfo, scales: TensorInfo, dtype: torch.dtype, rows: slice, expert: int) -> torch.Tensor:
    of_expert = (read_rows(info, expert, expert + 1)[0, rows] for info in (blocks, scales))
    return dequantize_mxfp4(*of_expert, dtype)


def dequantize_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return [out, in] of ``blocks`` [out, in / 32, 16] and ``scales`` [out, in / 32], both uint8."""
    values = torch.tensor([*_FP4, *(-value for value in _FP4)], dtype=dtype)
    halves = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)  # [out, in / 32, 32]
    exponents = scales.to(torch.int32).unsqueeze(-1) - 127
    return torch.ldexp(values[halves.int()], exponents).to(dtype).flatten(-2)


class ExpertJoiner:
    """Puts the tensors of single experts together again, for files and servers; other families pass unchanged."""

    def __init__(self, spec: ModelSpec):
        self._spec = spec
        self._waiting: dict[str, tuple[torch.Tensor, set[tuple[str, int]]]] = {}  # fused tensor, and what it has

    def add(self, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """Return the tensors for files that are complete with this one: itself, a fused one, or none yet."""
        match = _NAME.fullmatch(name) if self._spec.parts.fused_experts else None
        if match is None:
            return [(name, tensor)]
        prefix, expert, module, kind = match[1], int(match[2]), match[3], match[4]
        fused, rows = _PARTS[module]
        key = prefix + fused + ("_bias" if kind == "bias" else "")
        modules = [other for other, (of_other, _) in _PARTS.items() if of_other == fused]
        if key not in self._waiting:
            size = tensor.size(0) * len(modules)
            shape = (self._spec.num_experts, size) if kind == "bias" else (self._spec.num_experts, tensor.size(1), size)
            self._waiting[key] = (tensor.new_empty(shape), set())
        joined, present = self._waiting[key]
        joined[expert][..., rows] = tensor if kind == "bias" else tensor.T
        present.add((module, expert))
        if len(present) < len(modules) * self._spec.num_experts:
            return []
        del self._waiting[key]
        return [(key, joined)]
