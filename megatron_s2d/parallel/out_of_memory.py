"""Says what a GPU ran out of memory for (phase, layer, tensor, line), from the traceback of PyTorch's error."""

from __future__ import annotations

import dataclasses
import re
import traceback
import types
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parents[2]  # of the package; a checkout with an environment in it may have its name
MODEL_CODE = ("megatron_s2d/", "megatron/core/", "transformer_engine/")
"""Packages whose lines a user or developer can change."""

_SHOWN = (*MODEL_CODE, "torch/optim/")
_HIDDEN = "megatron_s2d/measure/"

# Functions in whose calls a phase of `s2d plan` runs; the outermost one counts.
_PHASES = {
    "prepare_training": "build",
    "_build": "build",
    "forward_backward": "train",
    "optim_step": "update",
    "score": "score",
    "hidden_states": "teacher",
    "export_buckets": "export",
    "generate": "decode",
    "load": "load",
    "start_saving": "save",
}

# (end of a file's path, function or "") -> what it allocates; the innermost frame that has an entry counts.
_TENSORS = {
    ("megatron_s2d/kl/fused.py", "chunks"): "logits of a chunk",
    ("megatron_s2d/kl/fused.py", "buffer_for"): "gradients by logits",
    ("megatron_s2d/kl/fused.py", "finish"): "the hidden states' gradient",
    ("megatron_s2d/kl/fused.py", ""): "the loss's operands and the output layer's gradient",
    ("megatron_s2d/kl/shards.py", ""): "the teacher's output layer",
    ("megatron_s2d/kl/teachers.py", ""): "the teacher's hidden states or logits",
    ("megatron_s2d/models/kv_cache.py", "_adjust_key_value_for_inference"): "keys and values",
    ("megatron_s2d/models/kv_cache.py", "_moved"): "keys and values",
    ("megatron_s2d/models/fixed_kv_cache.py", ""): "keys and values",
    ("megatron_s2d/rollout/megatron/sampling.py", ""): "probabilities of sampled tokens",
    ("megatron_s2d/models/weights.py", ""): "full tensors of exported weights",
    ("megatron_s2d/data/packing.py", ""): "micro-batches",
    ("megatron/core/distributed/param_and_grad_buffer.py", ""): "weights and gradients",
    ("megatron/core/optimizer/distrib_optimizer.py", ""): "float32 masters of the weights",
    ("torch/optim/adam.py", ""): "Adam's state",
    ("torch/optim/adamw.py", ""): "Adam's state",
    ("megatron_s2d/parallel/trainable_model.py", "reload"): "optimizer state that comes back from host memory",
    ("megatron/core/models/gpt/gpt_model.py", "__init__"): "weights",
    ("megatron/core/transformer/moe/experts.py", ""): "activations of experts",
    ("megatron/core/transformer/moe/token_dispatcher.py", ""): "tokens sorted by expert",
    ("megatron/core/transformer/transformer_layer.py", ""): "activations",
}


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """Where the device's memory did not suffice."""

    phase: str  # as in `s2d plan`; "" if no known phase was running
    tensor: str  # what was to be allocated, with the layer
    line: str  # of the project, Megatron-Core or the optimizer
    message: str  # PyTorch's first sentences, with the size that was asked for

    @property
    def sentence(self) -> str:
        """Return one line without an end."""
        phase = f" in {self.phase}" if self.phase else ""
        return f"out of GPU memory{phase}, for {self.tensor}, at {self.line}: {self.message}"


def describe(error: torch.OutOfMemoryError) -> OutOfMemory:
    """Return what ``error`` says of itself and of the calls that it passed."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    phase = next((_PHASES[name] for frame in frames if (name := _function_of_project(frame)) in _PHASES), "")
    layer = next((number for frame in reversed(frames) if (number := _layer_number(frame)) is not None), None)
    in_backward = any(frame.f_code.co_name == "backward" for frame in frames)
    unknown = "gradients in the backward pass" if in_backward else "a tensor"
    tensor = next((found for frame in reversed(frames) if (found := _tensor(frame)) is not None), unknown)
    where = f" of layer {layer}" if layer is not None and "activations" in tensor else ""
    message = str(error).partition(" If ")[0].partition(" Of the allocated")[0].strip()
    return OutOfMemory(phase, tensor + where, line_of(frames[-1] if frames else None), message)


def line_of(frame: types.FrameType | None, shown: tuple[str, ...] = _SHOWN) -> str:
    """Return ``file:line function`` of the innermost frame of a package in ``shown``, from ``frame`` outwards."""
    while frame is not None:
        name = _path(frame)
        if name.startswith(shown):
            return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "PyTorch"


def _path(frame: types.FrameType) -> str:
    """Return the path of the frame's file from its package on; empty for packages that are not shown."""
    name = frame.f_code.co_filename
    own = name.startswith(f"{_ROOT}/megatron_s2d/")
    path = name.removeprefix(f"{_ROOT}/") if own else name.rpartition("/site-packages/")[2]
    return path if path.startswith(_SHOWN) and not path.startswith(_HIDDEN) else ""


def _function_of_project(frame: types.FrameType) -> str:
    return frame.f_code.co_name if _path(frame).startswith("megatron_s2d/") else ""


def _tensor(frame: types.FrameType) -> str | None:
    path = _path(frame)
    return _TENSORS.get((path, frame.f_code.co_name)) or _TENSORS.get((path, ""))


def _layer_number(frame: types.FrameType) -> int | None:
    if not re.search(r"transformer_layer\.py$", frame.f_code.co_filename):
        return None
    number = getattr(frame.f_locals.get("self"), "layer_number", None)
    return number if isinstance(number, int) else None
