"""Inputs of a stage: the tokenizer, prompts, and the weights and teacher caches of finished stages."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.data import DataSource
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.cache import TeacherCache
from megatron_s2d.data.prompts import prompts_of
from megatron_s2d.data.tokenizer import load_tokenizer
from megatron_s2d.records import Prompt
from megatron_s2d.teachers.cached import open_cache


@dataclasses.dataclass(frozen=True, eq=False)
class StageInputs:
    """Inputs of one stage; each is read when it is asked for."""

    config: WorkflowConfig
    directories: Mapping[str, StageDirectory]  # stage name -> its finished directory
    tokenizer_cache: Path

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The workflow's tokenizer."""
        return load_tokenizer(self.config.tokenizer, self.tokenizer_cache)

    def data_source(self, name: str) -> DataSource:
        """Return the ``data`` entry of ``entry``, ``entry/1H`` or ``entry/2H``."""
        return self.config.data[name.partition("/")[0]]

    def prompts(self, name: str) -> list[Prompt]:
        """Return the prompts of ``entry``, ``entry/1H`` or ``entry/2H``."""
        return prompts_of(self.config, name, self.tokenizer).prompts

    def model_path(self, stage_name: str) -> Path:
        """Return the final weights of a finished stage."""
        return self.directories[stage_name].model_path

    def teacher_cache(self, stage_name: str) -> TeacherCache:
        """Open the cache of a finished stage; raise ``UserError`` if it does not belong to this run."""
        directory = self.directories[stage_name]
        teacher = StageDirectory(directory.path.with_name(self.config.stages[stage_name].teacher))
        return open_cache(directory, teacher, self.tokenizer, self.config.template_date)
