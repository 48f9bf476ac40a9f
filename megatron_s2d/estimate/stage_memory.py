"""Sizes of a workflow's stage (responses, lengths) and, from them, the memory of one rank while the stage runs.

Sizes are the worst case that the settings allow: every response as long as ``sampling.max_response_length``, every
prompt as long as the longest. Host memory and the memory of servers beside the trainer are left out. No torch here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_s2d.arithmetic import ceil_div
from megatron_s2d.buffer_sizes import TP_COMM_OVERLAP_BUFFERS
from megatron_s2d.config.forward_kl import ForwardKlConfig, TeacherCacheConfig
from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.recompute import NO_RECOMPUTE
from megatron_s2d.config.routing_replay import replays_routes
from megatron_s2d.config.sft import SftConfig
from megatron_s2d.config.stage import TrainingStageConfig, validation_of
from megatron_s2d.config.teacher_service import service_key, services_by_domain, services_of
from megatron_s2d.config.training import SamplingConfig
from megatron_s2d.config.weights import ExpoConfig, LoadCheckpointConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.data.prompts import corpus_documents, fitting_prompts, is_corpus
from megatron_s2d.estimate.host_copies import save_phase, staged_copies
from megatron_s2d.estimate.layers import Build, ModelShard, pipeline_shards
from megatron_s2d.estimate.memory import (
    ResidentMemory,
    StageMemory,
    TeacherInputs,
    Workload,
    export_phase,
    frozen_memory,
    generate_phases,
    lazy_hidden_states,
    score_phase,
    states_travel_phase,
    top_k_selection_bytes,
    train_phase,
    trained_memory,
    update_phase,
    workload,
    workspaces,
)
from megatron_s2d.estimate.optimizer_peak import prepare_training_peak

BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2}
_DOCUMENTS = 64  # documents of a generated corpus that are read to find its length


@dataclasses.dataclass(frozen=True)
class ValidationShape:
    """Sizes of the validations inside a stage, over all data ranks."""

    count: int  # validations in the stage, at most
    batches: int  # of one validation
    prompts: int  # of one batch, at most
    requests: int  # of one batch, at most
    prompt_length: int  # tokens, the longest
    sampling: SamplingConfig


@dataclasses.dataclass(frozen=True)
class StageShape:
    """Sizes of a stage over all data ranks."""

    responses: int  # of one update; 0 without training
    updates: int  # optimizer updates of one step
    requests: int  # responses sampled in one step (or batch of a cache); 0 for none
    prompts: int  # distinct prompts of those
    prompt_length: int  # tokens, the longest
    response_length: int  # tokens, the limit
    epochs: int = 1  # passes over the sampled responses, each with ``updates / epochs`` updates
    turns: int = 1  # of an episode at most; turns and observations together have ``response_length`` tokens
    validation: ValidationShape | None = None

    @property
    def length(self) -> int:
        """Tokens of the longest sample."""
        return self.prompt_length + self.response_length


def stage_shape(config: WorkflowConfig, name: str, prompts: Mapping[str, PromptTable], tokenizer: Any) -> StageShape:
    """Return the shape of stage ``name``; ``prompts`` as in ``Preflight``."""
    shape = _stage_shape(config, name, prompts, tokenizer)
    return dataclasses.replace(shape, validation=_validation_shape(config, name, prompts))


def _validation_shape(config: WorkflowConfig, name: str, prompts: Mapping[str, PromptTable]) -> ValidationShape | None:
    stage = config.stages[name]
    validation = validation_of(stage)
    if validation is None or not isinstance(stage, TrainingStageConfig):
        return None
    tables = [prompts[entry][: validation.num_prompts] for entry in validation.data.values()]
    largest = max(min(len(table), validation.batch_size) for table in tables)
    return ValidationShape(
        count=ceil_div(stage.steps, validation.interval_steps) + validation.before_training,
        batches=sum(ceil_div(len(table), validation.batch_size) for table in tables),
        prompts=largest,
        requests=largest * validation.samples_per_prompt,
        prompt_length=max(table.longest for table in tables),
        sampling=validation.sampling or config.evaluation.sampling,
    )


def _stage_shape(config: WorkflowConfig, name: str, prompts: Mapping[str, PromptTable], tokenizer: Any) -> StageShape:
    stage = config.stages[name]
    if isinstance(stage, ExpoConfig | LoadCheckpointConfig):
        return StageShape(0, 0, 0, 0, 0, 0)
    if isinstance(stage, ForwardKlConfig) or (isinstance(stage, SftConfig) and stage.cache is not None):
        caches = stage.cache if isinstance(stage.cache, list) else [stage.cache]
        shapes = [_stage_shape(config, cache, prompts, tokenizer) for cache in caches]
        cached = max(shapes, key=lambda shape: shape.length)
        return dataclasses.replace(cached, responses=stage.global_batch_size, updates=1, requests=0, prompts=0)
    if isinstance(stage, SftConfig):
        prompt, response = _longest_solution(config, name, prompts, tokenizer)
        return StageShape(stage.global_batch_size, 1, 0, 0, prompt, response)
    read = [fitting_prompts(config, name, entry, prompts[entry]) for entry in stage.entries]
    longest = max(table.longest for table in read)
    limit = stage.sampling.max_response_length
    turns = max(_turns(config, entry, limit) for entry in stage.entries)
    if isinstance(stage, TeacherCacheConfig):
        count = min(stage.generation_batch_size, sum(map(len, read)))
        return StageShape(0, 0, count * stage.num_generations, count, longest, limit, turns=turns)
    live = stage.train_batch_size
    if isinstance(stage, OpdConfig):
        live = round(stage.on_policy_fraction * live)
    responses = stage.train_batch_size * stage.num_generations // stage.num_mini_batches
    requests = live * stage.num_generations
    return StageShape(responses, stage.num_updates, requests, live, longest, limit, stage.ppo_epochs, turns)


def _turns(config: WorkflowConfig, entry: str, limit: int) -> int:
    """Return the turns of an episode at most; one and the observation before it have a token each at least."""
    environment = config.data[entry.partition("/")[0]].resolved_environment
    return 1 if environment is None else max(1, min(environment.max_turns, (limit + 1) // 2))


def _longest_solution(
    config: WorkflowConfig, name: str, prompts: Mapping[str, PromptTable], tokenizer: Any
) -> tuple[int, int]:
    entry = config.stages[name].data
    source = config.data[entry.partition("/")[0]]
    if is_corpus(source):
        rows = PromptTable.of(corpus_documents(source, tokenizer, 0, _DOCUMENTS))
    else:
        rows = fitting_prompts(config, name, entry, prompts[entry])
    return rows.longest_sample


def stage_memory(
    config: WorkflowConfig,
    name: str,
    specs: Mapping[str, ModelSpec],
    shape: StageShape,
    *,
    on_gpu: bool,
    transformer_engine: bool = True,
) -> StageMemory:
    """Return the memory of the fullest pipeline rank while stage ``name`` runs.

    transformer_engine: whether layers on a GPU are Transformer Engine's.
    """
    estimate = _StageEstimate(config, name, specs, shape, on_gpu, transformer_engine)
    memories = map(estimate.memory_of, pipeline_shards(estimate.spec, estimate.parallel))
    return max(memories, key=lambda memory: memory.total)


def rank_memory(
    config: WorkflowConfig,
    name: str,
    specs: Mapping[str, ModelSpec],
    shape: StageShape,
    pp_rank: int,
    *,
    on_gpu: bool,
    transformer_engine: bool = True,
    equal_lengths: bool = False,
    stage_rank: int | None = None,
) -> StageMemory:
    """Return the memory of pipeline rank ``pp_rank`` while stage ``name`` runs; see ``stage_memory``, ``workload``.

    stage_rank: of the pipeline stage's ranks; None: the one that needs most. They differ while models are made.
    """
    estimate = _StageEstimate(config, name, specs, shape, on_gpu, transformer_engine, equal_lengths, stage_rank)
    return estimate.memory_of(pipeline_shards(estimate.spec, estimate.parallel)[pp_rank])


@dataclasses.dataclass(frozen=True)
class _StageEstimate:
    config: WorkflowConfig
    name: str
    specs: Mapping[str, ModelSpec]
    shape: StageShape
    on_gpu: bool
    transformer_engine: bool = True
    equal_lengths: bool = False
    stage_rank: int | None = None

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
        fused = self.on_gpu and self.transformer_engine
        recompute = self.config.models[self.model].recomputation
        lora = getattr(self.stage, "lora", None)
        return Build(BYTES_PER_VALUE[self.config.precision], fused, recompute, on_gpu=self.on_gpu, lora=lora)

    def memory_of(self, shard: ModelShard) -> StageMemory:
        """Return the memory of one pipeline rank."""
        if isinstance(self.stage, ExpoConfig):
            weights = frozen_memory(shard, self.build, "student", self.model)
            tuned = frozen_memory(shard, self.build, "tuned", self.model, copies=min(2, len(self.stage.tuned)))
            return self._memory(shard, (weights, tuned), {"average": {"float32 sums": 4 * shard.num_parameters}})
        if isinstance(self.stage, LoadCheckpointConfig):
            return self._memory(shard, (frozen_memory(shard, self.build, "student", self.model),), {"load": {}})
        if isinstance(self.stage, TeacherCacheConfig):
            phases = self._generation(shard) | {"score": self._cache_scoring(shard)}
            return self._memory(shard, (frozen_memory(shard, self.build, "teacher", self.model),), phases)
        work, teacher = self._workload(), self._teacher_inputs()
        phases = self._generation(shard) | self._validation(shard) | self._scores(shard, work)
        fp8 = self.config.fp8
        build = dataclasses.replace(self.build, fp8_operands=fp8 is not None)
        phases["train"] = train_phase(shard, build, work, on_gpu=self.on_gpu, teacher=teacher)
        phases["update"] = update_phase(shard, self.build, on_gpu=self.on_gpu)
        if fp8 is not None and fp8.parameters:  # masters are copied to bfloat16 before they are rounded
            phases["update"]["FP8 parameters"] = 2 * shard.num_layer_weights // shard.gradient_buffers()[-1][1]
        copies = fp8 is not None and not fp8.parameters  # FP8 parameters replace the bfloat16 weights
        student = trained_memory(shard, dataclasses.replace(self.build, fp8=copies), self.model)
        phases["save"] = save_phase(shard, self.build, self.stage, student.optimizer)
        pinned = staged_copies(shard, self.build, self.stage)
        if self.stage.offload_optimizer:  # on the device only while they are used
            if self.on_gpu:
                pinned["optimizer"] = student.optimizer
            phases["train"]["gradients"] = student.gradients
            phases["update"] |= {"gradients": student.gradients, "optimizer": student.optimizer}
            student = dataclasses.replace(student, gradients=0, optimizer=0)
        frozen, waiting = self._frozen_models(shard)
        if waiting and self.on_gpu:
            pinned["waiting models"] = waiting
        models = [student, *frozen]
        if teacher is not None and (size := teacher.output_layers(shard, self.build)):
            models.append(ResidentMemory("teacher's output layer", self.model, size))
        made = prepare_training_peak(shard, self.build, self.stage_rank, fp8 is not None and fp8.parameters)
        made += sum(item.total - item.fp8_copies for item in frozen)
        memory = self._memory(shard, tuple(models), phases)
        kept = memory.workspaces + shard.placeholder_bytes(self.build)
        return dataclasses.replace(
            memory, workspaces=kept, build=made, pinned=pinned, outside=self._outside_of_pytorch()
        )

    def _outside_of_pytorch(self) -> dict[str, int]:
        if not (self.on_gpu and self.parallel.tp_comm_overlap):
            return {}
        tokens, size = self.stage.micro_batch.max_tokens_per_gpu, BYTES_PER_VALUE[self.config.precision]
        return {"tp_comm_overlap": TP_COMM_OVERLAP_BUFFERS * tokens * self.spec.hidden_size * size}

    def _memory(
        self, shard: ModelShard, models: tuple[ResidentMemory, ...], phases: Mapping[str, Mapping[str, int]]
    ) -> StageMemory:
        return StageMemory(
            shard.pp_rank, models, phases, workspaces(on_gpu=self.on_gpu), sum(item.total for item in models)
        )

    def _workload(self, responses: int | None = None, parallel=None) -> Workload:
        shape = self.shape
        return workload(
            shape.responses if responses is None else responses,
            shape.length,
            shape.response_length,
            max_tokens=self.stage.micro_batch.max_tokens_per_gpu,
            parallel=parallel or self.parallel,
            packed=self.stage.micro_batch.sequence_packing,
            equal_lengths=self.equal_lengths,
        )

    def _generation(self, shard: ModelShard) -> dict[str, dict[str, int]]:
        if not self.shape.requests:
            return {}
        if self.config.rollout.engine != "megatron":
            return {"export": export_phase(shard, self.build, self.config.rollout.sglang.bucket_bytes)}
        dp_size = shard.parallel.data_parallel_size
        return generate_phases(
            shard,
            self.build,
            requests=ceil_div(self.shape.requests, dp_size),
            prompts=ceil_div(self.shape.prompts, dp_size),
            prompt_length=self.shape.prompt_length,
            sampling=self.stage.sampling,
            rollout=self.config.rollout,
            records_routes=replays_routes(self.config, self.stage, self.spec),
            turns=self.shape.turns,
        )

    def _validation(self, shard: ModelShard) -> dict[str, dict[str, int]]:
        """Validation in this process: its larger phase; servers have their own memory."""
        shape = self.shape.validation
        if shape is None or (self.shape.requests and self.config.rollout.engine != "megatron"):
            return {}
        dp_size = shard.parallel.data_parallel_size
        phases = generate_phases(
            shard,
            self.build,
            requests=ceil_div(shape.requests, dp_size),
            prompts=ceil_div(shape.prompts, dp_size),
            prompt_length=shape.prompt_length,
            sampling=shape.sampling,
            rollout=self.config.rollout,
            records_routes=replays_routes(self.config, self.stage, self.spec),
        )
        return {"validation": max(phases.values(), key=lambda phase: sum(phase.values()))}

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

    def _frozen_models(self, shard: ModelShard) -> tuple[list[ResidentMemory], int]:
        """Return the frozen models on the device, and bytes of models that take turns there, in host memory."""
        resident, waiting = [], 0
        for role, stage, parallel in frozen_models(self.config, self.name):
            is_itself = role == "teacher" and getattr(self.stage, "teacher_renewal", None) is None
            if stage == self.name and (is_itself or self.build.lora is not None):  # the student itself
                continue
            if stage != self.name and self.config.shares_weights(self.name, stage):
                continue
            model = self.config.model_of(stage)
            shards = pipeline_shards(self.specs[model], parallel)
            if parallel == self.parallel:
                shards = [shards[shard.pp_rank]]
            fp8, values = self.config.fp8 is not None and self.config.fp8.frozen, self.build.bytes_per_value
            if role == "teacher" and getattr(self.stage, "teacher_ema_decay", None) and values < 4:
                values += 4  # averages in float32
            build = dataclasses.replace(self.build, recompute=NO_RECOMPUTE, fp8=fp8, lora=None, bytes_per_value=values)
            resident.append(
                max((frozen_memory(item, build, role, model) for item in shards), key=lambda one: one.total)
            )
        for role in ("teacher", "reference"):
            same_role = [memory for memory in resident if memory.role == role]
            is_offloaded = self.on_gpu and getattr(self.stage, "teacher_sampling", None) is None
            if len(same_role) > 1 and is_offloaded:  # one is on the device, the others in host memory
                resident = [memory for memory in resident if memory.role != role]
                resident.append(max(same_role, key=lambda memory: memory.total))
                waiting += sum(memory.total for memory in same_role)
        return resident, waiting

    def _teacher_inputs(self) -> TeacherInputs | None:
        stage = self.stage
        if isinstance(stage, ForwardKlConfig):
            cache = self.config.stages[stage.cache]
            kind = {"hidden_states": "hidden", "full_vocab": "logits", "top_k": "topk"}[cache.representation]
            spec = self.specs[self.config.model_of(stage.cache)]
            return TeacherInputs(kind, spec, top_k=cache.top_k, copies_output_layer=kind == "hidden")
        if not isinstance(stage, OpdConfig) or stage.kl_estimator == "sampled_token":
            return None
        if stage.teacher_service is not None:
            kind = "topk" if stage.kl_estimator == "top_k" else "hidden"
            spec = max(service_teachers(self.config, self.name, self.specs), key=lambda spec: spec.hidden_size)
            wide = stage.top_k * (2 if stage.top_k_source == "union" else 1)
            return TeacherInputs(kind, spec, top_k=wide, copies_output_layer=kind == "hidden")
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
        if isinstance(self.stage, GrpoConfig | OpdConfig) and self.stage.num_updates > 1:
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
                    sizes = (self.build.bytes_per_value, scorer.tp_size)
                    phases[f"{role} states travel"] = states_travel_phase(scorer_work, spec, *sizes)
            phase = score_phase(scorer, self.build, scorer_work, on_gpu=self.on_gpu, states=states)
            if getattr(self.stage, "kl_estimator", "") == "top_k" and shard.is_pipeline_last_stage:
                phase["support"] = top_k_selection_bytes(shard, spec)
            if sum(phase.values()) > sum(phases.get(role, {}).values()):
                phases[role] = phase
        return phases


def service_teachers(config: WorkflowConfig, name: str, specs: Mapping[str, ModelSpec]) -> list[ModelSpec]:
    """Return the served teachers of a stage; the student stands for one whose server does not answer."""
    stage, student = config.stages[name], specs[config.model_of(name)]
    return [specs.get(service_key(name, stage, domain), student) for domain in services_by_domain(services_of(stage))]


def frozen_models(config: WorkflowConfig, name: str) -> list[tuple[str, str, ParallelConfig]]:
    """Return (role, stage whose weights are loaded, layout) of every frozen model that stage ``name`` loads."""
    stage = config.stages[name]
    models = []
    if isinstance(stage, GrpoConfig) and stage.kl_loss_coef > 0:
        if stage.reference is None:  # the initial weights, loaded like the trained model
            models.append(("reference", name, config.parallel))
        else:
            models.append(("reference", stage.reference, config.frozen_parallel(stage.reference)))
    if isinstance(stage, GrpoConfig) and stage.teacher_advantage is not None:
        teachers = dict.fromkeys(stage.teacher_advantage.inputs().values())
        models += [("teacher", other, config.frozen_parallel(other)) for other in teachers]
    if isinstance(stage, OpdConfig):
        if stage.teaches_itself:  # nothing is loaded, but it computes like a teacher
            models.append(("teacher", name, config.parallel))
        for relation, other in stage.inputs().items():
            role = relation.partition(".")[0]
            model = (role, other, config.frozen_parallel(other))
            is_loaded = stage.teacher_engine != "sglang" if role == "teacher" else stage.needs_reference
            if role in ("teacher", "reference") and is_loaded and model not in models:
                models.append(model)
    return models
