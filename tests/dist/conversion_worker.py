"""Loads checkpoints at several layouts on four ranks and saves one; started by test_conversion_layouts.py.

Arguments: a directory with, per model, ``hf/`` (the checkpoint), ``cases.pt`` (inputs, and the logits that transformers
computes from them) and ``megatron/`` (an import); and for each model MODEL=LAYOUT,LAYOUT. Writes
the largest differences to ``results.json``, and a checkpoint of every layout to ``saved/``.
"""

from __future__ import annotations

import contextlib
import json
import sys
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from open_layout import open_layout

from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.models.build import build_model
from megatron_s2d.models.hf_checkpoint import HfCheckpoint
from megatron_s2d.models.weights import export_buckets, import_weights
from megatron_s2d.parallel import layout as layouts
from megatron_s2d.parallel.checkpoint import load_checkpoint, start_saving
from megatron_s2d.parallel.trainable_model import TrainableModel, forward_only

from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region  # isort: skip

LAYOUTS = {
    "tp1": {"data_parallel_size": 4},
    "tp2": {"tensor_model_parallel_size": 2, "data_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2, "data_parallel_size": 2},
    "tp2pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    "tp4": {"tensor_model_parallel_size": 4, "sequence_parallel": True},
    "ep2": {"expert_model_parallel_size": 2, "data_parallel_size": 4},
    "ep2tp2pp2": {
        "expert_model_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
    },
}


def named_layout(name: str) -> contextlib.AbstractContextManager[layouts.Layout]:
    return open_layout(ParallelConfig(**LAYOUTS[name]))


def forward_step(model, batch):
    tokens, visible = batch
    masked = None
    if visible is not None:
        length = tokens.size(1)
        masked = ~(visible[:, None, None, :] & torch.ones(length, length, dtype=torch.bool).tril())
    output = model(tokens, torch.arange(tokens.size(1)).expand_as(tokens), masked)

    def result(logits, non_loss_data=False):
        logits = gather_from_tensor_model_parallel_region(logits)
        if non_loss_data:
            return logits
        return logits.square().mean() * tokens.numel(), torch.tensor(tokens.numel()), None

    return output, result


def difference(chunks, layout, case) -> float:
    """Largest difference from the case's logits at visible positions, over this job's ranks."""
    tokens, visible, expected = case["tokens"], case["visible"], case["logits"]
    largest = torch.zeros(())
    outputs = forward_only(chunks, layout, forward_step, [(tokens, visible)])
    if outputs:
        errors = (outputs[0][..., : expected.size(-1)] - expected).abs()
        largest = errors.max() if visible is None else errors[visible].max()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def same_parameters(chunks, others) -> bool:
    """Whether the parts of two models that all ranks hold are equal bit by bit."""
    pairs = zip(chunks[0].named_parameters(), others[0].named_parameters(), strict=True)
    equal = all(name == other_name and torch.equal(left, right) for (name, left), (other_name, right) in pairs)
    count = torch.tensor(int(equal))
    dist.all_reduce(count)
    return int(count) == dist.get_world_size()


def bfloat16_errors(spec, layout, source, case) -> list[float]:
    """Mean distance of the bfloat16 logits from the float32 ones and from transformers' bfloat16 logits."""
    chunks = build_model(spec, layout, params_dtype=torch.bfloat16)
    import_weights(chunks, spec, layout, source)
    errors = torch.zeros(2)
    outputs = forward_only(chunks, layout, forward_step, [(case["tokens"], None)])
    if outputs:
        logits = outputs[0][..., : spec.vocab_size].float()
        errors = torch.stack([(logits - case[key]).abs().mean() for key in ("logits", "bfloat16")])
    dist.all_reduce(errors, op=dist.ReduceOp.MAX)
    return errors.tolist()


def check_model(directory: Path, layout_names: list[str]) -> dict:
    source = HfCheckpoint(directory / "hf")
    cases = torch.load(directory / "cases.pt", weights_only=True)
    results: dict = {"live": {}, "converted": {}, "exported": {}, "bfloat16": {}}
    for name in layout_names:
        with named_layout(name) as layout:
            for check, result in check_layout(directory, source, cases, layout, name).items():
                results[check][name] = result
    results["resharded"] = reshard(directory, source.spec, cases["plain"]["tokens"])
    return results


def check_layout(directory: Path, source: HfCheckpoint, cases: dict, layout: layouts.Layout, name: str) -> dict:
    spec = source.spec
    live = build_model(spec, layout)
    import_weights(live, spec, layout, source)
    tensors = dict(chain.from_iterable(export_buckets(live, spec, layout, bucket_bytes=50_000)))
    same_names = tensors.keys() == source.tensors.keys()
    position = {"step": 0, "updates": 0}
    start_saving(directory / "saved" / name, live, layout, model_spec=spec.to_dict(), trainer_state=position).finish()
    converted = build_model(spec, layout)
    load_checkpoint(directory / "megatron", converted, layout, model_spec=spec.to_dict())
    return {
        "live": {key: difference(live, layout, case) for key, case in cases.items()},
        "exported": same_names and all(torch.equal(tensors[key], source.read(key)) for key in tensors),
        "converted": same_parameters(live, converted),
        "bfloat16": bfloat16_errors(spec, layout, source, cases["plain"]),
    }


def reshard(directory: Path, spec, tokens) -> dict:
    """Train an update at TP2 x PP2 and save with the optimizer's state; load at TP1, save; load at TP4."""
    position = {"step": 1, "updates": 1}
    digests = {}
    with named_layout("tp2pp2") as layout:
        chunks = build_model(spec, layout)
        import_weights(chunks, spec, layout, HfCheckpoint(directory / "hf"))
        trainable = TrainableModel(chunks, layout, OptimizerConfig(lr=1e-2), total_steps=1)
        trainable.forward_backward(forward_step, [(tokens, None)])
        trainable.optim_step()
        start_saving(
            directory / "a", chunks, layout, model_spec=spec.to_dict(), trainer_state=position, trainable=trainable
        ).finish()
        digests["tp2pp2"] = weights(chunks, spec, layout)
    with named_layout("tp1") as layout:
        chunks = build_model(spec, layout)
        load_checkpoint(directory / "a", chunks, layout, model_spec=spec.to_dict())
        digests["tp1"] = weights(chunks, spec, layout)
        start_saving(directory / "b", chunks, layout, model_spec=spec.to_dict(), trainer_state=position).finish()
    with named_layout("tp4") as layout:
        chunks = build_model(spec, layout)
        load_checkpoint(directory / "b", chunks, layout, model_spec=spec.to_dict())
        digests["tp4"] = weights(chunks, spec, layout)
    first = digests["tp2pp2"]
    original = HfCheckpoint(directory / "hf")
    return {
        "moved": max(float((first[key] - original.read(key)).abs().max()) for key in first),
        "equal": all(torch.equal(first[key], other[key]) for other in digests.values() for key in first),
    }


def weights(chunks, spec, layout) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in chain.from_iterable(export_buckets(chunks, spec, layout))}


def main() -> None:
    torch.set_num_threads(1)
    layouts.initialize_distributed()
    root = Path(sys.argv[1])
    models = dict(argument.split("=") for argument in sys.argv[2:])
    results = {
        name: check_model(root / name, layout_names.split(",") if layout_names else [])
        for name, layout_names in sorted(models.items())
    }
    if dist.get_rank() == 0:
        (root / "results.json").write_text(json.dumps(results))
    layouts.shutdown_distributed()


if __name__ == "__main__":
    main()
