"""Trains and distils four-layer models with and without virtual pipeline stages, on two ranks; writes JSON.

Started by test_virtual_stages.py through torchrun; arguments: the output file and an empty directory for checkpoints.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from training_worker import OPTIMIZER, VOCAB, parse_layout, replayed, samples, weights

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.data.packing import MiniBatch
from megatron_s2d.data.sample_exchange import keep_own
from megatron_s2d.models.weights import export_buckets
from megatron_s2d.objectives.distill import divergence_objective
from megatron_s2d.parallel.layout import Layout, build_layout, initialize_distributed, shutdown_distributed
from megatron_s2d.teachers.frozen import FullTeacher, TeacherRouter
from megatron_s2d.train.megatron_model import MegatronModel

LAYOUTS = {
    "dp2": {},
    "pp2": {},
    "pp2vp2": {"virtual_pipeline_model_parallel_size": 2},
    "pp2vp2overlap": {"virtual_pipeline_model_parallel_size": 2, "overlap_grad_reduce": True},
}


def build(preset: str, layout: Layout, seed: int | None, **options) -> MegatronModel:
    config = ModelConfig(preset=preset, vocab_size=VOCAB, num_layers=4, **options)
    return MegatronModel(
        config.resolve(), layout, precision="float32", max_tokens=40, seed=seed, packed=True, options=config
    )


def update(model: MegatronModel, source: FullTeacher) -> dict[str, float]:
    """One distillation update of all samples, from the teacher's full distributions."""
    columns = {"divergence_weight": weights(samples(), "token_mean")}
    batch = keep_own(samples(), model.layout)
    batches = model.pack(batch, columns)
    distributions = source.distributions(MiniBatch(batch, columns), batches)
    count = sum(sample.length for sample in batch)
    metrics = model.forward_backward(batches, divergence_objective("reverse_kl"), distributions, num_tokens=count)
    return {name: metric.value() for name, metric in metrics.items()} | {"grad_norm": model.optim_step()}


def run(name: str, layout: Layout, directory: Path) -> dict:
    student, teacher = build("tiny-student", layout, 5, recompute="full"), build("tiny-teacher", layout, 4)
    teacher.freeze()
    student.prepare_training(OPTIMIZER, 3)
    source = FullTeacher(student, TeacherRouter({None: teacher}))
    result = {"before": digest(student), "scores": [score.tolist() for score in student.score_replicated(samples())]}
    result["rows"] = [update(student, source), update(student, source)]
    student.save(directory / name, {"step": 2, "updates": 2}, with_optimizer=True)
    result["rows"].append(update(student, source))
    result["after"] = digest(student)
    result["moved"] = [score.tolist() for score in student.score_replicated(samples())]
    return result


def resumed(directory: Path, layout: Layout) -> dict:
    """The third update of a checkpoint of another layout."""
    student, teacher = build("tiny-student", layout, None), build("tiny-teacher", layout, 4)
    teacher.freeze()
    student.prepare_training(OPTIMIZER, 3)
    student.load(directory, with_optimizer=True)
    return update(student, FullTeacher(student, TeacherRouter({None: teacher})))


def digest(model: MegatronModel) -> str:
    sha = hashlib.sha256()
    for bucket in export_buckets(model.chunks, model.spec, model.layout):
        for name, tensor in bucket:
            sha.update(name.encode() + tensor.numpy().tobytes())
    return sha.hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    output, directory = sys.argv[1], Path(sys.argv[2])
    initialize_distributed()
    layouts = {name: build_layout(parse_layout(name).model_copy(update=LAYOUTS[name])) for name in LAYOUTS}
    results = {name: run(name, layout, directory) for name, layout in layouts.items()}
    for name in ("dp2", "pp2vp2"):
        results[name]["replayed"] = replayed(layouts[name], num_layers=4)
    results["pp2vp2 to dp2"] = resumed(directory / "pp2vp2", layouts["dp2"])
    results["dp2 to pp2vp2"] = resumed(directory / "dp2", layouts["pp2vp2"])
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(results))
    shutdown_distributed()


if __name__ == "__main__":
    main()
