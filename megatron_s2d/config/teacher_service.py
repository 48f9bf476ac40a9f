"""A teacher on other machines: where it is (client) and how it is served (``s2d serve-teacher``). No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import MicroBatchConfig


class TeacherServiceConfig(Config):
    """A teacher that ``s2d serve-teacher`` serves; the trainer holds no copy of it (docs/teachers.md)."""

    url: str | list[str] = Field(
        description="address of the server, such as http://10.0.0.5:8400, or a list of servers with the same weights"
    )
    api_key_file: Path | None = Field(None, description="file with the key that the server asks for; null: none")
    tokenizer: str | None = Field(
        None,
        description="tokenizer of the teacher for a teacher_view with chat_template: teacher; null: the student's",
    )
    chat_template: Path | None = Field(None, description="file of a Jinja chat template instead of the tokenizer's own")
    cross_tokenizer: bool = Field(
        False,
        description="the teacher has the tokenizer named in `tokenizer`, with other ids than the student's: its "
        "likelihood of the same text, cut where both tokenizers have a boundary, is the reward of the student's tokens "
        "(an approximation, docs/teachers.md); needs kl_estimator: sampled_token and a teacher_view with "
        "chat_template: teacher",
    )
    weights_digest: str | None = Field(
        None,
        description="digest of the weights that the server must hold (it prints it); null: those that it holds when "
        "the stage starts",
    )
    overlap: bool = Field(
        True,
        description="ask for scores of a group as soon as it is sampled, while the trainer works; false: one request "
        "after the other when scores are needed. The results are the same, bit for bit",
    )
    queue_bytes: int = Field(
        2**30, ge=1, description="scores that wait in a rank's memory until the trainer reads them, at most"
    )
    max_concurrent_requests: int = Field(4, ge=1, le=256, description="requests of a rank in flight")
    max_attempts: int = Field(
        10, ge=1, description="attempts of one request, with pauses of 0.5 s to 30 s, before the run stops"
    )
    request_timeout_seconds: float = Field(300.0, gt=0, description="time limit of one attempt")
    weight_check_tolerance: float | None = Field(
        None,
        gt=0,
        description="largest difference in log-probability of the check sequences, in nats, after a server has "
        "restarted; null: 1e-4 in float32, 0.5 in bfloat16",
    )

    @pydantic.model_validator(mode="after")
    def _check_url(self) -> TeacherServiceConfig:
        for url in self.urls:
            if not url.startswith(("http://", "https://")) or not urlsplit(url).hostname:
                raise ValueError(f"url: '{url}' is not an address such as http://127.0.0.1:8400")
            if "@" in urlsplit(url).netloc:
                raise ValueError("url: addresses are logged: give the key in api_key_file")
        if not self.urls or len(set(self.urls)) < len(self.urls):
            raise ValueError("url: give at least one address, each once")
        return self

    @pydantic.model_validator(mode="after")
    def _check_cross_tokenizer(self) -> TeacherServiceConfig:
        if self.cross_tokenizer and self.tokenizer is None:
            raise ValueError("cross_tokenizer needs `tokenizer`, the teacher's")
        return self

    @property
    def urls(self) -> list[str]:
        """All addresses, without a slash at the end."""
        return [url.rstrip("/") for url in ([self.url] if isinstance(self.url, str) else self.url)]


TeacherServices = TeacherServiceConfig | dict[str, TeacherServiceConfig]
"""One served teacher for all domains, or domain -> served teacher."""


def services_of(stage: object) -> TeacherServices | None:
    """Return the served teachers of a stage: its own, or those of GRPO's ``teacher_advantage``."""
    owner = getattr(stage, "teacher_advantage", None) or stage
    return getattr(owner, "teacher_service", None)


def service_key(stage_name: str, stage: object, domain: str | None) -> str:
    """Return the key of a served teacher in the configuration, which is also its key among specifications."""
    owner = ".teacher_advantage" if getattr(stage, "teacher_advantage", None) is not None else ""
    return f"stages.{stage_name}{owner}.teacher_service" + (f".{domain}" if domain else "")


def services_by_domain(services: TeacherServices | None) -> dict[str | None, TeacherServiceConfig]:
    """Return domain -> service; one for all domains has the key None."""
    by_domain: dict[str | None, TeacherServiceConfig] = {}
    if isinstance(services, Mapping):
        for domain in services:
            by_domain[domain] = services[domain]
    elif services is not None:
        by_domain[None] = services
    return by_domain


class ServeTeacherConfig(Config):
    """The file of ``s2d serve-teacher``."""

    model: ModelConfig = Field(description="the teacher, as an entry of a workflow's `models`, with a `path`")
    tokenizer: str | None = Field(
        None, description="its tokenizer, with which clients compare theirs; null: the one in the model's folder"
    )
    parallel: ParallelConfig = ParallelConfig()
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    micro_batch: MicroBatchConfig = MicroBatchConfig()
    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0: all of this machine's")
    port: int = Field(8400, ge=0, le=65535, description="0: a free one, which is printed")
    api_key_file: Path | None = Field(
        None,
        description="file with the key that requests need, one line; null: none, which only loopback addresses allow",
    )
    max_request_tokens: int = Field(2**20, ge=1, description="tokens of one request, prompts included")
    max_waiting_requests: int = Field(1024, ge=1, description="requests that wait; further ones are told to come back")
    threads_per_rank: int | None = Field(None, ge=1, description="CPU threads of one rank; null: the cores divided")

    @pydantic.model_validator(mode="after")
    def _check_served(self) -> ServeTeacherConfig:
        if self.model.path is None:
            raise ValueError("model: a teacher that is served has a `path` to its weights")
        if self.parallel.data_parallel_size > 1 or self.parallel.context_parallel_size > 1:
            raise ValueError(
                "parallel: a server is one replica, without data and context parallelism: start one server for each "
                "replica, and name all of them in the stage's teacher_service.url"
            )
        if self.parallel.virtual_pipeline_model_parallel_size > 1:
            raise ValueError("parallel: a server has no virtual pipeline stages: remove them")
        return self
