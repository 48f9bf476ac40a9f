"""Which stages a workflow needs, and which tokenizer and chat template render the prompts of each. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from megatron_s2d.config.forward_kl import TeacherCacheConfig
from megatron_s2d.config.opd import SELF
from megatron_s2d.config.teacher_service import TeacherServices, services_by_domain
from megatron_s2d.config.teacher_view import TeacherViewConfig, TeacherViews, view_of
from megatron_s2d.config.workflow import WorkflowConfig


class TokenizerChoice(NamedTuple):
    """A tokenizer (directory, hub name or task) and the file of a chat template that replaces its own."""

    tokenizer: str
    chat_template: Path | None


class StageView(NamedTuple):
    """How a teacher or reference of a stage reads the problems of one domain."""

    relation: str  # "teacher" or "reference"
    domain: str | None  # None: all domains
    model: str | None  # the entry of `models` that reads; None: a served teacher
    view: TeacherViewConfig
    renderer: TokenizerChoice

    @property
    def key(self) -> str:
        """The view's key in the configuration of its stage."""
        return f"{self.relation}_view" + (f".{self.domain}" if self.domain else "")


def needed_stages(config: WorkflowConfig) -> list[str]:
    """Return the stages that lead to an evaluation or pass-rate check, inputs first."""
    return config.chain(*evaluated_stages(config), *(check.stage for check in config.pass_rate_checks))


def evaluated_stages(config: WorkflowConfig) -> list[str]:
    """Return the final stages of arms and the further stages to evaluate, each once, in stage order."""
    names = {*config.arms.values(), *config.also_evaluate}
    return [name for name in config.stage_order() if name in names]


def tokenizer_choice(config: WorkflowConfig, model_name: str) -> TokenizerChoice:
    """Return tokenizer and chat template of an entry of ``models``; by default those of the workflow."""
    model = config.models[model_name]
    return TokenizerChoice(model.tokenizer or config.tokenizer, model.chat_template)


def cache_readers(config: WorkflowConfig, cache: str) -> list[str]:
    """Return the needed stages that train on a teacher cache."""
    return config.computed_once("cache_readers", lambda: _readers_of_caches(config)).get(cache, [])


def _readers_of_caches(config: WorkflowConfig) -> dict[str, list[str]]:
    readers: dict[str, list[str]] = {}
    for name in needed_stages(config):
        for relation, other in config.stages[name].inputs().items():
            if relation.partition(".")[0] == "cache":
                readers.setdefault(other, []).append(name)
    return readers


def prompt_model(config: WorkflowConfig, stage_name: str) -> str:
    """Return the entry of ``models`` for which a stage renders its prompts.

    It is the stage's model; for a teacher cache the model of the (first) stage that trains on it, because that one
    learns from the cached prompts.
    """
    is_cache = isinstance(config.stages[stage_name], TeacherCacheConfig)
    readers = cache_readers(config, stage_name) if is_cache else []
    return config.model_of(readers[0] if readers else stage_name)


def prompt_choices(config: WorkflowConfig) -> list[TokenizerChoice]:
    """Return the distinct choices that render prompts somewhere in the workflow."""
    if not any(model.tokenizer or model.chat_template for model in config.models.values()):
        return [TokenizerChoice(config.tokenizer, None)]
    return list(dict.fromkeys(tokenizer_choice(config, prompt_model(config, name)) for name in needed_stages(config)))


def stage_views(config: WorkflowConfig, stage_name: str) -> list[StageView]:
    """Return the views of a stage's teachers and references; none where they read what the student reads."""
    stage = config.stages[stage_name]
    result = []
    for relation in ("teacher", "reference"):
        views, readers = getattr(stage, f"{relation}_view", None), getattr(stage, relation, None)
        services = getattr(stage, "teacher_service", None) if relation == "teacher" else None
        if views is not None and services is not None:
            result += _service_views(config, stage_name, services, views)
        if views is None or readers is None:
            continue
        keys = list(readers) if isinstance(readers, dict) else list(views) if isinstance(views, dict) else [None]
        for domain in keys:
            view = view_of(views, domain)
            if view is not None:
                reader = readers[domain] if isinstance(readers, dict) else readers
                model = config.model_of(stage_name if reader == SELF else reader)
                result.append(StageView(relation, domain, model, view, _renderer(config, stage_name, model, view)))
    return result


def _service_views(
    config: WorkflowConfig, stage_name: str, services: TeacherServices, views: TeacherViews
) -> list[StageView]:
    """Return the views of served teachers, which are no entries of ``models``: the student's stands for them."""
    model, by_domain = config.model_of(stage_name), services_by_domain(services)
    keys = list(views) if None in by_domain and isinstance(views, dict) else list(by_domain)
    result = []
    for domain in keys:
        view, service = view_of(views, domain), by_domain.get(domain) or by_domain[None]
        if view is not None:
            renderer = _renderer(config, stage_name, model, view)
            if view.chat_template == "teacher":
                student = tokenizer_choice(config, model)
                renderer = TokenizerChoice(service.tokenizer or student.tokenizer, service.chat_template)
            result.append(StageView("teacher", domain, None, view, renderer))
    return result


def _renderer(config: WorkflowConfig, stage_name: str, model: str, view: TeacherViewConfig) -> TokenizerChoice:
    student = tokenizer_choice(config, prompt_model(config, stage_name))
    if view.chat_template == "teacher":
        return tokenizer_choice(config, model)
    return student if view.chat_template == "student" else TokenizerChoice(student.tokenizer, Path(view.chat_template))
