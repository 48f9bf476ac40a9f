"""Builds the models of a stage: the trained one, and frozen teachers and references."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_s2d.config.hf_config import is_megatron_checkpoint
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.routing_replay import replays_routes
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError
from megatron_s2d.models.hf_checkpoint import HfCheckpoint
from megatron_s2d.models.lora import check_layers
from megatron_s2d.models.published import referenced_source, verify_reference
from megatron_s2d.models.weights import import_weights
from megatron_s2d.parallel.collectives import first_error
from megatron_s2d.parallel.layout import Layout, build_layout
from megatron_s2d.stages.inputs import StageInputs
from megatron_s2d.train.megatron_model import MegatronModel


class ModelFactory:
    """Models with the weights of entries of ``models`` or of finished stages; all methods are collective."""

    def __init__(self, config: WorkflowConfig, stage_name: str, seed: int, layout: Layout, inputs: StageInputs):
        """layout: of the trained model. seed: draws the weights of entries of ``models`` without a ``path``."""
        self._config, self._stage = config, config.stages[stage_name]
        self._seed, self._layout, self._inputs = seed, layout, inputs
        self._name = stage_name
        self._trained: MegatronModel | None = None  # with a LoRA adapter
        self._frozen_layouts: dict[ParallelConfig, Layout] = {}  # those that differ from ``layout``

    def start(self, *, beta: float | None = None, trained: bool = True) -> MegatronModel:
        """Return the model that the stage trains, with its starting weights, not yet prepared for training.

        trained: False for the starting weights themselves, without a LoRA adapter; then they may be those of the
        trained model with its adapter off.
        """
        if not trained and self._trained is not None:
            return self._base("reference")
        if trained and self._stage.lora is not None:
            check_layers(self.spec(self._config.model_of(self._name)), self._stage.lora)
        if self._stage.init is not None:
            model = self.of_stage(self._stage.init, beta=beta, trained=trained)
        else:
            model = self.fresh(self._stage.model, beta=beta, trained=trained)
        if trained and self._stage.lora is not None:
            model.add_adapter(self._stage.lora, self._seed)
            self._trained = model
        return model

    def fresh(self, model_name: str, *, beta: float | None = None, trained: bool = False) -> MegatronModel:
        """Return an entry of ``models`` with its own weights: those of its ``path``, or random ones."""
        source = self._config.models[model_name].path
        seed = self._seed if source is None else None
        model = self._build(model_name, self._layout, seed=seed, beta=beta, trained=trained)
        if source is not None:
            load_weights(model, source)
        return model

    def of_stage(
        self, stage_name: str, *, beta: float | None = None, layout: Layout | None = None, trained: bool = False
    ) -> MegatronModel:
        """Return the model that a finished stage left."""
        model_name = self._config.model_of(stage_name)
        model = self._build(model_name, layout or self._layout, seed=None, beta=beta, trained=trained)
        path = self._inputs.model_path(stage_name)
        source = referenced_source(path)
        if source is None:
            model.load(path)
        else:
            failure = _failure_of(path) if dist.get_rank() == 0 else None
            if (message := first_error(failure)) is not None:
                raise UserError(message)
            load_weights(model, source)
        return model

    def frozen(self, stage_name: str) -> MegatronModel:
        """Return ``of_stage`` without gradients, at the layout of frozen models: a teacher or a reference.

        Weights that the trained model has beside its LoRA adapter are not loaded again.
        """
        if self._trained is not None and self._config.shares_weights(self._name, stage_name):
            relations = [relation for relation, other in self._stage.inputs().items() if other == stage_name]
            return self._base(max(relations, key=lambda relation: relation != "init"))
        model = self.of_stage(stage_name, layout=self._layout_for(self._config.frozen_parallel(stage_name)))
        model.freeze()
        return model

    def name_of(self, stage_name: str) -> str:
        """Return the entry of ``models`` that a stage leaves weights of."""
        return self._config.model_of(stage_name)

    def spec(self, model_name: str) -> ModelSpec:
        """Return the architecture of an entry of ``models``."""
        return self._config.models[model_name].resolve(len(self._inputs.tokenizer_of(model_name)))

    def close(self) -> None:
        """Destroy the process groups of layouts that only frozen models have."""
        while self._frozen_layouts:
            self._frozen_layouts.popitem()[1].destroy()

    def _base(self, relation: str) -> MegatronModel:
        """Return the trained model without its adapter. relation: why the stage needs it (teacher, reference)."""
        return self._trained.without_adapter()

    def _layout_for(self, config: ParallelConfig) -> Layout:
        if config == self._layout.config:
            return self._layout
        if config not in self._frozen_layouts:
            self._frozen_layouts[config] = build_layout(config)
        return self._frozen_layouts[config]

    def _build(
        self, model_name: str, layout: Layout, *, seed: int | None, beta: float | None, trained: bool
    ) -> MegatronModel:
        fp8 = self._config.fp8
        if fp8 is not None and not trained:
            # bfloat16 weights can be saved and offloaded as they are.
            fp8 = fp8.model_copy(update={"parameters": False}) if fp8.frozen else None
        spec = self.spec(model_name)
        return MegatronModel(
            spec,
            layout,
            precision=self._config.precision,
            max_tokens=self._stage.micro_batch.max_tokens_per_gpu,
            packed=self._stage.micro_batch.sequence_packing,
            seed=seed,
            options=self._config.models[model_name],
            beta=beta,
            fp8=fp8,
            tp_comm_overlap=trained and layout.config.tp_comm_overlap,
            routing_replay=trained and replays_routes(self._config, self._stage, spec),
        )


def load_weights(model: MegatronModel, source: Path) -> None:
    """Load the weights in a Hugging Face directory or Megatron checkpoint; collective."""
    if is_megatron_checkpoint(source):
        model.load(source)
        return
    checkpoint = HfCheckpoint(source)
    if dist.get_rank() == 0:
        checkpoint.verify_digests()
    import_weights(model.chunks, model.spec, model.layout, checkpoint)


def _failure_of(path: Path) -> str | None:
    try:
        verify_reference(path)
    except (UserError, OSError) as error:
        return str(error)
    return None
