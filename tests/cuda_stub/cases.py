"""The cases of ``cases.yaml`` as workflows, each measured once."""

from __future__ import annotations

import functools
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from megatron_s2d.config.base import parse
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.estimate.memory import StageMemory
from megatron_s2d.estimate.stage_memory import StageShape
from megatron_s2d.measure.comparison import PhaseMemory, compare_memory, estimated_memory
from megatron_s2d.measure.limits import Limits
from megatron_s2d.measure.measure import RankLauncher, measure_stage
from megatron_s2d.measure.measurement import Measurement

STAGE = "measured"
_SECTIONS = ("parallel", "teacher_parallel", "rollout", "fp8")
# With it the stages build its layers, which launch, wait and save otherwise.
HAS_TRANSFORMER_ENGINE = importlib.util.find_spec("transformer_engine") is not None
LAUNCHER = RankLauncher()  # ends with this process
CONFIGS = tempfile.TemporaryDirectory(prefix="megatron_s2d_configs_")  # so do the files in it
_MICRO_BATCH = {"max_tokens_per_gpu": 4096, "sequence_packing": True}


class Case:
    """A stage of a workflow and one of its ranks."""

    def __init__(self, name: str, values: dict[str, Any]):
        self.name, self.values = name, values
        self.rank = values.get("rank", 0)
        self.limits = Limits(
            micro_batches=2, decoded_tokens=values.get("decoded", 16), saves=values.get("saves", False)
        )

    @functools.cached_property
    def config(self) -> WorkflowConfig:
        """The stage, after one that leaves the weights of each model."""
        base = {"type": "sft", "data": "pool", "steps": 1, "global_batch_size": 64, "micro_batch": _MICRO_BATCH}
        stages = {name: base | {"model": name} for name in self.values["models"]}
        stages[STAGE] = {"micro_batch": _MICRO_BATCH, "steps": 2} | self.values["stage"]
        sections = {name: self.values[name] for name in _SECTIONS if name in self.values}
        stages = {name: {"role": name} | stage for name, stage in stages.items()}
        task = {"type": "task", "num_operations": 2, "num_prompts": 512}
        document = {
            "name": "measured",
            "tokenizer": "task:modular_arithmetic",
            "precision": "bfloat16",
            "models": self.values["models"],
            "data": {"pool": task | {"split": "pool"}, "problems": task | {"split": "eval"}},
            "stages": stages,
            "arms": {STAGE: STAGE},
            "evaluation": {"prompts": "problems"},
            **sections,
        }
        return parse(WorkflowConfig, document, self.name)

    @functools.cached_property
    def shape(self) -> StageShape:
        """Sizes of the stage; preflight takes them from data."""
        stage, lengths = self.config.stages[STAGE], (self.values["prompt"], self.values["response"])
        if hasattr(stage, "global_batch_size"):
            return StageShape(stage.global_batch_size, 1, 0, 0, *lengths)
        requests = stage.train_batch_size * stage.num_generations
        updates = stage.num_mini_batches
        return StageShape(requests // updates, updates, requests, stage.train_batch_size, *lengths)

    @functools.cached_property
    def measurement(self) -> Measurement:
        """The rank, measured once for all tests of the case."""
        return measure_stage(self.config, STAGE, self.shape, self.rank, limits=self.limits, launcher=LAUNCHER)

    @property
    def specs(self) -> dict[str, ModelSpec]:
        """Architectures of the models."""
        return {name: model.resolve() for name, model in self.config.models.items()}

    @property
    def spec(self) -> ModelSpec:
        """Architecture of the trained model."""
        return self.specs[self.config.model_of(STAGE)]

    @property
    def num_layers(self) -> int:
        """Layers of the trained model on this rank."""
        return self.spec.num_layers // self.config.parallel.pipeline_model_parallel_size

    @property
    def estimate(self) -> StageMemory:
        """What ``s2d plan`` estimates for what was measured."""
        return estimated_memory(self.config, self.specs, self.shape, self.measurement, self.limits)

    def memory(self) -> list[PhaseMemory]:
        """Estimate and measurement by phase."""
        return compare_memory(self.config, self.specs, self.shape, self.measurement, self.limits)


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name(name).read_text())


def _family_cases(bars: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return a GRPO stage of each model family, by ``config.json``. bars: with Transformer Engine, by case."""
    cases = {}
    for name, values in _read("families.yaml").items():
        folder = Path(CONFIGS.name) / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(values["config"]))
        if HAS_TRANSFORMER_ENGINE:
            values = values | bars.get(f"grpo_{name}", {})
        cases[f"grpo_{name}"] = {"models": {"student": {"path": folder}}, "prompt": 256, "response": 768} | values
    return cases


def _all_cases() -> dict[str, Case]:
    values, engine = _read("cases.yaml"), _read("transformer_engine.yaml")
    for name, case in engine["cases"].items():
        values[name] = values[case["like"]] | case
    if HAS_TRANSFORMER_ENGINE:
        values = {name: case | engine["bars"].get(name, {}) for name, case in values.items()}
    values |= _family_cases(engine["bars"])
    return {name: Case(name, case) for name, case in values.items()}


CASES = _all_cases()
NEED_TRANSFORMER_ENGINE = set(_read("transformer_engine.yaml")["cases"])
REFUSE_TRANSFORMER_ENGINE = {name for name, case in CASES.items() if "without_transformer_engine" in case.values}

# Further layouts, of the same parts as those of ``make test``.
SLOW = {
    "opd_8b_virtual_stages", "grpo_llama_tp4_pp2", "opd_moe_tp2_cp2_ep4", "sft_14b_middle_stage",
    "grpo_qwen2", "grpo_qwen3", "grpo_qwen3_moe", "grpo_llama", "grpo_gemma3_text", "grpo_seed_oss",
}  # fmt: skip
