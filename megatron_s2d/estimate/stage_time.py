"""Time and traffic of one step of a workflow's stage, phase by phase. No torch here.

Lengths are those of ``StageShape``: every response at its limit, so times are upper bounds, and the comparison of two
layouts is fair. Phases run one after the other, as in ``train/loop.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from megatron_s2d.arithmetic import ceil_div
from megatron_s2d.config.forward_kl import TeacherCacheConfig
from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.recompute import NO_RECOMPUTE
from megatron_s2d.config.stage import TrainingStageConfig
from megatron_s2d.config.weights import ExpoConfig, LoadCheckpointConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.estimate.layers import Build, model_flops
from megatron_s2d.estimate.memory import Workload, workload
from megatron_s2d.estimate.roofline import (
    Machine,
    ModelOnMachine,
    Traffic,
    add_traffic,
    hidden_state_traffic,
    scale_traffic,
    total_seconds,
)
from megatron_s2d.estimate.stage_memory import (
    BYTES_PER_VALUE,
    StageShape,
    ValidationShape,
    frozen_models,
    service_teachers,
)
from megatron_s2d.estimate.weight_push import stage_push


@dataclasses.dataclass(frozen=True)
class StageTime:
    """One step of a stage; for a cache, one batch of prompts."""

    seconds: Mapping[str, float]  # phase -> seconds, summed over the updates of a step
    traffic: Mapping[str, Traffic]  # kind -> traffic of one rank in a step
    tokens: int  # prompt and response tokens of the step, over all data ranks
    flops: float  # of the trained model: forward and backward passes, nothing recomputed, over all ranks

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds.values())

    def mfu(self, machine: Machine, ranks: int) -> float:
        """Return the trained model's operations over the data sheet's peak in the time of the full step."""
        return self.flops / (self.total * ranks * machine.gpu.bf16_flops) if self.total else 0.0


def stage_time(
    config: WorkflowConfig, name: str, specs: Mapping[str, ModelSpec], shape: StageShape, machine: Machine
) -> StageTime:
    """Return the time and traffic of one step of stage ``name`` on ``machine``."""
    stage, model = config.stages[name], config.model_of(name)
    if isinstance(stage, ExpoConfig | LoadCheckpointConfig):
        return StageTime({}, {}, 0, 0.0)
    parallel = config.parallel
    if isinstance(stage, TeacherCacheConfig):
        parallel = config.frozen_parallel(stage.teacher)
    lora = getattr(stage, "lora", None)
    build = Build(BYTES_PER_VALUE[config.precision], True, config.models[model].recomputation, lora=lora)
    student = ModelOnMachine(specs[model], parallel, build, machine)
    seconds, traffic = _generation(config, stage, shape, student)
    if isinstance(stage, TeacherCacheConfig):
        work = _work(shape, shape.requests, stage, parallel)
        seconds["score"] = student.score_seconds(work, outputs=stage.representation != "hidden_states")
        traffic = add_traffic(traffic, scale_traffic(student.pass_traffic(work, trains=False), work.num_micro_batches))
        return StageTime(seconds, traffic, shape.requests * shape.length, 0.0)
    work, teacher = _work(shape, shape.responses, stage, parallel), None
    exact = isinstance(stage, OpdConfig) and stage.kl_estimator != "sampled_token"
    scored = shape.updates // shape.epochs  # mini-batches that are scored: further passes use the same scores
    for role, other, layout in frozen_models(config, name):
        spec = specs[config.model_of(other)]
        scorer = ModelOnMachine(spec, layout, dataclasses.replace(build, recompute=NO_RECOMPUTE), machine)
        scorer_work, phase = _work(shape, shape.responses, stage, layout), f"{role} forward"
        # Exact divergences need the teacher's distributions again for every update.
        count = shape.updates if exact else scored
        seconds[phase] = seconds.get(phase, 0.0) + count * scorer.score_seconds(scorer_work, outputs=not exact)
        one_pass = scorer.pass_traffic(scorer_work, trains=False)
        traffic = add_traffic(traffic, scale_traffic(one_pass, scorer_work.num_micro_batches * count))
        if exact:
            teacher = spec
        if exact and layout != parallel:
            response_tokens = shape.responses * shape.response_length
            one = {
                f"{role} states": hidden_state_traffic(spec, response_tokens, build.bytes_per_value, layout, parallel)
            }
            travel = scale_traffic(one, shape.updates)
            phase = f"{role} states travel"
            seconds[phase] = seconds.get(phase, 0.0) + total_seconds(travel, machine)
            traffic = add_traffic(traffic, travel)
    services = service_teachers(config, name, specs)
    if services and isinstance(stage, OpdConfig) and stage.kl_estimator == "full_vocab":
        teacher = max(services, key=lambda spec: spec.hidden_size)
    if shape.updates > 1 and shape.requests:
        scoring = student.score_seconds(work, outputs=True)
        seconds["old log-probabilities"] = scored * scoring
        if (
            isinstance(stage, GrpoConfig | OpdConfig) and stage.policy_loss == "gspo"
        ):  # one more pass over the output layer
            seconds["ratios of responses"] = shape.updates * (scoring - student.score_seconds(work, outputs=False))
    for phase, value in student.train_seconds(work, teacher).items():
        seconds[phase] = shape.updates * value
    traffic = add_traffic(traffic, scale_traffic(student.train_traffic(work), shape.updates))
    if config.rollout.engine == "sglang" and shape.requests:
        push = stage_push(config, name, specs[model], machine)
        seconds["weight push"] = push.seconds(machine)
        traffic = add_traffic(traffic, {"weights gathered": push.gathered, "weights to servers": push.sent})
    if shape.validation is not None and (of_a_step := _validation_seconds(config, stage, shape.validation, student)):
        seconds["validation"] = of_a_step
    tokens = shape.updates * shape.responses * shape.length
    products = 3 if lora is None else 2
    flops = products * model_flops(specs[model], tokens, shape.length / 2)
    flops += products * shape.updates * shape.responses * shape.response_length * output_flops(specs[model])
    return StageTime(seconds, traffic, tokens, flops)


def output_flops(spec: ModelSpec) -> float:
    """Return operations of the output layer for one position."""
    return 2.0 * spec.hidden_size * spec.vocab_size


def _work(shape: StageShape, responses: int, stage, parallel: ParallelConfig) -> Workload:
    return workload(
        responses,
        shape.length,
        shape.response_length,
        max_tokens=stage.micro_batch.max_tokens_per_gpu,
        parallel=parallel,
    )


def _validation_seconds(
    config: WorkflowConfig, stage: TrainingStageConfig, shape: ValidationShape, student: ModelOnMachine
) -> float:
    """Return the time of all validations of a stage, in equal parts for each of its steps."""
    length = shape.sampling.max_response_length
    one = StageShape(0, 0, shape.requests, shape.prompts, shape.prompt_length, length)
    seconds, _ = _generation(config, stage, one, student)
    return sum(seconds.values()) * shape.batches * shape.count / stage.steps


def _generation(
    config: WorkflowConfig, stage, shape: StageShape, student: ModelOnMachine
) -> tuple[dict[str, float], dict[str, Traffic]]:
    if not shape.requests:
        return {}, {}
    dp_size, rollout = student.parallel.data_parallel_size, config.rollout
    requests, prompts = ceil_div(shape.requests, dp_size), ceil_div(shape.prompts, dp_size)
    rows = max(1, min(requests, rollout.max_batch_size, rollout.max_batch_tokens // shape.length))
    batches = math.ceil(requests / rows)
    decode = student.decode_seconds(requests / batches, shape.prompt_length, shape.response_length)
    seconds = {
        "prefill": student.prefill_seconds(max(prompts, batches), shape.prompt_length),
        "decode": batches * decode,
    }
    if shape.turns > 1 and rollout.engine == "megatron":
        # Every later turn computes its episode again, up to there; servers find the keys and values in their cache.
        lengths = shape.prompt_length + shape.response_length / 2
        seconds["prefill of turns"] = student.prefill_seconds(requests * (shape.turns - 1), lengths)
    return seconds, scale_traffic(student.decode_traffic(requests / batches, shape.response_length), batches)
