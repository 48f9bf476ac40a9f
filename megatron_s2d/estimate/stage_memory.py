"""What a stage of a workflow needs of one rank: its shape (responses, lengths), and from that its memory.

The shape is the worst case that the settings allow: every response as long as ``sampling.max_response_length``, every
prompt as long as the longest. Memory of the host and of a server beside the trainer are left out. No torch here.
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
from megatron_s2d.estimate.layers import Build, Part, parts
from megatron_s2d.estimate.memory import (
    ResidentMemory,
    StageMemory,
    TeacherInputs,
    Workload,
    frozen,
    generate_phases,
    lazy_hidden_states,
    score_phase,
    support_bytes,
    train_phase,
    trained,
    update_phase,
    workload,
)
from megatron_s2d.records import Prompt

BYTES = {"float32": 4, "bfloat16": 2}
_DOCUMENTS = 64  # of a generated corpus that are looked at for its length


@dataclasses.dataclass(frozen=True)
class StageShape:
    """Sizes of a stage over all data ranks."""

    responses: int  # of one update; 0 where nothing is trained
    updates: int  # of one step
    requests: int  # responses sampled in one step (or round of a cache); 0 where none
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
    """The shape of a stage; ``prompts`` as in ``Preflight``."""
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
    """The pipeline rank that needs most while stage ``name`` runs; on a GPU with Transformer Engine's layers."""
    estimate = _Stage(config, name, specs, shape, on_gpu)
    found = [estimate.of(part) for part in parts(estimate.spec, estimate.parallel)]
    return max(found, key=lambda memory: memory.total)


