"""Optimizer, checkpoint, sampling, micro-batch and rollout-engine settings, shared by all methods. No torch here."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config

SERVER_SPARE_POSITIONS = 8  # context of a server beyond the longest sequence: SGLang stops shortly before its limit
LEAST_TEMPERATURE = 1e-4  # float32 logits divided by less lose their precision


class OptimizerConfig(Config):
    """AdamW with Megatron's distributed optimizer."""

    lr: float = Field(1e-6, gt=0, le=1, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, le=1, description="learning rate at the end of the cosine or linear decay")
    lr_schedule: Literal["constant", "cosine", "linear"] = Field("constant", description="after the warm-up")
    warmup_steps: int = Field(
        0, ge=0, description="optimizer steps of linear warm-up: step i of n has lr * i / (n + 1)"
    )
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    grad_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0 turns clipping off")


class CheckpointConfig(Config):
    """When a stage saves its training state, from which it can be resumed."""

    interval_steps: int = Field(50, ge=1, description="training steps between two checkpoints")
    keep_last_n: int = Field(2, ge=1, description="number of checkpoints to keep while the stage runs")
    async_save: bool = Field(False, description="write in the background, from a copy in host memory")


class SamplingConfig(Config):
    """Sampling parameters of responses."""

    temperature: float = Field(1.0, ge=0, description="0 is greedy decoding")
    top_p: float = Field(1.0, gt=0, le=1, description="sample among the most likely tokens of this total probability")
    top_k: int = Field(-1, description="sample among this many most likely tokens; -1: all")
    max_response_length: int = Field(16384, ge=1, description="tokens after which a response is truncated")
    stop_strings: list[str] = Field(
        default_factory=list, description="texts that end a response, besides its end token"
    )

    @pydantic.field_validator("temperature")
    @classmethod
    def _check_temperature(cls, value: float) -> float:
        if 0 < value < LEAST_TEMPERATURE:
            raise ValueError(f"temperature must be 0 (greedy) or at least {LEAST_TEMPERATURE}")
        return value

    @pydantic.field_validator("top_k")
    @classmethod
    def _check_top_k(cls, value: int) -> int:
        if value == 0 or value < -1:
            raise ValueError("top_k must be -1 (every token) or at least 1")
        return value


class MicroBatchConfig(Config):
    """How samples are packed into micro-batches; changes gradients by rounding only."""

    max_tokens_per_gpu: int = Field(
        16384, ge=1, description="tokens of one micro-batch, padding included (a longer sample gets its own)"
    )
    sequence_packing: bool = Field(
        False, description="concatenate the sequences of a micro-batch instead of padding them to the longest"
    )


