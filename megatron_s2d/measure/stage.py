"""Runs a stage of a workflow for two steps on one rank, with weights and responses that are made up.

The stage's own function runs, so every model, loss, teacher and engine is the real one. Weights are not loaded, every
prompt and response has the length that ``s2d plan`` counts with. Of a response only the first tokens are decoded, and
an update has only as many responses as ``limits.py`` leaves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_s2d.arithmetic import ceil_div
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.teacher_service import TeacherServiceConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.packing import MicroBatch
from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.errors import UserError
from megatron_s2d.estimate.stage_memory import StageShape
from megatron_s2d.measure import single_rank
from megatron_s2d.measure.limits import Limits, shortened
from megatron_s2d.measure.made_up_cache import MadeUpCache, write_output_layer
from megatron_s2d.measure.made_up_service import MadeUpTeacherClient
from megatron_s2d.measure.measurement import Measurement
from megatron_s2d.measure.recorder import Recorder
from megatron_s2d.models.weights import export_buckets
from megatron_s2d.parallel import device
from megatron_s2d.parallel.layout import Layout, build_layout
from megatron_s2d.records import Sample
from megatron_s2d.rollout.engine import ProgressCallback, Request, RolloutEngine, SamplingParams, sample_of
from megatron_s2d.rollout.megatron.engine import MegatronEngine
from megatron_s2d.stages.context import StageContext
from megatron_s2d.stages.inputs import StageInputs
from megatron_s2d.stages.model_factory import ModelFactory
from megatron_s2d.stages.registry import STAGES
from megatron_s2d.stages.rollout_factory import RolloutFactory
from megatron_s2d.stages.teacher_cache import OUTPUT_LAYER_NAME
from megatron_s2d.train.megatron_model import DTYPES, MegatronModel

_MEASURED = (
    "prepare_training", "forward_backward", "optim_step", "load", "score", "hidden_states", "start_saving",
    "_forward_only",
)  # fmt: skip
_MOST_PROMPTS = 1 << 16  # that are made up; a stage's steps read fewer


def run_stage(
    config: WorkflowConfig, name: str, shape: StageShape, recorder: Recorder, limits: Limits, directory: Path
) -> Measurement:
    """Run stage ``name`` on this rank, whose process groups exist; ``directory`` is empty."""
    layout = build_layout(config.parallel)
    full_shape = shape
    config, shape = shortened(config, name, shape, limits)
    stage_directory = StageDirectory(directory / "stages" / name)
    stage_directory.path.mkdir(parents=True)
    context_class = StageContext if limits.saves else UnsavedContext
    context = context_class.create(
        config, name, directory=stage_directory, inputs={}, layout=layout, tokenizer_cache=directory / "tokenizer"
    )
    made_up = directory / "inputs"
    directories = {other: StageDirectory(made_up / other) for other in config.stages}
    inputs = MadeUpInputs(config, directories, directory / "tokenizer", name, shape=shape, made_up=made_up)
    models = UnloadedModels(config, name, context.seed, layout, inputs, recorder, limits)
    rollouts = ShortRollouts(config, name, stage_directory.path, inputs, full_shape, recorder, limits)
    context = dataclasses.replace(context, inputs=inputs, models=models, rollouts=rollouts)
    try:
        with context:
            STAGES[context.stage.type](context)
        if limits.saves:
            models.trained.load(stage_directory.checkpoints()[-1], with_optimizer=True)
    except torch.OutOfMemoryError:
        if recorder.out_of_memory is None:
            raise
    return Measurement(
        stage=name,
        rank=torch.distributed.get_rank(),
        world_size=config.parallel.world_size,
        coordinates={"tp": layout.tp_rank, "pp": layout.pp_rank, "cp": layout.cp_rank, "dp": layout.dp_rank},
        num_parameters=models.num_trained_parameters,
        device_bytes=torch.cuda.get_device_properties(0).total_memory,
        transformer_engine=device.capabilities().transformer_engine,
        calls=tuple(recorder.calls),
        out_of_memory=recorder.out_of_memory,
    )


class UnsavedContext(StageContext):
    """A stage that leaves no weights."""

    def save_model(self, model: MegatronModel) -> None:
        """Do nothing."""


# -------------------------------------------------------------------------------- inputs


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MadeUpInputs(StageInputs):
    """Prompts as long as the longest one, and solutions as long as the longest one."""

    shape: StageShape
    made_up: Path  # where files are written that stages read

    def prompts(self, name: str) -> PromptTable:
        """Return the (first) prompts of an entry, their tokens repeated up to the longest length."""
        prompts = super().prompts(name)[:_MOST_PROMPTS]
        has_solutions = bool(prompts.has_solution.all())
        long = [
            dataclasses.replace(
                prompt,
                token_ids=np.resize(prompt.token_ids, self.shape.prompt_length),
                solution_token_ids=(
                    np.resize(prompt.solution_token_ids, self.shape.response_length) if has_solutions else None
                ),
            )
            for prompt in prompts
        ]
        return PromptTable.of(long)

    def model_path(self, stage_name: str) -> Path:
        """Return a folder with nothing of the weights, which are not loaded."""
        path = self.made_up / stage_name / "model"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def teacher_cache(self, stage_name: str) -> MadeUpCache:
        """Return a cache of the responses of an update, and write its output layer where the stage looks for it."""
        stage = self.config.stages[stage_name]
        spec = self.config.models[self.config.model_of(stage_name)].resolve(len(self.tokenizer))
        dtype = DTYPES[self.config.precision]
        if stage.representation == "hidden_states":
            self.directories[stage_name].path.mkdir(parents=True, exist_ok=True)
            write_output_layer(self.directories[stage_name].path / OUTPUT_LAYER_NAME, spec, dtype)
        domain = super().prompts(stage.prompts)[0].domain
        return MadeUpCache.of(stage, spec, self.shape, domain, dtype)

    def teacher_client(self, settings: TeacherServiceConfig, where: str) -> MadeUpTeacherClient:
        """Return a client that asks no server, for a teacher of the student's architecture: as a plan without one."""
        tokenizer = self.named_tokenizer(settings.tokenizer) if settings.cross_tokenizer else self.tokenizer
        spec = self.config.models[self.config.model_of(self.stage_name)].resolve(len(tokenizer))
        return MadeUpTeacherClient(settings, where, spec, self.config.precision, tokenizer)


