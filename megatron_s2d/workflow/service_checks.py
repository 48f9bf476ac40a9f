"""What a plan says of teachers on other machines: who answers, and what their scores cost. No torch here."""

from __future__ import annotations

import http.client
from collections.abc import Iterator, Mapping, Sequence

from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.config.teacher_service import service_key, services_by_domain, services_of
from megatron_s2d.config.training import is_loopback
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.formatting import format_bytes
from megatron_s2d.teachers.service.client import TeacherClient
from megatron_s2d.teachers.service.info import TeacherInfo
from megatron_s2d.teachers.service.wire import WireError, bytes_per_token

_SECONDS = 3.0


def describe_services(config: WorkflowConfig, stages: Sequence[str]) -> dict[str, TeacherInfo | str]:
    """Return key of a service -> what its first server says of itself, or why it does not answer now.

    Raises ``UserError`` for a key that cannot be read or that the server refuses.
    """
    found: dict[str, TeacherInfo | str] = {}
    for name in stages:
        stage = config.stages[name]
        for domain, settings in services_by_domain(services_of(stage)).items():
            key = service_key(name, stage, domain)
            try:
                found[key] = TeacherClient(settings, key).describe(_SECONDS)
            except (WireError, OSError, http.client.HTTPException) as error:
                found[key] = f"{settings.urls[0]} does not answer now ({error or type(error).__name__})"
    return found


def service_specs(services: Mapping[str, TeacherInfo | str]) -> dict[str, ModelSpec]:
    """Return key of a service -> architecture of its teacher, of those that answered."""
    return {key: ModelSpec.from_dict(info.spec) for key, info in services.items() if isinstance(info, TeacherInfo)}


def service_lines(config: WorkflowConfig, services: Mapping[str, TeacherInfo | str]) -> Iterator[str]:
    """Yield what each served teacher is, and the bytes of a response token by payload; the stage's is named first."""
    for key, info in services.items():
        if isinstance(info, str):
            yield f"{key}: {info}: the bytes of a token are those of its hidden size once it is known"
            continue
        stage = config.stages[key.split(".")[1]]
        assert isinstance(stage, GrpoConfig | OpdConfig)
        used = payload_of(stage)
        top_k = 1 if isinstance(stage, GrpoConfig) else min(stage.top_k, info.vocab_size)
        costs = bytes_per_token(info.hidden_size, info.dtype, top_k)
        if isinstance(stage, GrpoConfig):  # it has no choice
            costs = {used: costs[used]}
        order = sorted(costs, key=lambda name: name != used)
        listed = "; ".join(f"{name} {format_bytes(costs[name])}" for name in order)
        layer = info.vocab_size * info.hidden_size * (2 if info.dtype == "bfloat16" else 4)
        yield (
            f"{key}: teacher of {ModelSpec.from_dict(info.spec).num_parameters:,} parameters ({info.dtype}), none of "
            f"them in the trainer"
            + (f" but its output layer ({format_bytes(layer)} over tensor ranks)" if used == "hidden" else "")
            + f"; a response token costs, as this stage asks: {listed}"
        )


def service_warnings(config: WorkflowConfig, stages: Sequence[str]) -> Iterator[str]:
    """Yield servers beyond this machine that are used without a key."""
    for name in stages:
        stage = config.stages[name]
        for domain, settings in services_by_domain(services_of(stage)).items():
            if settings.api_key_file is None and not all(map(is_loopback, settings.urls)):
                yield (
                    f"{service_key(name, stage, domain)}: responses go to {', '.join(settings.urls)} without an API "
                    "key: name its file in api_key_file, for server and client"
                )


def payload_of(stage: GrpoConfig | OpdConfig) -> str:
    """Return the payload that a stage asks for, as ``bytes_per_token`` names it."""
    if isinstance(stage, GrpoConfig) or stage.kl_estimator == "sampled_token":
        return "sampled"
    if stage.kl_estimator == "full_vocab":
        return "hidden"
    return "top_k of the teacher" if stage.top_k_source == "teacher" else "top_k of the student"
