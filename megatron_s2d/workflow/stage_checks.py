"""Checks of one stage against others and against its data: teachers of domains, models that fit. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_s2d.config.lora import check_lora
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.stage import TrainingStageConfig
from megatron_s2d.config.training import SamplingConfig
from megatron_s2d.config.weights import ExpoConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.errors import UserError
from megatron_s2d.verify import check_labels


def check_domains(where: str, teacher: object, entries: Sequence[str], prompts: Mapping[str, PromptTable]) -> None:
    """Refuse prompts of a domain without a teacher. where: the key of the teachers."""
    if not isinstance(teacher, Mapping):
        return
    domains = {domain for entry in entries for domain in prompts[entry].distinct("domain")}
    for domain in sorted(domains - set(teacher)):
        raise UserError(
            f"{where}: no teacher for the domain '{domain}' (domains with one: {', '.join(teacher)}); "
            "add one, or correct the `domain` of the data"
        )


def check_domain_weights(
    where: str, weights: object, entries: Sequence[str], prompts: Mapping[str, PromptTable]
) -> None:
    """Refuse weights by domain that do not name exactly the domains of the stage's prompts."""
    if not isinstance(weights, Mapping):
        return
    domains = {str(domain) for entry in entries for domain in prompts[entry].distinct("domain")}
    if domains != set(weights):
        raise UserError(
            f"{where}.domain_weights: it names {', '.join(sorted(weights))}, and the domains of its prompts are "
            f"{', '.join(sorted(domains))}: give each of them a weight"
        )


def check_adapter_of(config: WorkflowConfig, where: str, stage: TrainingStageConfig, spec: ModelSpec) -> None:
    """Refuse a LoRA adapter that the model, the layout or its files do not allow."""
    lora = stage.lora
    if lora is None:
        return
    check_lora(f"{where}.lora", lora, spec, config.parallel, config.fp8)
    if lora.adapter is not None:
        from megatron_s2d.models.peft_files import check_adapter  # loads torch

        check_adapter(f"{where}.lora", lora, spec)
        if getattr(stage, "kl_loss_coef", 0) > 0 and getattr(stage, "reference", None) is None:
            raise UserError(
                f"{where}.reference: with lora.adapter the stage does not start from weights of their own, which "
                "kl_loss_coef compares with: name the stage whose weights are the reference"
            )


def check_expo(config: WorkflowConfig, where: str, stage: ExpoConfig) -> None:
    """Refuse to combine the weights of different models."""
    base = config.models[config.model_of(stage.base)]
    for name in stage.tuned:
        if config.models[config.model_of(name)] != base:
            raise UserError(
                f"{where}.tuned: '{name}' and '{stage.base}' have different models, so their weights cannot be combined"
            )


def check_same_vocabulary(
    config: WorkflowConfig, where: str, name: str, relation: str, other: str, specs: Mapping[str, ModelSpec]
) -> None:
    """Refuse another stage's model whose vocabulary differs."""
    model, other_model = config.model_of(name), config.model_of(other)
    if specs[model].vocab_size != specs[other_model].vocab_size:
        raise UserError(
            f"{where}.{relation}: model '{other_model}' has a vocabulary of {specs[other_model].vocab_size} and "
            f"'{model}' one of {specs[model].vocab_size}: teacher and student must share one"
        )


def check_length(
    config: WorkflowConfig,
    where: str,
    stage: str,
    specs: Mapping[str, ModelSpec],
    prompts: PromptTable,
    sampling: SamplingConfig,
) -> None:
    """Refuse prompts whose responses may not fit into the positions of the stage's model."""
    model = config.model_of(stage)
    limit = specs[model].max_position_embeddings
    longest = prompts.longest_beyond(limit - sampling.max_response_length)
    if longest is not None:
        raise UserError(
            f"{where}: prompt {longest.id} ({len(longest.token_ids)} tokens) and max_response_length "
            f"{sampling.max_response_length} exceed the {limit} positions of model '{model}'; reduce "
            "lengths.max_prompt_length or sampling.max_response_length"
        )


def check_graded(prompts: PromptTable, where: str) -> None:
    """Refuse prompts without labels that their verifier can read."""
    try:
        check_labels(prompts)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
