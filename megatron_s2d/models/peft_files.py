"""LoRA adapters on disk in the format of PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``.

A tensor is ``base_model.model.`` and its name in the model's checkpoint with ``lora_A`` or ``lora_B`` before
``weight``; every expert has its own, as in checkpoints of mixtures of experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_s2d.artifacts.files import atomic_directory, read_json_object
from megatron_s2d.config.lora import CONFIG_NAME, PROJECTIONS, WEIGHTS_NAME, LoraConfig, projection_shape
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.errors import UserError
from megatron_s2d.models.families import layer_param_mappings
from megatron_s2d.models.hf_checkpoint import read_header
from megatron_s2d.models.tensor_files import TensorInfo, read_bytes

_PREFIX = "base_model.model."
_PLAIN = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_rslora": (False,),
    "use_dora": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": ([],),
    "layers_to_transform": ([],),
    "target_parameters": ([],),
    "lora_bias": (False,),
}
"""Fields of ``adapter_config.json`` and their values without the effect of another method; null is among them."""


def adapter_shapes(spec: ModelSpec, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    """Return name -> shape of every tensor of an adapter, [rank, in] and [out, rank]."""
    shapes = {}
    for layer in range(spec.num_layers):
        for mapping in layer_param_mappings(spec, layer):
            for name in mapping.hf_names:
                *_, module, kind = name.split(".")
                for target in lora.projections:
                    if (module, kind) == (target, "weight"):
                        (out, in_), stem = projection_shape(spec, target), name.removesuffix(".weight")
                        shapes[f"{stem}.lora_A.weight"] = (lora.rank, in_)
                        shapes[f"{stem}.lora_B.weight"] = (out, lora.rank)
    return shapes


def read_config(directory: Path) -> LoraConfig:
    """Return rank, alpha and targets of a PEFT directory; ``UserError`` for another method than plain LoRA."""
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{directory}: not a PEFT directory (no {CONFIG_NAME})")
    document = read_json_object(path)
    if document.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {document.get('peft_type')!r}, and only LORA is supported")
    for name, plain in _PLAIN.items():
        if document.get(name) is not None and document[name] not in plain:
            raise UserError(f"{path}: {name} {json.dumps(document[name])} is not supported: only plain LoRA is")
    named = document.get("target_modules")
    targets = ["all-linear"] if named == "all-linear" else named
    if not isinstance(targets, list) or not set(targets) <= {"all-linear", *PROJECTIONS}:
        raise UserError(f"{path}: target_modules {json.dumps(named)} are not among {', '.join(PROJECTIONS)}")
    try:
        return LoraConfig(rank=document["r"], alpha=document["lora_alpha"], targets=sorted(targets))
    except (KeyError, ValueError):
        raise UserError(f"{path}: r or lora_alpha is missing or not a number above 0") from None


class PeftAdapter:
    """The tensors of a PEFT directory; an ``AdapterSource`` that reads them when they are asked for."""

    def __init__(self, directory: Path, spec: ModelSpec):
        """Read and check the headers; ``UserError`` if the tensors are not those of the model and the targets."""
        self.directory, self.config = directory, read_config(directory)
        path = directory / WEIGHTS_NAME
        if not path.is_file():
            raise UserError(f"{directory}: no {WEIGHTS_NAME} (pickled adapters are not read: save it as safetensors)")
        self._tensors: dict[str, TensorInfo] = {
            name.removeprefix(_PREFIX): info for name, info in read_header(path).items()
        }
        expected = adapter_shapes(spec, self.config)
        for name, shape in expected.items():
            if name not in self._tensors:
                raise UserError(f"{path}: tensor {_PREFIX}{name} is missing")
            if self._tensors[name].shape != shape:
                raise UserError(f"{path}: {name} is {self._tensors[name].shape}, the model needs {shape}")
        for name in self._tensors:
            if name not in expected:
                raise UserError(f"{path}: tensor {name} does not belong to an adapter of this model and these targets")

    def read(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        """See ``lora.AdapterSource.read``; in the file's dtype."""
        info = self._tensors[name]
        return read_bytes(info.path, info.start, info.num_bytes).view(info.dtype).view(shape)

    def delta(self, weight: str) -> torch.Tensor | None:
        """Return alpha / rank B A in float32 for a weight by its name in a checkpoint; None without an adapter."""
        stem = weight.removesuffix(".weight")
        names = [f"{stem}.lora_{kind}.weight" for kind in "BA"]
        if names[0] not in self._tensors:
            return None
        left, right = (self.read(name, self._tensors[name].shape).float() for name in names)
        return self.config.scale * (left @ right)


def check_adapter(where: str, lora: LoraConfig, spec: ModelSpec) -> None:
    """Raise ``UserError`` if ``lora.adapter`` is not an adapter of the model with the settings of ``lora``."""
    if lora.adapter is None:
        return
    stored = PeftAdapter(lora.adapter, spec).config
    for name, value, other in (
        ("rank", lora.rank, stored.rank),
        ("alpha", lora.alpha, stored.alpha),
        ("targets", lora.projections, stored.projections),
    ):
        if value != other:
            there = ", ".join(other) if isinstance(other, tuple) else f"{other:g}"
            raise UserError(
                f"{where}.{name} is not that of {lora.adapter}, which is {there}: write that, or remove adapter"
            )


def config_document(lora: LoraConfig, base: str) -> dict[str, Any]:
    """Return ``adapter_config.json``. base: what PEFT loads the adapter onto."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.projections),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


def write_adapter(directory: Path, lora: LoraConfig, tensors: Mapping[str, torch.Tensor], base: str) -> None:
    """Write a PEFT directory, which appears complete or not at all. tensors: by their names without a prefix."""
    with atomic_directory(directory) as target:
        content = {_PREFIX + name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(content, str(target / WEIGHTS_NAME), metadata={"format": "pt"})
        text = json.dumps(config_document(lora, base), indent=2, sort_keys=True)
        (target / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
