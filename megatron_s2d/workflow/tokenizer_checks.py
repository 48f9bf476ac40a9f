"""Compares the tokenizers, chat templates and end tokens of a workflow's models before a run.

Different token ids are refused. What can be meant, but often is not, becomes a line of ``s2d run --dry-run``: a chat
template that a model's folder has but that is not used, teachers with another template, responses that do not end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_s2d.config.forward_kl import TeacherCacheConfig
from megatron_s2d.config.hf_config import published_files
from megatron_s2d.config.needed_stages import (
    TokenizerChoice,
    cache_readers,
    evaluated_stages,
    prompt_model,
    stage_views,
    tokenizer_choice,
)
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.config.training import SamplingConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.model_tokenizers import ModelTokenizers, extra_tokens, has_tokenizer, vocabulary_difference
from megatron_s2d.data.tokenizer import end_of_message, render, stop_token_ids, template_fingerprint
from megatron_s2d.errors import UserError

_TEACHERS = ("teacher", "reference")


def check_tokenizers(config: WorkflowConfig, tokenizers: ModelTokenizers, stages: Sequence[str]) -> list[str]:
    """Return notices for the user; raise ``UserError`` for models that do not share one vocabulary."""
    models = list(dict.fromkeys(config.model_of(name) for name in stages))
    notices = []
    for name in models:
        notices += _model_notices(config, tokenizers, name)
    for name in stages:
        notices += _stage_notices(config, tokenizers, name)
    notices += _end_notices(config, tokenizers, stages)
    return notices + [text for name in stages for text in _match_notices(config, tokenizers, name)]


def _model_notices(config: WorkflowConfig, tokenizers: ModelTokenizers, name: str) -> Iterator[str]:
    """Compare a model's tokenizer, and the one in its folder, with the workflow's."""
    used, common = tokenizers.of_model(name), tokenizers.common
    choice, path = tokenizer_choice(config, name), config.models[name].path
    path = None if path is None else published_files(path)
    if choice.tokenizer != config.tokenizer:
        difference = vocabulary_difference(used, common)
        if difference is not None:
            raise UserError(
                f"models.{name}.tokenizer: {choice.tokenizer} has other token ids than the workflow's tokenizer "
                f"{config.tokenizer}: {difference}; all models of a workflow must share one vocabulary"
            )
        yield from _extra_notice(f"models.{name}.tokenizer: {choice.tokenizer}", config, used, common)
    if path is None or not has_tokenizer(path) or Path(choice.tokenizer) == path:
        return
    try:
        own = tokenizers.load(TokenizerChoice(str(path), None))
    except UserError as error:
        raise UserError(f"models.{name}.path: {error}") from None
    difference = vocabulary_difference(own, common)
    if difference is not None and config.models[name].tokenizer is None:
        raise UserError(
            f"models.{name}.path: the tokenizer in {path} has other token ids than the workflow's tokenizer "
            f"{config.tokenizer}: {difference}; all models of a workflow must share one vocabulary. If the files "
            f"in the folder are the wrong ones, name the right tokenizer in models.{name}.tokenizer"
        )
    if difference is not None:
        yield f"models.{name}: the tokenizer in its folder has other token ids than the one used: {difference}"
        return
    yield from _extra_notice(f"models.{name}.path: the tokenizer in {path}", config, own, common)
    if config.models[name].chat_template is None and _template(own, config) != _template(used, config):
        kind = "no chat template" if own.chat_template is None else "another chat template"
        yield (
            f"models.{name}: its folder {path} has {kind}, but prompts are rendered with that of {choice.tokenizer}; "
            f"set models.{name}.tokenizer: {path} to use its own"
        )


def _extra_notice(subject: str, config: WorkflowConfig, own: Any, common: Any) -> Iterator[str]:
    extra = extra_tokens(own, common)
    if extra:
        yield (
            f"{subject} and {config.tokenizer} have the same ids, but {len(extra)} of them (from {extra[0]}) are in "
            "one of the two only; the other model was not trained on them"
        )


def _stage_notices(config: WorkflowConfig, tokenizers: ModelTokenizers, name: str) -> Iterator[str]:
    """Name stages in which a teacher or reference reads prompts in another template than its own."""
    stage = config.stages[name]
    if isinstance(stage, TeacherCacheConfig):
        _check_readers(config, tokenizers, name)
    reader = prompt_model(config, name)
    rendered = _template(tokenizers.of_model(reader), config)
    for relation, other in stage.inputs().items():
        teacher, key = config.model_of(other), f"{relation.partition('.')[0]}_view"
        if relation.partition(".")[0] not in _TEACHERS or teacher == reader:
            continue
        if getattr(stage, key, None) is not None:
            continue  # whoever sets a view has decided
        if _template(tokenizers.of_model(teacher), config) != rendered:
            yield (
                f"stages.{name}.{relation}: '{teacher}' has another chat template than '{reader}'; here it reads "
                f"prompts as '{reader}' renders them; set {key}: {{chat_template: teacher}} to render its own"
            )


def _check_readers(config: WorkflowConfig, tokenizers: ModelTokenizers, cache: str) -> None:
    """Refuse a cache for models with different templates: its prompts are rendered once."""
    readers = cache_readers(config, cache)
    templates = {name: _template(tokenizers.of_model(config.model_of(name)), config) for name in readers}
    other = next((name for name in readers if templates[name] != templates[readers[0]]), None)
    if other is not None:
        raise UserError(
            f"stages.{cache}: its prompts are rendered once, but '{readers[0]}' and '{other}' train models with "
            "different chat templates on it; make a cache for each"
        )


def _end_notices(config: WorkflowConfig, tokenizers: ModelTokenizers, stages: Sequence[str]) -> Iterator[str]:
    """Name models whose responses may not end: at the end of a message, or where their teacher's responses end."""
    ends = {name: _ends(config, tokenizers, name) for name in dict.fromkeys(map(config.model_of, stages))}
    samplings: dict[str, list[SamplingConfig]] = {name: [] for name in ends}
    for name in stages:
        if hasattr(config.stages[name], "sampling"):
            samplings[config.model_of(name)].append(config.stages[name].sampling)
    for name in evaluated_stages(config):
        samplings[config.model_of(name)].append(config.evaluation.sampling)
    for name, settings in samplings.items():
        tokenizer = tokenizers.of_model(name)
        end = end_of_message(tokenizer, config.template_date)
        text = None if end is None else tokenizer.decode([end])
        if end is not None and end not in ends[name] and any(text not in each.stop_strings for each in settings):
            yield (
                f"models.{name}: the chat template ends messages with {text}, which does not end responses of this "
                f"model (only {_names(tokenizer, ends[name])} does): they go on after it. Add '{text}' to "
                "sampling.stop_strings, or use a tokenizer with this eos_token"
            )
    for name in stages:
        stage = config.stages[name]
        if isinstance(stage, TeacherCacheConfig):
            for student in dict.fromkeys(config.model_of(reader) for reader in cache_readers(config, name)):
                teacher = config.model_of(name)
                missing = sorted(set(ends[teacher]) - set(ends[student]))
                if missing:
                    yield (
                        f"stages.{name}: responses of '{teacher}' may end with "
                        f"{_names(tokenizers.of_model(teacher), missing)}, which does not end responses of '{student}'"
                    )


