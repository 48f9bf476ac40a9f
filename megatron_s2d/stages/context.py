"""The argument of a stage's run function: configuration, inputs, and factories of models and rollouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.stages import Stage
from megatron_s2d.config.tracking import Tracker
from megatron_s2d.config.training import SamplingConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.model_tokenizers import write_assets
from megatron_s2d.models.published import write_reference
from megatron_s2d.parallel.collectives import broadcast_from_rank0
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.parallel.watchdog import heartbeat
from megatron_s2d.rollout.sampler import PromptDataLoader
from megatron_s2d.stages.inputs import StageInputs
from megatron_s2d.stages.model_factory import ModelFactory
from megatron_s2d.stages.rollout_factory import RolloutFactory
from megatron_s2d.train.loop import LoopSettings
from megatron_s2d.train.megatron_model import MegatronModel


@dataclasses.dataclass(frozen=True, eq=False)
class StageContext:
    """One stage (or evaluation) on this rank; leaving its ``with`` block closes what the factories opened."""

    name: str
    stage: Stage  # configuration
    seed: int  # of everything the stage draws
    directory: StageDirectory  # where the stage writes
    inputs: StageInputs
    models: ModelFactory
    rollouts: RolloutFactory
    stop: Callable[[], bool]  # whether the run was asked to stop
    _config: WorkflowConfig

    @classmethod
    def create(
        cls,
        config: WorkflowConfig,
        name: str,
        *,
        directory: StageDirectory,
        inputs: Mapping[str, StageDirectory],
        layout: Layout,
        tokenizer_cache: Path,
        stop: Callable[[], bool] = lambda: False,
    ) -> StageContext:
        """Create the parts for stage ``name``. inputs: finished directories by stage. layout: of the trained model."""
        seed = derive_seed(config, config.stages[name].seed)
        stage_inputs = StageInputs(config, inputs, tokenizer_cache, name)
        return cls(
            name=name,
            stage=config.stages[name],
            seed=seed,
            directory=directory,
            inputs=stage_inputs,
            models=ModelFactory(config, name, seed, layout, stage_inputs),
            rollouts=RolloutFactory(config, name, directory.path, stage_inputs),
            stop=stop,
            _config=config,
        )

    @property
    def is_rank_zero(self) -> bool:
        """Whether this rank writes files."""
        return dist.get_rank() == 0

    def seed_of(self, offset: int) -> int:
        """Return the seed of something that is not the stage's own, such as a validation."""
        return derive_seed(self._config, offset)

    @property
    def evaluation_sampling(self) -> SamplingConfig:
        """How the workflow's evaluation samples."""
        return self._config.evaluation.sampling

    @property
    def tracked(self) -> tuple[Sequence[Tracker], str]:
        """The trackers of the run, and the workflow's name for them."""
        return self._config.tracking, self._config.name

    def loop_settings(self, *, max_kl: float | None = None) -> LoopSettings:
        """Return how the training loop runs this stage. max_kl: see ``LoopSettings``."""
        return LoopSettings(
            self.stage.steps,
            self.stage.checkpoint,
            self.stop,
            *self.tracked,
            max_kl=max_kl,
            max_mismatch_kl=self._config.rollout.max_mismatch_kl,
            min_replayed_agreement=self._config.rollout.min_replayed_agreement,
        )

    def report_progress(self, done: int, total: int) -> None:
        """Note for the runner how many responses of a round (of one replica) have ended; called by engines."""
        heartbeat()
        if self.is_rank_zero:
            self.directory.note(f"{done} of {total} responses")

    def prompt_loader(self) -> PromptDataLoader:
        """Return the prompts of the stage's steps, after those of the stages that it continues."""
        prompts = self.inputs.stage_prompts(self.name)
        first = self._config.num_prompts_before(self.name)
        return PromptDataLoader(prompts, self.stage.train_batch_size, self.seed, first)

    def save_model(self, model: MegatronModel) -> None:
        """Write the stage's final weights, unless a run that was killed right afterwards has done so; collective.

        A LoRA adapter is written as a PEFT directory and merged into the weights.
        """
        if not broadcast_from_rank0(self.directory.model_path.exists):
            if model.adapter is not None:
                base = self._config.models[self._config.model_of(self.name)].path
                model.adapter.write(self.directory.adapter_path, "" if base is None else str(base))
                model.adapter.merge()
            model.save(self.directory.model_path, {"stage": self.name}, with_optimizer=False)
        self._write_assets()

    def refer_to_source(self) -> None:
        """Make the files under the model's ``path`` the stage's final weights, without a copy; collective."""
        model = self._config.models[self._config.model_of(self.name)]
        assert model.path is not None  # preflight
        source = model.path
        broadcast_from_rank0(lambda: write_reference(self.directory.model_path, source))
        self._write_assets()

    def _write_assets(self) -> None:
        model_name = self._config.model_of(self.name)
        tokenizer, source = self.inputs.tokenizer_of(model_name), self._config.models[model_name].path
        broadcast_from_rank0(lambda: write_assets(tokenizer, source, self.directory.model_path))

    def __enter__(self) -> StageContext:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Close the engines with the servers that they started, and after success the layouts of frozen models.

        Destroying a layout is collective: after an error other ranks may not get here.
        """
        self.rollouts.close()
        if error_type is None:
            self.models.close()


def derive_seed(config: WorkflowConfig, offset: int) -> int:
    """Return the seed of a stage or evaluation; those with equal offsets share their noise."""
    return config.seed * 1_000_003 + offset