# -------------------------------------------------------------------------------- models


class UnloadedModels(ModelFactory):
    """Models with uninitialised weights, whose calls are phases."""

    def __init__(
        self,
        config: WorkflowConfig,
        stage_name: str,
        seed: int,
        layout: Layout,
        inputs: StageInputs,
        recorder: Recorder,
        limits: Limits,
    ):
        super().__init__(config, stage_name, seed, layout, inputs)
        self.trained: MegatronModel | None = None
        self._recorder, self._limits = recorder, limits
        self._roles = {other: relation.partition(".")[0] for relation, other in self._stage.inputs().items()}

    def fresh(self, model_name: str, *, beta: float | None = None, trained: bool = False) -> MegatronModel:
        """Return an entry of ``models``."""
        return self._measured(self._build_in_phase(model_name, self._layout, beta, trained), trained, "reference")

    def of_stage(
        self, stage_name: str, *, beta: float | None = None, layout: Layout | None = None, trained: bool = False
    ) -> MegatronModel:
        """Return the model that a stage would leave."""
        model = self._build_in_phase(self._config.model_of(stage_name), layout or self._layout, beta, trained)
        role = self._roles.get(stage_name, "reference")
        return self._measured(model, trained, "reference" if role == "init" else role)

    def _base(self, relation: str) -> MegatronModel:
        """Return the trained model without its adapter, whose calls are those of the role."""
        base = super()._base(relation)
        for name in _MEASURED:
            vars(base).pop(name, None)  # of the trained model
        role = relation.partition(".")[0]
        return self._measured(base, False, "reference" if role == "init" else role)

    @property
    def num_trained_parameters(self) -> int:
        """Parameters of the trained model on this rank; 0 before it is built."""
        chunks = [] if self.trained is None else self.trained.chunks
        return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())

    def _build_in_phase(self, model_name: str, layout: Layout, beta: float | None, trained: bool) -> MegatronModel:
        with self._recorder.phase("build"):
            return self._build(model_name, layout, seed=None, beta=beta, trained=trained)

    def _measured(self, model: MegatronModel, trained: bool, role: str) -> MegatronModel:
        """Make the calls of ``model`` phases; a frozen model's forward passes are the phase of its role."""
        recorder = self._recorder
        phases = {"prepare_training": "build", "forward_backward": "train", "optim_step": "update", "load": "load"}
        phases |= {"score": "score" if trained else role, "hidden_states": "score" if trained else role}
        if self._limits.saves:
            phases["start_saving"] = "save"
        else:
            model.start_saving = _NoSave
        model.forward_backward = _announced(model, model.forward_backward, recorder, lambda batches: batches)
        model._forward_only = _announced(
            model, model._forward_only, recorder, lambda passes: [item.batch for item in passes]
        )
        for method, phase in phases.items():
            setattr(model, method, recorder.wrap(phase, getattr(model, method)))
        if trained:
            self.trained = model
            model.optim_step = _then(model.optim_step, functools.partial(_next_step, recorder))
        return model