class SglangConfig(Config):
    """SGLang servers that sample responses (docs/rollouts.md)."""

    urls: dict[str, list[str]] = Field(
        default_factory=dict,
        description="entry of `models` -> addresses of running servers; servers are started for entries not named",
    )
    api_key_file: Path | None = Field(
        None,
        description="file with the API key of the servers (SGLang's --api-key); null: those that are started get a "
        "random one, those of `urls` have none",
    )
    num_servers: int = Field(1, ge=1, description="number of servers to start for a model")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs of one started server")
    base_gpu_id: int = Field(0, ge=0, description="first GPU of the started servers, as SGLang's --base-gpu-id")
    python: str | None = Field(None, description="Python interpreter of an environment with sglang; null: this one")
    extra_args: list[str] = Field(default_factory=list, description="additional arguments of sglang.launch_server")
    enable_deterministic_inference: bool = Field(
        False,
        description="SGLang's deterministic inference: responses depend on per-request seeds only. Needs a GPU; slower",
    )
    router: bool = Field(False, description="send requests through sglang-router, which selects a server")
    enable_memory_saver: bool = Field(
        False, description="servers release their GPU memory during training (for GPUs shared with the trainer)"
    )
    weight_sync: Literal["disk", "distributed", "tensor"] = Field(
        "disk",
        description="transport of weight updates: disk: files; distributed: a process group (NCCL or gloo); tensor: "
        "shared memory, for servers on the same machine",
    )
    lora_sync: Literal["merged", "adapter"] = Field(
        "merged",
        description="what servers get of a model with `lora`: merged: weights with the adapter added, by weight_sync; "
        "adapter: the adapter alone, as files for SGLang's /load_lora_adapter, beside the base weights that they have",
    )
    bucket_bytes: int = Field(512 * 2**20, ge=1, description="size of one bucket of weights")
    startup_timeout_seconds: float = Field(900.0, gt=0, description="time limit of starting a server")

    @pydantic.field_validator("urls")
    @classmethod
    def _check_urls(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        for model, urls in value.items():
            for url in urls:
                if not url.startswith(("http://", "https://")):
                    raise ValueError(f"urls.{model}: '{url}' is not an address such as http://127.0.0.1:30000")
                if "@" in urlsplit(url).netloc:
                    raise ValueError(f"urls.{model}: addresses are logged: give keys in api_key_file")
            if not urls or len(set(urls)) < len(urls):
                raise ValueError(f"urls.{model}: give at least one address, each once")
        return value

    @pydantic.field_validator("extra_args")
    @classmethod
    def _check_extra_args(cls, value: list[str]) -> list[str]:
        for argument in value:
            if argument.partition("=")[0] in ("--api-key", "--admin-api-key"):
                raise ValueError(f"extra_args: {argument.partition('=')[0]} is set by the run: leave it out")
        return value

    @property
    def unprotected_urls(self) -> list[str]:
        """Addresses beyond this machine whose servers are used without an API key."""
        urls = [url for model_urls in self.urls.values() for url in model_urls]
        return [] if self.api_key_file is not None else [url for url in urls if not is_loopback(url)]

    def transport_of(self, has_adapter: bool) -> str:
        """Return how a model's weight updates are sent: ``weight_sync``, or adapter. has_adapter: it has ``lora``."""
        return "adapter" if has_adapter and self.lora_sync == "adapter" else self.weight_sync

    @pydantic.model_validator(mode="after")
    def _check_lora_sync(self) -> SglangConfig:
        if self.lora_sync == "adapter" and self.enable_memory_saver:
            raise ValueError(
                "lora_sync: adapter with enable_memory_saver: servers that release their memory lose the base weights, "
                "which are sent once; set lora_sync to merged, or enable_memory_saver to false"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_seeds(self) -> SglangConfig:
        if self.enable_deterministic_inference and self.urls:
            raise ValueError(
                "enable_deterministic_inference applies to started servers only: start the servers in `urls` with "
                "SGLang's --enable-deterministic-inference"
            )
        return self


def is_loopback(url: str) -> bool:
    """Return whether ``url`` is an address of this machine that other machines cannot reach."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ServerConfig(Config):
    """Limits and checks of requests to inference servers, for any engine."""

    max_concurrent_requests: int = Field(256, ge=1, description="requests in flight per server")
    max_attempts: int = Field(4, ge=1, description="attempts of one request before the servers are checked")
    max_restarts: int = Field(2, ge=0, description="restarts or repeated weight updates of servers per step")
    request_timeout_seconds: float = Field(600.0, gt=0, description="time limit of one request")
    weight_check_tolerance: float | None = Field(
        None,
        gt=0,
        description="largest difference in log-probability, in nats, between server and trainer on the check sequences "
        "after a weight update; null: 1e-4 in float32, 0.5 in bfloat16",
    )


class RolloutConfig(Config):
    """The engine that generates responses."""

    engine: Literal["megatron", "sglang"] = Field(
        "megatron", description="megatron: the trained model, in the same process; sglang: SGLang servers"
    )
    max_batch_size: int = Field(1024, ge=1, description="responses generated together (engine megatron)")
    max_batch_tokens: int = Field(
        262_144,
        ge=1,
        description="limit of responses x (prompt + response) tokens of a batch, which bounds the KV cache",
    )
    enforce_eager: bool = Field(
        False,
        description="engine megatron on a GPU: launch the kernels of every token one by one instead of replaying a "
        "CUDA graph (SGLang's disable_cuda_graph)",
    )
    max_mismatch_kl: float | None = Field(
        None,
        gt=0,
        description="stop with an error when the mean KL between engine and trainer (mismatch/k3_kl), in nats per "
        "token, exceeds it",
    )
    routing_replay: bool | None = Field(
        None,
        description="routing replay (R3): the trainer sends every token to the experts that it had when it was "
        "sampled. null: for mixture-of-experts models; true is refused where no such model is trained",
    )
    min_replayed_agreement: float | None = Field(
        0.5,
        gt=0,
        lt=1,
        description="stop with an error when the replayed experts of a layer are too seldom the trainer's own choice "
        "(moe/replayed_agreement_min), counted from chance (0) to always (1)",
    )
    async_mode: Literal["sync", "one_step_off", "partial_rollout"] = Field(
        "sync",
        description="one_step_off: generate the next step's responses during the training step, with weights one step "
        "older; a weight update waits for them. partial_rollout: a weight update interrupts them and they continue "
        "with the new weights. Needs an engine that runs beside the trainer",
    )
    max_staleness: int | None = Field(
        None,
        ge=0,
        le=64,
        description="training steps between the weights that sample a response and the step that trains on it, at "
        "most: generation runs that far ahead, and groups that over_sampling_ratio carries over start again when they "
        "get older. null: 0 with async_mode sync, otherwise 1, and 1 more with over_sampling_ratio above 1. Engine "
        "megatron generates that many steps early, which saves no time",
    )
    over_sampling_ratio: float = Field(
        1.0,
        ge=1.0,
        le=8.0,
        description="prompts in flight per prompt that a step needs; a step trains on the first groups to finish and "
        "carries the others over, for max_staleness steps at most. Needs an engine that runs beside the trainer",
    )
    server: ServerConfig = ServerConfig()
    sglang: SglangConfig = SglangConfig()

    @property
    def staleness(self) -> int:
        """``max_staleness`` with its default."""
        if self.max_staleness is not None:
            return self.max_staleness
        return int(self.async_mode != "sync") + int(self.over_sampling_ratio > 1)

    @pydantic.model_validator(mode="after")
    def _check_staleness(self) -> RolloutConfig:
        if self.async_mode != "sync" and self.staleness == 0:
            raise ValueError(
                f"async_mode {self.async_mode} trains on responses of older weights: set max_staleness to 1 or more, "
                "or async_mode: sync"
            )
        over_samples = self.over_sampling_ratio > 1
        if self.engine == "sglang" and self.async_mode == "sync" and self.staleness > 0 and not over_samples:
            raise ValueError(
                "max_staleness above 0 needs an async_mode with servers: one_step_off (a weight update waits for the "
                "responses in flight) or partial_rollout (it interrupts them)"
            )
        if over_samples and self.async_mode != "sync" and self.staleness < 2:
            raise ValueError(
                f"over_sampling_ratio with async_mode {self.async_mode} needs max_staleness 2 or more: responses are a "
                "step old when they are taken first, and those that are carried over two"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_memory(self) -> RolloutConfig:
        if self.sglang.enable_memory_saver and self.async_mode != "sync":
            raise ValueError(
                "with sglang.enable_memory_saver the servers have no memory during training: set async_mode: sync, or "
                "use separate GPUs for them"
            )
        return self
