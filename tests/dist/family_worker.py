"""Scores responses with checkpoints at several layouts on two ranks; started by test_family_layouts.py.

Arguments: a directory with a folder ``hf`` for each model, the JSON file of results, and MODEL/LAYOUT names. Names that
begin with ``lora:`` have a LoRA adapter beside the weights, from the folder ``adapter`` in that of the model.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from open_layout import open_layout

from megatron_s2d.config.lora import LoraConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.data.sample_exchange import keep_own
from megatron_s2d.models.hf_checkpoint import HfCheckpoint
from megatron_s2d.models.weights import export_buckets, import_weights
from megatron_s2d.objectives.distill import sft_objective
from megatron_s2d.parallel import layout as layouts
from megatron_s2d.parallel.collectives import broadcast_from_rank0
from megatron_s2d.records import Sample
from megatron_s2d.train.megatron_model import MegatronModel

LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "dp2": {"data_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2, "data_parallel_size": 2},
}
LORA = {"rank": 4, "alpha": 6, "targets": ["all-linear"]}
PACKED = ("tp2", "cp2")
LENGTHS = (40, 7, 33, 18)  # shorter and longer than the windows


def samples(vocab_size: int) -> list[Sample]:
    generator = np.random.default_rng(1)
    return [
        Sample(
            f"{n}#0@0", str(n), f"{n}@0.0", "math", 0, generator.integers(0, vocab_size, length),
            np.arange(length) >= 2, 1.0, "data",
        )
        for n, length in enumerate(LENGTHS)
    ]  # fmt: skip


def run(directory: Path, name: str) -> dict:
    """Scores of all samples, each with its index, and whether the exported tensors are the checkpoint's."""
    source = HfCheckpoint(directory)
    with open_layout(ParallelConfig(**LAYOUTS[name])) as layout:
        model = MegatronModel(source.spec, layout, precision="float32", max_tokens=64, packed=name in PACKED)
        import_weights(model.chunks, source.spec, layout, source)
        every = samples(source.spec.vocab_size)
        scores = model.score_replicated(every)
        exported = dict(item for bucket in export_buckets(model.chunks, source.spec, layout) for item in bucket)
    same = exported.keys() == source.tensors.keys()
    same = same and all(torch.equal(exported[key], source.read(key)) for key in exported)
    return {"scores": [row.tolist() for row in scores], "exported": same}


def run_lora(directory: Path, name: str) -> dict:
    """Scores with the adapter of a PEFT directory; its tensors again; what training from a new adapter gives."""
    source = HfCheckpoint(directory)
    every = samples(source.spec.vocab_size)
    with open_layout(ParallelConfig(**LAYOUTS[name])) as layout:

        def model(**options) -> MegatronModel:
            built = MegatronModel(source.spec, layout, precision="float32", max_tokens=64, packed=name in PACKED)
            import_weights(built.chunks, source.spec, layout, source)
            built.add_adapter(LoraConfig(**LORA, **options), seed=5)
            return built

        read = model(adapter=directory / "adapter")
        result = {"scores": [row.tolist() for row in read.score_replicated(every)]}
        result["tensors"] = {key: tensor.double().sum().item() for key, tensor in read.adapter.tensors().items()}
        result["exported"] = _norms(export_buckets(read.chunks, source.spec, layout))

        new = model()
        base = [row.tolist() for row in new.without_adapter().score_replicated(every)]
        result["base"] = base
        result["zero_adapter_is_base"] = [row.tolist() for row in new.score_replicated(every)] == base
        result["start"] = {key: tensor.double().norm().item() for key, tensor in new.adapter.tensors().items()}
        new.prepare_training(OptimizerConfig(lr=1e-2), 2)
        result["training"] = [_update(new, every) for _ in range(2)]
        result["trained"] = {key: tensor.double().norm().item() for key, tensor in new.adapter.tensors().items()}
        result["base_stays"] = [row.tolist() for row in new.without_adapter().score_replicated(every)] == base
        result |= _save_and_resume(new, model(), every)
    return result


def _save_and_resume(trained: MegatronModel, fresh: MegatronModel, every: list[Sample]) -> dict:
    """Whether an update after resuming equals one without a stop; files of the checkpoint and of merged weights."""
    folder = Path(broadcast_from_rank0(tempfile.mkdtemp))
    trained.save(folder / "step", {"step": 2, "updates": 2}, with_optimizer=True)
    fresh.prepare_training(OptimizerConfig(lr=1e-2), 2)
    fresh.load(folder / "step", with_optimizer=True)
    same = _update(trained, every) == _update(fresh, every)
    scores = trained.score_replicated(every)
    trained.adapter.merge()
    merged = trained.without_adapter().score_replicated(every)
    difference = max(float(np.abs(one - other).max()) for one, other in zip(scores, merged, strict=True))
    return {"resumed": same, "merged_difference": difference}


def _update(model: MegatronModel, every: list[Sample]) -> list[float]:
    own = keep_own(every, model.layout)
    tokens = sum(sample.response_length for sample in every)
    batches = model.pack(own, {"supervised_weight": [1 / tokens] * len(own)})
    metrics = model.forward_backward(batches, sft_objective(), num_tokens=sum(sample.length for sample in every))
    return [metrics["loss"].value(), model.optim_step()]


def _norms(buckets) -> dict[str, float]:
    return {name: tensor.double().norm().item() for bucket in buckets for name, tensor in bucket}


def main() -> None:
    torch.set_num_threads(1)
    layouts.initialize_distributed()
    root, output, *names = sys.argv[1:]
    results = {}
    for name in names:
        model, layout = name.split("/")
        function = run_lora if model.startswith("lora:") else run
        results[name] = function(Path(root) / model.removeprefix("lora:"), layout)
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(results))
    layouts.shutdown_distributed()


if __name__ == "__main__":
    main()