@dataclasses.dataclass(frozen=True)
class _Stage:
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
        return Build(BYTES[self.config.precision], self.on_gpu, self.config.models[self.model].recompute)

    def of(self, part: Part) -> StageMemory:
        """Memory on the ranks of one pipeline stage."""
        if isinstance(self.stage, ExpoConfig):
            weights = frozen(part, self.build, "student", self.model)
            tuned = frozen(part, self.build, "tuned", self.model, copies=min(2, len(self.stage.tuned)))
            return StageMemory(part.stage, (weights, tuned), {"average": {"float32 sums": 4 * part.parameters}})
        if isinstance(self.stage, LoadCheckpointConfig):
            return StageMemory(part.stage, (frozen(part, self.build, "student", self.model),), {"load": {}})
        if isinstance(self.stage, TeacherCacheConfig):
            phases = self._generation(part) | {"score": self._cached(part)}
            return StageMemory(part.stage, (frozen(part, self.build, "teacher", self.model),), phases)
        work = self._workload()
        teacher = self._teacher_states()
        phases = self._generation(part) | self._scores(part, work)
        phases["train"] = train_phase(part, self.build, work, on_gpu=self.on_gpu, teacher=teacher)
        phases["update"] = update_phase(part, self.build, on_gpu=self.on_gpu)
        fp8 = self.config.fp8
        copies = fp8 is not None and not fp8.parameters  # without, both directions take the bfloat16 weights' place
        student = trained(part, dataclasses.replace(self.build, fp8=copies), self.model)
        if self.stage.offload_optimizer:  # there only while they are used
            phases["train"]["gradients"] = student.gradients
            phases["update"] |= {"gradients": student.gradients, "optimizer": student.optimizer}
            student = dataclasses.replace(student, gradients=0, optimizer=0)
        return StageMemory(part.stage, (student, *self._frozen_models(part)), phases)

    def _workload(self, responses: int | None = None, parallel=None) -> Workload:
        shape = self.shape
        return workload(
            shape.responses if responses is None else responses,
            shape.length,
            shape.response_length,
            max_tokens=self.stage.micro_batch.max_tokens_per_gpu,
            parallel=parallel or self.parallel,
        )

    def _generation(self, part: Part) -> dict[str, dict[str, int]]:
        if not self.shape.requests or self.config.rollout.engine != "megatron":  # a server's memory is its own
            return {}
        data = part.parallel.data_parallel_size
        return generate_phases(
            part,
            self.build,
            requests=ceil_div(self.shape.requests, data),
            prompts=ceil_div(self.shape.prompts, data),
            prompt_length=self.shape.prompt_length,
            sampling=self.stage.sampling,
            rollout=self.config.rollout,
        )

    def _cached(self, part: Part) -> dict[str, int]:
        """Scoring of a round's responses for a cache: all hidden states are there at once."""
        work = self._workload(self.shape.requests)
        states = None
        if self.stage.representation != "sampled_token" and part.is_last:
            states = work.tokens * self.spec.hidden_size * self.build.bytes_per_value // part.sequence_shards
        found = score_phase(part, self.build, work, on_gpu=self.on_gpu, states=states)
        if self.stage.representation in ("full_vocab", "top_k") and part.is_last:
            found["logits"] = self.shape.response_length * part.vocabulary * 4 * (2 + part.tensor)
        return found

    def _frozen_models(self, part: Part) -> list[ResidentMemory]:
        found = []
        for role, other, parallel in frozen_roles(self.config, self.name):
            spec = self.specs[self.config.model_of(other)]
            candidates = parts(spec, parallel)
            if parallel == self.parallel:
                candidates = [candidates[part.stage]]
            fp8 = self.config.fp8 is not None and self.config.fp8.frozen
            build = dataclasses.replace(self.build, recompute="none", fp8=fp8)
            model = self.config.model_of(other)
            found.append(max((frozen(item, build, role, model) for item in candidates), key=lambda held: held.total))
        for role in ("teacher", "reference"):
            alike = [held for held in found if held.role == role]
            waits = self.on_gpu and getattr(self.stage, "teacher_sampling", None) is None
            if len(alike) > 1 and waits:  # those that wait are in host memory
                found = [held for held in found if held.role != role]
                found.append(max(alike, key=lambda held: held.total))
        return found

    def _teacher_states(self) -> TeacherInputs | None:
        stage = self.stage
        if isinstance(stage, ForwardKlConfig):
            cache = self.config.stages[stage.cache]
            kind = {"hidden_states": "hidden", "full_vocab": "logits", "top_k": "topk"}[cache.representation]
            spec = self.specs[self.config.model_of(stage.cache)]
            return TeacherInputs(kind, spec, top_k=cache.top_k, own_copy=kind == "hidden")
        if not isinstance(stage, OpdConfig) or stage.kl_estimator == "sampled_token":
            return None
        models = frozen_roles(self.config, self.name)
        parallel = next(layout for role, _, layout in models if role == "teacher")
        return TeacherInputs(
            "topk" if stage.kl_estimator == "top_k" else "hidden",
            max((self.specs[self.config.model_of(other)] for _, other, _ in models), key=lambda spec: spec.hidden_size),
            sources=2 if stage.reward_scale != 1.0 else 1,
            top_k=stage.top_k * (2 if stage.top_k_source == "union" else 1),
            own_copy=parallel != self.parallel,
        )

    def _scores(self, part: Part, work: Workload) -> dict[str, dict[str, int]]:
        """Forward passes of frozen models (and of the student, where old log-probabilities are asked for)."""
        found = {}
        if self._rescoring():
            found["score"] = score_phase(part, self.build, work, on_gpu=self.on_gpu)
        for role, other, parallel in frozen_roles(self.config, self.name):
            spec = self.specs[self.config.model_of(other)]
            candidates = parts(spec, parallel)
            own = candidates[part.stage] if parallel == self.parallel else candidates[-1]
            at = self._workload(parallel=parallel)
            states = None
            if self._teacher_states() is not None and own.is_last:
                states = lazy_hidden_states(own, self.build, at, spec, on_gpu=self.on_gpu)
                if parallel != self.parallel:
                    states += 2 * P2P_BUCKET_BYTES
            phase = score_phase(own, self.build, at, on_gpu=self.on_gpu, states=states)
            if getattr(self.stage, "kl_estimator", "") == "top_k" and part.is_last:
                phase["support"] = support_bytes(part, spec)
            if sum(phase.values()) > sum(found.get(role, {}).values()):
                found[role] = phase
        return found

    def _rescoring(self) -> bool:
        stage = self.stage
        return isinstance(stage, TrainingStageConfig) and getattr(stage, "num_mini_batches", 1) > 1


def frozen_roles(config: WorkflowConfig, name: str) -> list[tuple[str, str, ParallelConfig]]:
    """(role, stage whose weights serve, layout) of every frozen model that stage ``name`` loads."""
    stage = config.stages[name]
    found = []
    if isinstance(stage, GrpoConfig) and stage.kl_loss_coef > 0:
        if stage.reference is None:  # its own start, loaded like the trained model
            found.append(("reference", name, config.parallel))
        else:
            found.append(("reference", stage.reference, config.frozen_parallel(stage.reference)))
    if isinstance(stage, OpdConfig):
        for relation, other in stage.inputs().items():
            role = relation.partition(".")[0]
            place = (role, other, config.frozen_parallel(other))
            if role == "teacher" and stage.teacher_engine == "sglang":
                continue
            if (role == "teacher" or (role == "reference" and stage.needs_reference)) and place not in found:
                found.append(place)
    return found
