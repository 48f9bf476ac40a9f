"""Inputs of a stage: tokenizers, prompts, and the weights and teacher caches of finished stages."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_s2d.artifacts.files import json_digest
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.base import dump
from megatron_s2d.config.data import DataSource
from megatron_s2d.config.needed_stages import TokenizerChoice, prompt_model, stage_views
from megatron_s2d.config.teacher_service import TeacherServiceConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.cache import TeacherCache
from megatron_s2d.data.model_tokenizers import ModelTokenizers
from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.data.prompts import fitting_prompts, prompts_of
from megatron_s2d.data.teacher_views import fitting_in_views, in_view, views_of_entry
from megatron_s2d.data.tokenizer import template_fingerprint
from megatron_s2d.errors import UserError
from megatron_s2d.teachers.cached import open_cache
from megatron_s2d.teachers.service.client import TeacherClient
from megatron_s2d.teachers.views import PromptViews


@dataclasses.dataclass(frozen=True, eq=False)
class StageInputs:
    """Inputs of one stage; each is read when it is asked for."""

    config: WorkflowConfig
    directories: Mapping[str, StageDirectory]  # stage name -> its finished directory
    tokenizer_cache: Path
    stage_name: str | None = None  # the stage; None: prompts are rendered with the workflow's tokenizer

    @functools.cached_property
    def _tokenizers(self) -> ModelTokenizers:
        return ModelTokenizers(self.config, self.tokenizer_cache)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that renders the stage's prompts (``prompt_model``)."""
        if self.stage_name is None:
            return self._tokenizers.common
        return self._tokenizers.of_model(prompt_model(self.config, self.stage_name))

    def tokenizer_of(self, model_name: str) -> Any:
        """Return the tokenizer of an entry of ``models``."""
        return self._tokenizers.of_model(model_name)

    def named_tokenizer(self, name: str | None) -> Any:
        """Return the tokenizer ``name`` (a directory or hub name); None: the workflow's."""
        return self._tokenizers.load(TokenizerChoice(name or self.config.tokenizer, None))

    def data_source(self, name: str) -> DataSource:
        """Return the ``data`` entry of ``entry``, ``entry/1H`` or ``entry/2H``."""
        return self.config.data[name.partition("/")[0]]

    def prompts(self, name: str) -> PromptTable:
        """Return the prompts of ``entry``, ``entry/1H`` or ``entry/2H``."""
        return prompts_of(self.config, name, self.tokenizer, self._tokenizers.of_prompts()).prompts

    def stage_prompts(self, stage_name: str) -> PromptTable:
        """Return the prompts of all entries that stage ``stage_name`` reads, within its ``max_prompt_length``."""
        entries = self.config.stages[stage_name].entries
        return PromptTable.concatenate([self._fitting(stage_name, entry) for entry in entries])

    def longest_beyond(self, stage_name: str, limit: int) -> int:
        """Return the tokens of the longest prompt of a stage if it has more than ``limit``, else 0."""
        return int(self.stage_prompts(stage_name).longer_than(limit)[1].max(initial=0))

    def _fitting(self, stage_name: str, entry: str) -> PromptTable:
        prompts = fitting_prompts(self.config, stage_name, entry, self.prompts(entry))
        return fitting_in_views(self.config, stage_name, entry, prompts, self._tokenizers)

    def prompt_views(self, stage_name: str, relation: str) -> PromptViews | None:
        """Return the prompts of a stage as its teachers (relation "teacher") or references read them.

        None if they read what the student reads: no view, or one that renders every prompt alike.
        """
        stage = self.config.stages[stage_name]
        cache = getattr(stage, "cache", None)
        reads = dict.fromkeys(stage.entries, stage_name)
        reads |= {entry: cache for entry in (self.config.stages[cache].entries if cache else []) if entry not in reads}
        tables: dict[str | None, list[PromptTable]] = {}
        differs = False
        for entry, reader in reads.items():
            prompts = self._fitting(reader, entry)
            for of in views_of_entry(self.config, stage_name, entry):
                if of.relation == relation:
                    table = in_view(self.config, stage_name, of, entry, prompts, self._tokenizers)
                    tables.setdefault(of.domain, []).append(table)
                    differs |= not np.array_equal(table.keys, prompts.keys)
        if not differs:
            return None
        joined = {domain: PromptTable.concatenate(parts) for domain, parts in tables.items()}
        for domain, table in joined.items():
            if len(tables[domain]) > 1 and len(table.distinct("id")) < len(table):
                raise UserError(
                    f"stages.{stage_name}: two of its `prompts` have a problem with the same id, whose view would be "
                    "that of either: rename one of their files, or name one entry"
                )
        return PromptViews(joined)

    def teacher_client(self, settings: TeacherServiceConfig, where: str) -> TeacherClient:
        """Return the client of a served teacher. where: the key of ``settings`` in the configuration."""
        return TeacherClient(settings, where)

    def view_fingerprint(self, stage_name: str) -> str | None:
        """Return the digest of the view in which the teacher of a cache reads prompts; None without one."""
        views = stage_views(self.config, stage_name)
        if not views:
            return None
        rendered = template_fingerprint(self._tokenizers.load(views[0].renderer), self.config.template_date)
        settings = {key: value for key, value in dump(views[0].view).items() if key != "max_prompt_length"}
        return json_digest({"view": settings, "template": rendered})

    def model_path(self, stage_name: str) -> Path:
        """Return the final weights of a finished stage."""
        return self.directories[stage_name].model_path

    def teacher_cache(self, stage_name: str) -> TeacherCache:
        """Open the cache of a finished stage; raise ``UserError`` if it does not belong to this run."""
        directory = self.directories[stage_name]
        teacher = StageDirectory(directory.path.with_name(self.config.stages[stage_name].teacher))
        return open_cache(
            directory, teacher, self.tokenizer, self.config.template_date, self.view_fingerprint(stage_name)
        )
