"""An adapter with random values, and transformers' model with it in its weights: W + alpha / rank B A in float64."""

import torch

from megatron_s2d.models.peft_files import adapter_shapes


def random_adapter(spec, lora) -> dict:
    generator = torch.Generator().manual_seed(11)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in adapter_shapes(spec, lora).items()}


def merged_in_float64(reference, tensors, lora):
    """transformers' model in float64 with the adapter of ``tensors`` in its weights."""
    reference.config._experts_implementation = "eager"  # the grouped products have no float64
    weights = reference.double().state_dict()
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        delta = lora.alpha / lora.rank * tensors[name.replace("lora_A", "lora_B")].double() @ a.double()
        key = name.replace("lora_A.", "")
        if key in weights:
            weights[key] += delta
            continue
        before, _, after = key.partition(".experts.")  # transformers fuses experts: [e, 2 ffn, h] and [e, h, ffn]
        expert, module, _ = after.split(".")
        if module == "down_proj":
            weights[f"{before}.experts.down_proj"][int(expert)] += delta
            continue
        rows = weights[f"{before}.experts.gate_up_proj"][int(expert)].chunk(2)
        rows[module == "up_proj"].add_(delta)
    reference.load_state_dict(weights)
    return reference
