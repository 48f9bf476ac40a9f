"""Forward-KL warm-up: the student learns a teacher cache's distributions offline (stage 2a; methods.md M2)."""

from __future__ import annotations

from megatron_s2d.config.forward_kl import ForwardKlConfig
from megatron_s2d.data.stored_samples import OfflineSamples
from megatron_s2d.objectives.distill import divergence_objective
from megatron_s2d.stages.context import StageContext
from megatron_s2d.stages.sft import OfflineSource, shuffled
from megatron_s2d.stages.teacher_cache import OUTPUT_LAYER_NAME
from megatron_s2d.stages.validation import StageValidation, restore_best
from megatron_s2d.teachers.cached import CachedTeacher
from megatron_s2d.train.loop import train
from megatron_s2d.verify import RewardManager


def run_forward_kl(context: StageContext) -> None:
    """Train on cached teacher responses against the cached distributions."""
    stage: ForwardKlConfig = context.stage
    student = context.models.start()
    student.prepare_training(stage.optimizer, stage.steps, offload=stage.offload_optimizer)
    cache = context.inputs.teacher_cache(stage.cache)
    output_layer = context.inputs.directories[stage.cache].path / OUTPUT_LAYER_NAME
    teacher = CachedTeacher(cache, output_layer, student, tail=stage.tail_mass, temperature=stage.temperature)
    samples = OfflineSamples(cache.stored(temperature=stage.temperature), shuffled(len(cache), context.seed))
    source = OfflineSource(
        samples,
        stage.global_batch_size,
        stage.loss_agg_mode,
        stage.norm_length or cache.longest_response,
        "divergence_weight",
        student.layout,
    )
    tail = stage.tail_mass if cache.header.representation == "top_k" else None
    objective = divergence_objective("forward_kl", tail=tail)
    settings = context.loop_settings()
    with RewardManager() as reward_manager:
        validation = StageValidation.of(context, student, reward_manager)
        train(student, source, objective, context.directory, settings, teacher=teacher, validation=validation)
    restore_best(context, student)
    context.save_model(student)