def _match_notices(config: WorkflowConfig, tokenizers: ModelTokenizers, name: str) -> Iterator[str]:
    """Say what follows where teachers of on-policy distillation end responses, or begin thoughts, otherwise."""
    stage = config.stages[name]
    if not isinstance(stage, OpdConfig):
        return
    student = config.model_of(name)
    student_ends = set(_ends(config, tokenizers, student))
    student_opens = _opens_thoughts(tokenizers.of_model(student), config, enable_thinking=False)
    views = {(of.relation, of.domain): of for of in stage_views(config, name)}
    for relation, other in stage.inputs().items():
        kind, _, domain = relation.partition(".")
        if kind not in _TEACHERS:
            continue
        teacher, tokenizer = config.model_of(other), tokenizers.of_model(config.model_of(other))
        ends = set(_ends(config, tokenizers, teacher))
        if teacher != student and not ends & student_ends:
            yield (
                f"stages.{name}.{relation}: '{teacher}' ends responses with {_names(tokenizer, sorted(ends))} and "
                f"'{student}' with {_names(tokenizer, sorted(student_ends))}: the teacher gives the student's end "
                "token little probability, the student unlearns it, and responses grow to max_response_length "
                "(kl/end_token in metrics.jsonl). Give both one eos_token, or add the teacher's to the student's "
                "generation_config.json"
            )
        view = views.get((kind, domain or None)) or views.get((kind, None))
        if view is not None:
            reads = _opens_thoughts(tokenizers.load(view.renderer), config, enable_thinking=view.view.enable_thinking)
            if reads != student_opens:
                yield (
                    f"stages.{name}.{view.key}: behind the student's prompt a response {_STATES[student_opens]}, "
                    f"behind the teacher's it {_STATES[reads]}: the first response token costs much KL "
                    "(kl/first_token in metrics.jsonl). Use a template or enable_thinking with which both begin alike"
                )


_STATES = {
    None: "begins as it likes",
    "open": "begins inside of <think>",
    "closed": "begins after </think>",
}


def _opens_thoughts(tokenizer: Any, config: WorkflowConfig, *, enable_thinking: bool) -> str | None:
    """Return whether a rendered prompt ends inside of ("open") or after ("closed") thoughts; None without any."""
    question = [{"role": "user", "content": "1 + 1 ="}]
    try:
        text = render(question, tokenizer, config.template_date, enable_thinking=enable_thinking)
    except UserError:
        return None
    tail = text.rpartition("1 + 1 =")[2]
    if "<think>" not in tail:
        return None
    return "closed" if "</think>" in tail else "open"


def _ends(config: WorkflowConfig, tokenizers: ModelTokenizers, name: str) -> tuple[int, ...]:
    try:
        return stop_token_ids(tokenizers.of_model(name), config.models[name].path)
    except UserError as error:
        raise UserError(f"models.{name}: {error}") from None


def _names(tokenizer: Any, ids: Sequence[int]) -> str:
    return ", ".join(f"{tokenizer.decode([index])} ({index})" for index in ids)


def _template(tokenizer: Any, config: WorkflowConfig) -> str | None:
    """Return the digest of a chat template and of what it renders; None for one that fails on a plain question."""
    try:
        return template_fingerprint(tokenizer, config.template_date)
    except UserError:
        return None