def _announced[R](
    model: MegatronModel,
    function: Callable[..., R],
    recorder: Recorder,
    batches_of: Callable[[Any], Sequence[MicroBatch]],
) -> Callable[..., R]:
    """Return ``function``, which runs the micro-batches of its first argument, preceded by their number and shapes."""

    def announced(first: Any, *args: Any, **kwargs: Any) -> R:
        batches = batches_of(first)
        recorder.count_micro_batches(len(batches))
        single_rank.expect_micro_batches(batches, model.layout, model.spec.hidden_size)
        return function(first, *args, **kwargs)

    return announced


def _then[**P, R](function: Callable[P, R], action: Callable[[], None]) -> Callable[P, R]:
    def both(*args: P.args, **kwargs: P.kwargs) -> R:
        result = function(*args, **kwargs)
        action()
        return result

    return both


def _next_step(recorder: Recorder) -> None:
    recorder.step += 1


class _NoSave:
    """Stands for a checkpoint that is not written."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def finish(self) -> None:
        pass

    def is_written(self) -> bool:
        return True


# -------------------------------------------------------------------------------- rollouts


class ShortRollouts(RolloutFactory):
    """Engines that decode the first tokens only and make up the others."""

    def __init__(
        self,
        config: WorkflowConfig,
        stage_name: str,
        directory: Path,
        inputs: StageInputs,
        shape: StageShape,
        recorder: Recorder,
        limits: Limits,
    ):
        """shape: of the full step, whose responses are all generated."""
        super().__init__(config, stage_name, directory, inputs)
        self._shape, self._recorder, self._limits = shape, recorder, limits

    def engine(self, model: MegatronModel, model_name: str, params: SamplingParams) -> RolloutEngine:
        """Return the in-process engine for the first tokens; for servers one that only exports weights."""
        rollout = self._config.rollout
        inner = None
        if rollout.engine == "megatron":
            length = self._shape.prompt_length + params.max_new_tokens
            inner = MegatronEngine(
                model.chunks,
                model.spec.vocab_size,
                model.layout,
                tokenizer=self._inputs.tokenizer,
                max_batch_size=max(1, min(rollout.max_batch_size, rollout.max_batch_tokens // length)),
                max_batch_tokens=2**62,
                routing_replay=model.routing_replay,
                enforce_eager=rollout.enforce_eager,
            )
        bucket_bytes = rollout.sglang.bucket_bytes
        return ShortEngine(model, inner, self._recorder, self._shape, self._limits.decoded_tokens, bucket_bytes)

    def served_teacher(self, *args: Any, **kwargs: Any) -> Any:
        """Raise ``UserError``: servers run outside of the rank."""
        raise UserError("measure: teacher_engine sglang is not measured, because servers score outside of the trainer")


class ShortEngine:
    """A ``RolloutEngine`` whose responses have all tokens, of which the first were decoded by ``inner``."""

    def __init__(
        self,
        model: MegatronModel,
        inner: MegatronEngine | None,
        recorder: Recorder,
        shape: StageShape,
        decoded_tokens: int,
        bucket_bytes: int,
    ):
        self.version, self._bucket_bytes = 0, bucket_bytes
        self._model, self._inner, self._recorder = model, inner, recorder
        self._shape, self._decoded = shape, decoded_tokens
        self._random = np.random.default_rng(0)
        if inner is not None:
            inner._passes.prefill = recorder.wrap("prefill", inner._passes.prefill)

    def generate(self, requests: Sequence[Request], progress: ProgressCallback | None = None) -> list[Sample]:
        """Return one sample per request, of the longest length."""
        if self._inner is not None and requests:
            with self._recorder.phase("decode"):
                self._inner.generate(self._full_step(requests[0]))
        return [self._sample(request) for request in requests]

    def _full_step(self, like: Request) -> list[Request]:
        """Return this data-parallel rank's requests of a full step, each for a few tokens."""
        dp_size = self._model.layout.dp_size
        num_prompts, count = ceil_div(self._shape.prompts, dp_size), ceil_div(self._shape.requests, dp_size)
        tokens = min(self._decoded, like.params.max_new_tokens)
        params = dataclasses.replace(like.params, max_new_tokens=tokens, stop_token_ids=())
        size = (num_prompts, self._shape.prompt_length)
        prompts = [
            dataclasses.replace(like.prompt, id=f"measured-{index}", token_ids=token_ids)
            for index, token_ids in enumerate(self._random.integers(0, self._model.spec.vocab_size, size))
        ]
        return [
            Request(f"{prompt.id}#{index}", prompt, prompt.id, index, params)
            for index, prompt in enumerate(prompts[index * num_prompts // count] for index in range(count))
        ]

    def _sample(self, request: Request) -> Sample:
        count = request.params.max_new_tokens
        tokens = self._random.integers(0, self._model.spec.vocab_size, count)
        log_probs = np.full(count, -1.0, np.float32)
        routes = self._routes(len(request.prompt.token_ids) + count - 1)
        return sample_of(request, tokens, log_probs, "length", self.version, routes)

    def _routes(self, num_tokens: int) -> np.ndarray | None:
        """Return experts for each token and layer, different ones; None without routing replay."""
        if self._model.routing_replay is None:
            return None
        spec = self._model.spec
        first = self._random.integers(0, spec.num_experts, (num_tokens, spec.num_layers, 1))
        experts = (first + np.arange(spec.num_experts_per_tok)) % spec.num_experts
        return experts.astype(spec.expert_index_dtype)

    def update_weights(self, chunks: Sequence[Any], version: int) -> None:
        """Export the weights as servers get them, bucket by bucket; the in-process engine needs nothing."""
        self.version = version
        if self._inner is None:
            with self._recorder.phase("export"):
                spec, layout = self._model.spec, self._model.layout
                for _ in export_buckets(chunks, spec, layout, bucket_bytes=self._bucket_bytes):
                    pass

    def sleep(self) -> None:
        """Do nothing."""

    def metrics(self) -> Mapping[str, float]:
        """Return nothing."""
        return {}

    def close(self) -> None:
        """Do nothing."""
