"""Sizes of a workflow's stage (responses, lengths) and, from them, the memory of one rank while the stage runs.

Sizes are the worst case that the settings allow: every response as long as ``sampling.max_response_length``, every
prompt as long as the longest. Host memory and the memory of servers beside the trainer are left out. No torch here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_s2d.arithmetic import ceil_div
from megatron_s2d.buffer_sizes import P2P_BUCKET_BYTES
from megatron_s2d.config.forward_kl import ForwardKlConfig, TeacherCacheConfig
from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.sft import SftConfig
from megatron_s2d.config.stage import TrainingStageConfig
from megatron_s2d.config.weights import ExpoConfig, LoadCheckpointConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.prompts import corpus_documents, is_corpus
from megatron_s2d.estimate.layers import Build, ModelShard, pipeline_shards
from megatron_s2d.estimate.memory import (
    ResidentMemory,
    StageMemory,
    TeacherInputs,
    Workload,
    frozen_memory,
    generate_phases,
    lazy_hidden_states,
    score_phase,
    top_k_selection_bytes,
    train_phase,
    trained_memory,
    update_phase,
    workload,
)
from megatron_s2d.records import Prompt

BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2}
_DOCUMENTS = 64  # documents of a generated corpus that are read to find its length


@dataclasses.dataclass(frozen=True)
class StageShape:
    """Sizes of a stage over all data ranks."""

    responses: int  # of one update; 0 without training
    updates: int  # optimizer updates of one step
    requests: int  # responses sampled in one step (or batch of a cache); 0 for none
    prompts: int  # distinct prompts of those
    prompt_length: int  # tokens, the longest
    response_length: int  # tokens, the limit

    @property
    def length(self) -> int:
        """Tokens of the longest sample."""
        return self.prompt_length + self.response_length


def stage_shape(
    config: WorkflowConfig, name: str, prompts: Mapping[str, Sequence[Prompt]], tokenizer: Any
) -> StageShape:
    """Return the shape of stage ``name``; ``prompts`` as in ``Preflight``."""
    stage = config.stages[name]
    if isinstance(stage, ExpoConfig | LoadCheckpointConfig):
        return StageShape(0, 0, 0, 0, 0, 0)
    if isinstance(stage, ForwardKlConfig) or (isinstance(stage, SftConfig) and stage.cache is not None):
        caches = stage.cache if isinstance(stage.cache, list) else [stage.cache]
        shapes = [stage_shape(config, cache, prompts, tokenizer) for cache in caches]
        cached = max(shapes, key=lambda shape: shape.length)
        return dataclasses.replace(cached, responses=stage.global_batch_size, updates=1, requests=0, prompts=0)
    if isinstance(stage, SftConfig):
        prompt, response = _longest_solution(config, stage.data, prompts, tokenizer)
        return StageShape(stage.global_batch_size, 1, 0, 0, prompt, response)
    longest = max(len(prompt.token_ids) for entry in stage.entries for prompt in prompts[entry])
    limit = stage.sampling.max_response_length
    if isinstance(stage, TeacherCacheConfig):
        count = min(stage.generation_batch_size, sum(len(prompts[entry]) for entry in stage.entries))
        return StageShape(0, 0, count * stage.num_generations, count, longest, limit)
    live = stage.train_batch_size
    if isinstance(stage, OpdConfig):
        live = round(stage.on_policy_fraction * live)
    responses = stage.train_batch_size * stage.num_generations // stage.num_mini_batches
    return StageShape(responses, stage.num_mini_batches, live * stage.num_generations, live, longest, limit)


def _longest_solution(
    config: WorkflowConfig, entry: str, prompts: Mapping[str, Sequence[Prompt]], tokenizer: Any
) -> tuple[int, int]:
    source = config.data[entry.partition("/")[0]]
    rows = corpus_documents(source, tokenizer, 0, _DOCUMENTS) if is_corpus(source) else prompts[entry]
    longest = max(rows, key=lambda row: len(row.token_ids) + len(row.solution_token_ids))
    return len(longest.token_ids), len(longest.solution_token_ids)


def stage_memory(
    config: WorkflowConfig, name: str, specs: Mapping[str, ModelSpec], shape: StageShape, *, on_gpu: bool
) -> StageMemory:
    """Return the memory of the fullest pipeline rank while stage ``name`` runs; on a GPU with Transformer Engine."""
    estimate = _StageEstimate(config, name, specs, shape, on_gpu)
    shards = pipeline_shards(estimate.spec, estimate.parallel)
    return max((estimate.memory_of(shard) for shard in shards), key=lambda memory: memory.total)


@dataclasses.dataclass(frozen=True)
class _StageEstimate:
    config: WorkflowConfig
    name: str
    specs: Mapping[str, ModelSpec]
    shape: StageShape
    on_gpu: bool

    @property
    def stage(self) -> Any:
        return self.config.stages[self.name]

    @property
    def model(self) -> str:
        return self.config.model_of(self.name)

    @property
    def spec(self) -> ModelSpec:
        return self.specs[self.model]

    @property
    def parallel(self):
        if isinstance(self.stage, TeacherCacheConfig):
            return self.config.frozen_parallel(self.stage.teacher)
        return self.config.parallel

    @property
    def build(self) -> Build:
        return Build(BYTES_PER_VALUE[self.config.precision], self.on_gpu, self.config.models[self.model].recompute)

    def memory_of(self, shard: ModelShard) -> StageMemory:
        """Return the memory of one pipeline rank."""
        if isinstance(self.stage, ExpoConfig):
            weights = frozen_memory(shard, self.build, "student", self.model)
            tuned = frozen_memory(shard, self.build, "tuned", self.model, copies=min(2, len(self.stage.tuned)))
            return StageMemory(shard.pp_rank, (weights, tuned), {"average": {"float32 sums": 4 * shard.num_parameters}})
        if isinstance(self.stage, LoadCheckpointConfig):
            return StageMemory(shard.pp_rank, (frozen_memory(shard, self.build, "student", self.model),), {"load": {}})
        if isinstance(self.stage, TeacherCacheConfig):
            phases = self._generation(shard) | {"score": self._cache_scoring(shard)}
            return StageMemory(shard.pp_rank, (frozen_memory(shard, self.build, "teacher", self.model),), phases)
        work = self._workload()
        teacher = self._teacher_inputs()
        phases = self._generation(shard) | self._scores(shard, work)
        phases["train"] = train_phase(shard, self.build, work, on_gpu=self.on_gpu, teacher=teacher)
        phases["update"] = update_phase(shard, self.build, on_gpu=self.on_gpu)
        fp8 = self.config.fp8
        copies = fp8 is not None and not fp8.parameters  # FP8 parameters replace the bfloat16 weights
        student = trained_memory(shard, dataclasses.replace(self.build, fp8=copies), self.model)
        if self.stage.offload_optimizer:  # on the device only while they are used
            phases["train"]["gradients"] = student.gradients
            phases["update"] |= {"gradients": student.gradients, "optimizer": student.optimizer}
            student = dataclasses.replace(student, gradients=0, optimizer=0)
        return StageMemory(shard.pp_rank, (student, *self._frozen_models(shard)), phases)

    def _workload(self, responses: int | None = None, parallel=None) -> Workload:
        shape = self.shape
        return workload(
            shape.responses if responses is None else responses,
            shape.length,
            shape.response_length,
            max_tokens=self.stage.micro_batch.max_tokens_per_gpu,
            parallel=parallel or self.parallel,
        )

    def _generation(self, shard: ModelShard) -> dict[str, dict[str, int]]:
        if not self.shape.requests or self.config.rollout.engine != "megatron":  # servers have separate GPUs
            return {}
        dp_size = shard.parallel.data_parallel_size
        return generate_phases(
            shard,
            self.build,
            requests=ceil_div(self.shape.requests, dp_size),
            prompts=ceil_div(self.shape.prompts, dp_size),
            prompt_length=self.shape.prompt_length,
            sampling=self.stage.sampling,
            rollout=self.config.rollout,
        )

    def _cache_scoring(self, shard: ModelShard) -> dict[str, int]:
        """Scoring of a batch of responses for a cache: the hidden states of all of them exist at once."""
        work = self._workload(self.shape.requests)
        states = None
        if self.stage.representation != "sampled_token" and shard.is_pipeline_last_stage:
            states = work.tokens * self.spec.hidden_size * self.build.bytes_per_value // shard.sequence_shards
        added = score_phase(shard, self.build, work, on_gpu=self.on_gpu, states=states)
        if self.stage.representation in ("full_vocab", "top_k") and shard.is_pipeline_last_stage:
            added["logits"] = self.shape.response_length * shard.local_vocab_size * 4 * (2 + shard.tp_size)
        return added

    def _frozen_models(self, shard: ModelShard) -> list[ResidentMemory]:
        resident = []
        for role, stage, parallel in frozen_models(self.config, self.name):
            model = self.config.model_of(stage)
            shards = pipeline_shards(self.specs[model], parallel)
            if parallel == self.parallel:
                shards = [shards[shard.pp_rank]]
            fp8 = self.config.fp8 is not None and self.config.fp8.frozen
            build = dataclasses.replace(self.build, recompute="none", fp8=fp8)
            memories = (frozen_memory(item, build, role, model) for item in shards)
            resident.append(max(memories, key=lambda memory: memory.total))
        for role in ("teacher", "reference"):
            same_role = [memory for memory in resident if memory.role == role]
            is_offloaded = self.on_gpu and getattr(self.stage, "teacher_sampling", None) is None
            if len(same_role) > 1 and is_offloaded:  # one is on the device, the others in host memory
                resident = [memory for memory in resident if memory.role != role]
                resident.append(max(same_role, key=lambda memory: memory.total))
        return resident

    def _teacher_inputs(self) -> TeacherInputs | None:
        stage = self.stage
        if isinstance(stage, ForwardKlConfig):
            cache = self.config.stages[stage.cache]
            kind = {"hidden_states": "hidden", "full_vocab": "logits", "top_k": "topk"}[cache.representation]
            spec = self.specs[self.config.model_of(stage.cache)]
            return TeacherInputs(kind, spec, top_k=cache.top_k, copies_output_layer=kind == "hidden")
        if not isinstance(stage, OpdConfig) or stage.kl_estimator == "sampled_token":
            return None
        models = frozen_models(self.config, self.name)
        parallel = next(layout for role, _, layout in models if role == "teacher")
        return TeacherInputs(
            "topk" if stage.kl_estimator == "top_k" else "hidden",
            max((self.specs[self.config.model_of(other)] for _, other, _ in models), key=lambda spec: spec.hidden_size),
            sources=2 if stage.reward_scale != 1.0 else 1,
            top_k=stage.top_k * (2 if stage.top_k_source == "union" else 1),
            copies_output_layer=parallel != self.parallel,
        )

    def _scores(self, shard: ModelShard, work: Workload) -> dict[str, dict[str, int]]:
        """Forward passes of frozen models, and of the student for old log-probabilities."""
        phases = {}
        if self._scores_old_log_probs():
            phases["score"] = score_phase(shard, self.build, work, on_gpu=self.on_gpu)
        for role, stage, parallel in frozen_models(self.config, self.name):
            spec = self.specs[self.config.model_of(stage)]
            shards = pipeline_shards(spec, parallel)
            scorer = shards[shard.pp_rank] if parallel == self.parallel else shards[-1]
            scorer_work = self._workload(parallel=parallel)
            states = None
            if self._teacher_inputs() is not None and scorer.is_pipeline_last_stage:
                states = lazy_hidden_states(scorer, self.build, scorer_work, spec, on_gpu=self.on_gpu)
                if parallel != self.parallel:
                    states += 2 * P2P_BUCKET_BYTES
            phase = score_phase(scorer, self.build, scorer_work, on_gpu=self.on_gpu, states=states)
            if getattr(self.stage, "kl_estimator", "") == "top_k" and shard.is_pipeline_last_stage:
                phase["support"] = top_k_selection_bytes(shard, spec)
            if sum(phase.values()) > sum(phases.get(role, {}).values()):
                phases[role] = phase
        return phases

    def _scores_old_log_probs(self) -> bool:
        stage = self.stage
        return isinstance(stage, TrainingStageConfig) and getattr(stage, "num_mini_batches", 1) > 1


def frozen_models(config: WorkflowConfig, name: str) -> list[tuple[str, str, ParallelConfig]]:
    """Return (role, stage whose weights are loaded, layout) of every frozen model that stage ``name`` loads."""
    stage = config.stages[name]
    models = []
    if isinstance(stage, GrpoConfig) and stage.kl_loss_coef > 0:
        if stage.reference is None:  # the initial weights, loaded like the trained model
            models.append(("reference", name, config.parallel))
        else:
            models.append(("reference", stage.reference, config.frozen_parallel(stage.reference)))
    if isinstance(stage, OpdConfig):
        for relation, other in stage.inputs().items():
            role = relation.partition(".")[0]
            model = (role, other, config.frozen_parallel(other))
            if role == "teacher" and stage.teacher_engine == "sglang":
                continue
            if (role == "teacher" or (role == "reference" and stage.needs_reference)) and model not in models:
                models.append(model)
    return models
