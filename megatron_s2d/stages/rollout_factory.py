"""Builds rollout engines, SGLang servers and the rollout buffer of a stage."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_s2d.config.training import SamplingConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.tokenizer import stop_token_ids
from megatron_s2d.errors import UserError
from megatron_s2d.rollout.buffer import BufferPolicy, RolloutBuffer
from megatron_s2d.rollout.engine import RolloutEngine, SamplingParams
from megatron_s2d.rollout.environments.manager import EnvironmentManager
from megatron_s2d.rollout.group_filters import GroupFilter
from megatron_s2d.rollout.megatron.engine import MegatronEngine
from megatron_s2d.rollout.sampler import PromptDataLoader, RolloutWorker
from megatron_s2d.rollout.served.backend import ServerRequirements
from megatron_s2d.rollout.served.engine import ServedEngine
from megatron_s2d.rollout.sglang.backend import sglang_server_group
from megatron_s2d.rollout.sglang.memory_fraction import ServerMemory
from megatron_s2d.stages.inputs import StageInputs
from megatron_s2d.train.megatron_model import MegatronModel
from megatron_s2d.verify import RewardManager


class Closable(Protocol):
    """What has threads or connections."""

    def close(self) -> None: ...


class ServerRegistry:
    """The served engines of a stage, by the model whose weights they hold."""

    def __init__(self, directory: Path):
        """directory: where servers write their logs."""
        self._directory = directory
        self._engines: list[tuple[str, ServedEngine]] = []

    def has_model(self, model_name: str) -> bool:
        """Return whether an engine holds weights of ``model_name``."""
        return any(name == model_name for name, _ in self._engines)

    def next_directory(self, model_name: str) -> Path:
        """Return the directory of the next engine to be added."""
        return self._directory / f"{len(self._engines)}-{model_name}"

    def add(self, model_name: str, engine: ServedEngine) -> None:
        """Close ``engine`` with the registry."""
        self._engines.append((model_name, engine))

    def close(self) -> None:
        """Close the engines, the last one first, and with them the servers that they started."""
        while self._engines:
            self._engines.pop()[1].close()


class RolloutFactory:
    """Engines and sampling parameters as the workflow's ``rollout`` section says."""

    def __init__(self, config: WorkflowConfig, stage_name: str, directory: Path, inputs: StageInputs):
        """directory: of the stage."""
        self._config, self._stage_name, self._inputs = config, stage_name, inputs
        self._servers = ServerRegistry(directory / "sglang")
        self._server_memory: dict[str, ServerMemory] = {}
        self._environments: list[EnvironmentManager] = []
        self._others: list[Closable] = []

    def close_with(self, other: Closable) -> None:
        """Close ``other`` with the engines."""
        self._others.append(other)

    def limit_servers(self, memory: Sequence[ServerMemory]) -> None:
        """Start servers of these models with no more than their share of the GPUs; others leave it to SGLang."""
        self._server_memory = {item.model: item for item in memory}

    def sampling_params(self, sampling: SamplingConfig, model_name: str) -> SamplingParams:
        """Return the engine's parameters, with the stop tokens of tokenizer and model."""
        return SamplingParams(
            max_new_tokens=sampling.max_response_length,
            stop_token_ids=stop_token_ids(self._inputs.tokenizer_of(model_name), self._config.models[model_name].path),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_strings=tuple(sampling.stop_strings),
        )

    def engine(
        self, model: MegatronModel, model_name: str, params: SamplingParams, *, longest_prompt: int = 0
    ) -> RolloutEngine:
        """Return the engine that generates with the weights of ``model``, an entry of ``models``; collective.

        longest_prompt: tokens of one, if it may be longer than ``lengths.max_prompt_length``. The engine
        holds the weights as they are now, and later ones after ``update_weights``.
        """
        rollout = self._config.rollout
        if rollout.engine == "sglang":
            requirements = ServerRequirements(
                self._max_length(model, params, longest_prompt),
                params=params,
                routed_experts=model.routing_replay is not None,
            )
            return self._serve(model, model_name, requirements)
        return self.in_process_engine(model, model_name)

    def in_process_engine(self, model: MegatronModel, model_name: str) -> RolloutEngine:
        """Return the engine that generates in this process, whatever ``rollout.engine`` is."""
        rollout = self._config.rollout
        return MegatronEngine(
            model.chunks,
            model.spec.vocab_size,
            model.layout,
            tokenizer=self._inputs.tokenizer_of(model_name),
            max_batch_size=rollout.max_batch_size,
            max_batch_tokens=rollout.max_batch_tokens,
            routing_replay=model.routing_replay,
            enforce_eager=rollout.enforce_eager,
        )

    def served_teacher(
        self, teacher: MegatronModel, model_name: str, params: SamplingParams, top_k: int, *, longest_prompt: int = 0
    ) -> ServedEngine:
        """Return servers that score responses by ``params`` with the weights of ``teacher``, which is offloaded.

        top_k: number of most likely tokens that will be requested at each token; 0 for none. longest_prompt: as for
        ``engine``.
        """
        requirements = ServerRequirements(self._max_length(teacher, params, longest_prompt), top_k=top_k)
        return self._serve(teacher, model_name, requirements, offload=True)

    def buffer(
        self,
        loader: PromptDataLoader,
        worker: RolloutWorker,
        train_batch_size: int | None = None,
    ) -> RolloutBuffer:
        """Return the buffer of the stage's steps. train_batch_size: by default the stage's."""
        stage, rollout = self._config.stages[self._stage_name], self._config.rollout
        filter_groups = getattr(stage, "filter_groups", None)
        return RolloutBuffer(
            loader,
            worker,
            stage.train_batch_size if train_batch_size is None else train_batch_size,
            stage.num_generations,
            stage.steps,
            BufferPolicy(
                rollout.staleness,
                rollout.async_mode,
                rollout.over_sampling_ratio,
                None if filter_groups is None else GroupFilter(**filter_groups.model_dump()),
            ),
        )

    def close(self) -> None:
        """Close the served engines, and with them the servers that they started; then environments and others."""
        self._servers.close()
        while self._environments:
            self._environments.pop().close()
        while self._others:
            self._others.pop().close()

    def environments(self, model_name: str, reward_manager: RewardManager | None) -> EnvironmentManager:
        """Return the environments of prompts for ``model_name``. reward_manager: None if nothing is graded."""
        tokenizer = self._inputs.tokenizer_of(model_name)
        stop_ids = stop_token_ids(tokenizer, self._config.models[model_name].path)
        manager = EnvironmentManager(tokenizer, self._config.template_date, stop_ids, reward_manager)
        self._environments.append(manager)
        return manager

    def _serve(
        self, model: MegatronModel, model_name: str, requirements: ServerRequirements, *, offload: bool = False
    ) -> ServedEngine:
        """Start SGLang servers with the weights of ``model``, or attach to those of the configuration.

        offload: the model itself is in host memory except while its weights are sent.
        """
        urls = self._config.rollout.sglang.urls.get(model_name, ())
        if urls and self._servers.has_model(model_name):
            raise UserError(
                f"stage {self._stage_name} needs servers for two sets of weights of the model '{model_name}', and "
                "those of rollout.sglang.urls hold one: remove the model from urls to have servers started"
            )
        group = sglang_server_group(
            model.chunks,
            model.spec,
            model.layout,
            model.score_replicated,
            self._config.rollout,
            self._servers.next_directory(model_name),
            urls=urls,
            requirements=requirements,
            tokenizer=self._inputs.tokenizer_of(model_name),
            on_device=functools.partial(model.on_device, release=offload),
            memory=self._server_memory.get(model_name),
            lora=None if model.adapter is None else model.adapter.lora,
        )
        engine = ServedEngine(group)
        self._servers.add(model_name, engine)
        return engine

    def _max_length(self, model: MegatronModel, params: SamplingParams, longest_prompt: int) -> int:
        """Return the tokens of the longest prompt with the longest response. longest_prompt: of a teacher's view."""
        longest = max(self._config.lengths.max_prompt_length, longest_prompt) + params.max_new_tokens
        return min(longest, model.spec.max_position_embeddings)
