"""What every stage function is given: configuration, directory, inputs, and how to build models from them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_s2d.artifacts.files import read_json
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.stages import Stage
from megatron_s2d.config.training import SamplingConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.cache import TeacherCache
from megatron_s2d.data.prompts import prompts_of
from megatron_s2d.data.tokenizer import load_tokenizer
from megatron_s2d.errors import UserError
from megatron_s2d.models.families import ModelSpec
from megatron_s2d.models.hf_checkpoint import HfCheckpoint
from megatron_s2d.models.weights import import_weights
from megatron_s2d.parallel.layout import Layout, build_layout
from megatron_s2d.records import Prompt
from megatron_s2d.rollout.engine import RolloutEngine, SamplingParams
from megatron_s2d.rollout.megatron.engine import MegatronEngine
from megatron_s2d.rollout.sampler import PromptDataLoader, RolloutBuffer, RolloutWorker
from megatron_s2d.rollout.served.engine import ServedEngine
from megatron_s2d.rollout.served.server_group import ServerGroup
from megatron_s2d.rollout.sglang.checks import ServerRequirements
from megatron_s2d.teachers.cached import open_cache
from megatron_s2d.train.loop import LoopSettings
from megatron_s2d.train.policy import MegatronModel


@dataclasses.dataclass(frozen=True, eq=False)
class StageContext:
    """One stage (or evaluation) on this rank."""

    config: WorkflowConfig
    name: str
    directory: StageDirectory  # where the stage writes
    inputs: dict[str, StageDirectory]  # name of a stage -> its finished directory
    layout: Layout
    tokenizer_cache: Path
    stop: Callable[[], bool] = lambda: False
    _other_layouts: dict[ParallelConfig, Layout] = dataclasses.field(default_factory=dict)
    _engines: list[tuple[str, RolloutEngine]] = dataclasses.field(default_factory=list)

    @property
    def stage(self) -> Stage:
        """The stage's own configuration."""
        return self.config.stages[self.name]

    @property
    def seed(self) -> int:
        """Seed of everything the stage draws; stages with equal offsets share their noise."""
        return self.config.seed * 1_000_003 + self.stage.seed

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The workflow's tokenizer."""
        return load_tokenizer(self.config.tokenizer, self.tokenizer_cache)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this rank writes files."""
        return dist.get_rank() == 0

    def prompts(self, name: str) -> list[Prompt]:
        """The prompts of ``entry``, ``entry/1H`` or ``entry/2H``."""
        return prompts_of(self.config, name, self.tokenizer).prompts

    def settings(self) -> LoopSettings:
        """How the loop runs this stage."""
        tensorboard = self.directory.path / "tensorboard" if self.config.tensorboard else None
        max_kl = self.config.rollout.max_mismatch_kl
        return LoopSettings(self.stage.steps, self.stage.checkpoint, self.stop, tensorboard, max_mismatch_kl=max_kl)

    def spec(self, model_name: str) -> ModelSpec:
        """The architecture of an entry of ``models``."""
        return self.config.models[model_name].resolve(len(self.tokenizer))

    def model_directory(self, stage_name: str) -> Path:
        """The final weights of a finished stage."""
        return self.inputs[stage_name].model_path

    def start_policy(self, *, beta: float | None = None, trained: bool = True) -> MegatronModel:
        """The model that the stage trains, with its starting weights, not yet prepared for training."""
        stage = self.stage
        if stage.init is not None:
            return self.policy_of(stage.init, beta=beta, trained=trained)
        return self.fresh_policy(stage.model, beta=beta, trained=trained)

    def fresh_policy(self, model_name: str, *, beta: float | None = None, trained: bool = False) -> MegatronModel:
        """An entry of ``models`` with its own weights: those of its ``path``, or drawn with the stage's seed."""
        return self._policy(model_name, fresh=True, beta=beta, trained=trained)

    def policy_of(
        self, stage_name: str, *, beta: float | None = None, layout: Layout | None = None, trained: bool = False
    ) -> MegatronModel:
        """The model that a finished stage left."""
        policy = self._policy(self.config.model_of(stage_name), fresh=False, beta=beta, layout=layout, trained=trained)
        policy.load(self.model_directory(stage_name))
        return policy

    def save_model(self, policy: MegatronModel) -> None:
        """Write the stage's final weights, unless a run that was killed right afterwards has done so; collective."""
        if not self.directory.model_path.exists():
            policy.save(self.directory.model_path, {"stage": self.name}, with_optimizer=False)

    def frozen(self, stage_name: str) -> MegatronModel:
        """``policy_of`` without gradients, at the layout of teachers: a teacher or a reference."""
        policy = self.policy_of(stage_name, layout=self._layout_of(self.config.frozen_parallel(stage_name)))
        policy.freeze()
        return policy

    def engine(self, policy: MegatronModel, model_name: str, params: SamplingParams) -> RolloutEngine:
        """The engine that generates with the weights of ``policy``, an entry of ``models``, by ``params``; collective.

        It holds the weights as they are now, and later ones after ``push``. ``close`` ends it.
        """
        rollout = self.config.rollout
        if rollout.engine == "sglang":
            return self.served(policy, model_name, ServerRequirements(self._longest(policy, params), params=params))
        return MegatronEngine(
            policy.chunks,
            policy.spec.vocab_size,
            policy.layout,
            tokenizer=self.tokenizer,
            max_batch_size=rollout.max_batch_size,
            max_batch_tokens=rollout.max_batch_tokens,
        )

    def served_teacher(
        self, policy: MegatronModel, model_name: str, params: SamplingParams, top_k: int
    ) -> ServedEngine:
        """Servers that score responses by ``params`` with the weights of ``policy``, which waits in host memory.

        top_k: how many likeliest tokens will be asked for at each token; 0 for none.
        """
        needs = ServerRequirements(self._longest(policy, params), top_k=top_k)
        return self.served(policy, model_name, needs, release=True)

    def _longest(self, policy: MegatronModel, params: SamplingParams) -> int:
        """Tokens of the longest prompt with the longest response."""
        longest = self.config.lengths.max_prompt_length + params.max_new_tokens
        return min(longest, policy.spec.max_position_embeddings)

    def served(
        self, policy: MegatronModel, model_name: str, needs: ServerRequirements, *, release: bool = False
    ) -> ServedEngine:
        """SGLang servers with the weights of ``policy``, started or attached to as the configuration says.

        release: the policy itself waits in host memory whenever nothing is pushed.
        """
        rollout = self.config.rollout
        urls = rollout.sglang.urls.get(model_name, ())
        if urls and any(name == model_name for name, _ in self._engines):
            raise UserError(
                f"stage {self.name} needs servers for two sets of weights of the model '{model_name}', and those of "
                "rollout.sglang.urls hold one: leave the model out there to have servers started"
            )
        directory = self.directory.path / "sglang" / f"{len(self._engines)}-{model_name}"
        fleet = ServerGroup(
            policy.chunks,
            policy.spec,
            policy.layout,
            policy.score,
            rollout,
            directory,
            urls=urls,
            needs=needs,
            tokenizer=self.tokenizer,
            on_device=functools.partial(policy.on_device, release=release),
        )
        engine = ServedEngine(fleet)
        self._engines.append((model_name, engine))
        return engine

    def rounds(
        self,
        stream: PromptDataLoader,
        sampler: RolloutWorker,
        train_batch_size: int | None = None,
        *,
        announces: bool = True,
    ) -> RolloutBuffer:
        """What the stage's steps train on; see ``RolloutBuffer``. train_batch_size: None for those of the stage."""
        stage, rollout = self.stage, self.config.rollout
        return RolloutBuffer(
            stream,
            sampler,
            stage.train_batch_size if train_batch_size is None else train_batch_size,
            stage.num_generations,
            stage.steps,
            rollout.over_sampling_ratio,
            announces,
        )

    def close(self) -> None:
        """End the engines, and with them the servers that they started."""
        while self._engines:
            self._engines.pop()[1].close()

    def open_cache(self, stage_name: str) -> TeacherCache:
        """The cache that the finished stage ``stage_name`` left; ``UserError`` where it does not belong to this run."""
        directory = self.inputs[stage_name]
        teacher = StageDirectory(directory.path.with_name(self.config.stages[stage_name].teacher))
        return open_cache(directory, teacher, self.tokenizer)

    def sampling(self, sampling: SamplingConfig, model_name: str) -> SamplingParams:
        """Parameters for the engine, with the stop tokens of tokenizer and model."""
        return SamplingParams(
            max_new_tokens=sampling.max_response_length,
            stop_token_ids=stop_token_ids(self.tokenizer, self.config.models[model_name].path),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_strings=tuple(sampling.stop_strings),
        )

    def _layout_of(self, config: ParallelConfig) -> Layout:
        """The layout of ``config``, built once; collective."""
        if config == self.layout.config:
            return self.layout
        if config not in self._other_layouts:
            self._other_layouts[config] = build_layout(config)
        return self._other_layouts[config]

    def _policy(
        self, model_name: str, *, fresh: bool, beta: float | None, trained: bool, layout: Layout | None = None
    ) -> MegatronModel:
        model, fp8 = self.config.models[model_name], self.config.fp8
        if fp8 is not None and not trained:
            # Weights in bfloat16 serve saving and moving to the host as they are.
            fp8 = fp8.model_copy(update={"parameters": False}) if fp8.frozen else None
        policy = MegatronModel(
            self.spec(model_name),
            layout or self.layout,
            precision=self.config.precision,
            max_tokens=self.stage.micro_batch.max_tokens_per_gpu,
            packed=self.stage.micro_batch.sequence_packing,
            seed=self.seed if fresh and model.path is None else None,
            options=model,
            beta=beta,
            fp8=fp8,
        )
        if fresh and model.path is not None:
            source = HfCheckpoint(model.path)
            if self.is_rank_zero:
                source.verify_digests()
            import_weights(policy.chunks, policy.spec, policy.layout, source)
        return policy


def stop_token_ids(tokenizer: Any, model_path: Path | None) -> tuple[int, ...]:
    """The tokenizer's end of sequence, and the ends that the generation_config.json of a published model names."""
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    if model_path is not None and (model_path / "generation_config.json").exists():
        named = read_json(model_path / "generation_config.json").get("eos_token_id")
        ids.update([named] if isinstance(named, int) else named or [])
    if not ids:
        raise UserError("the tokenizer has no end-of-sequence token: responses could not end; use another tokenizer")
    return tuple(sorted(ids))
