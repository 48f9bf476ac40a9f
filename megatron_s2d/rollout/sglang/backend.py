"""SGLang as a ``ServerBackend``: started servers, a router, and the transfer of weights."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_s2d.config.lora import LoraConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.training import RolloutConfig, SglangConfig, is_loopback
from megatron_s2d.errors import UserError
from megatron_s2d.parallel.collectives import broadcast_from_rank0
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.rollout.served.backend import (
    NO_REQUIREMENTS,
    Bucket,
    ServerProtocol,
    ServerRequirements,
    WeightUpdateFailed,
)
from megatron_s2d.rollout.served.senders import Senders
from megatron_s2d.rollout.served.server_group import ServerGroup
from megatron_s2d.rollout.served.startup_checks import Score
from megatron_s2d.rollout.sglang.adapter_sync import AdapterSync
from megatron_s2d.rollout.sglang.admin import ServerControl, wait_all
from megatron_s2d.rollout.sglang.api_key import (
    authorization,
    is_readable_by_others,
    new_api_key,
    read_api_key,
    remove_api_key,
    write_api_key,
)
from megatron_s2d.rollout.sglang.compatibility import SglangCompatibility
from megatron_s2d.rollout.sglang.memory_fraction import ServerMemory
from megatron_s2d.rollout.sglang.protocol import SglangProtocol
from megatron_s2d.rollout.sglang.server import SglangRouter, SglangServer, is_healthy
from megatron_s2d.rollout.sglang.weight_sync import (
    BroadcastWeightSync,
    DiskWeightSync,
    TensorWeightSync,
    WeightSync,
    refuse_remote,
)


def sglang_server_group(
    chunks: Sequence[torch.nn.Module],
    spec: ModelSpec,
    layout: Layout,
    score: Score,
    settings: RolloutConfig,
    directory: Path,
    *,
    urls: Sequence[str] = (),
    requirements: ServerRequirements = NO_REQUIREMENTS,
    tokenizer: Any = None,
    on_device: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    memory: ServerMemory | None = None,
    senders: Senders | None = None,
    lora: LoraConfig | None = None,
) -> ServerGroup:
    """Return SGLang servers with the weights of ``chunks``; arguments as for ``ServerGroup``, which is collective.

    memory: that started servers may take of their GPUs; None leaves it to SGLang and the user's arguments. senders: of
    weights; by default one of every machine, and rank 0 alone to servers of its own machine. Every server and every
    sender must see ``directory`` under the same path if ``weight_sync`` is disk or adapters are loaded. lora: of the
    adapter of ``chunks``; ignored unless ``lora_sync`` is adapter.
    """
    lora = lora if settings.sglang.lora_sync == "adapter" else None
    if urls and settings.sglang.weight_sync == "tensor":
        refuse_remote(urls)
    dtype = str(next(chunks[0].parameters()).dtype).removeprefix("torch.")
    api_key = broadcast_from_rank0(lambda: _api_key(settings.sglang, attached=bool(urls)))
    compatibility = SglangCompatibility(
        spec,
        requirements,
        settings.server,
        dtype=dtype,
        tokenizer=tokenizer,
        attached=bool(urls),
        headers=authorization(api_key),
        lora=lora,
    )
    backend = SglangBackend(
        settings,
        spec,
        directory,
        compatibility,
        dtype=dtype,
        tokenizer=tokenizer,
        api_key=api_key,
        routed_experts=requirements.routed_experts,
        memory=memory,
        lora=lora,
        senders=senders or (Senders.of_machines() if urls and not any(map(is_loopback, urls)) else Senders.rank_zero()),
    )
    return ServerGroup(
        chunks,
        spec,
        layout,
        score,
        settings,
        directory,
        backend,
        urls=urls,
        requirements=requirements,
        tokenizer=tokenizer,
        on_device=on_device,
        lora=lora,
    )


def _api_key(settings: SglangConfig, *, attached: bool) -> str:
    """Return the key of the user's file; without one a new key for servers that are started, "" for running ones."""
    path = settings.api_key_file
    if path is None:
        return "" if attached else new_api_key()
    if is_readable_by_others(path):
        print(f"{path}: other users may read this API key; run: chmod 600 {path}", flush=True)
    return read_api_key(path)


class SglangBackend:
    """See ``served.backend.ServerBackend``."""

    name = "SGLang"

    def __init__(
        self,
        settings: RolloutConfig,
        spec: ModelSpec,
        directory: Path,
        compatibility: SglangCompatibility,
        *,
        dtype: str,
        tokenizer: Any,
        api_key: str,
        routed_experts: bool = False,
        memory: ServerMemory | None = None,
        lora: LoraConfig | None = None,
        senders: Senders,
    ):
        """directory: of weights, logs and key. dtype: the trainer's. api_key: of all servers; may be empty.

        routed_experts: see ``ServerRequirements``. memory: that a started server may take of its GPUs; None leaves it
        to SGLang and the user's arguments. lora: of adapters that servers load beside the weights that they start with.
        """
        sglang = settings.sglang
        self._routed_experts, self._lora = routed_experts, lora
        self._protocol = SglangProtocol(spec.vocab_size, api_key, routed_experts=routed_experts)
        self.protocol: ServerProtocol = self._protocol
        self._api_key, self._headers = api_key, authorization(api_key)
        self.num_servers, self.uses_router, self.can_sleep = (
            sglang.num_servers,
            sglang.router,
            sglang.enable_memory_saver,
        )
        self.weight_sync: str = sglang.weight_sync if lora is None else "adapter"
        self.bucket_bytes, self.senders = sglang.bucket_bytes, senders
        self.startup_timeout_seconds = sglang.startup_timeout_seconds
        self._settings, self._spec, self._directory, self._dtype = settings, spec, directory, dtype
        self._compatibility, self._memory = compatibility, memory
        self._disk = DiskWeightSync(directory / "weights", spec, tokenizer, senders)
        transports: dict[str, WeightSync] = {
            "disk": self._disk,
            "distributed": BroadcastWeightSync(),
            "tensor": TensorWeightSync(),
        }
        self._sync: WeightSync = transports[sglang.weight_sync]
        if lora is not None:
            self._sync = AdapterSync(directory / "adapters", lora, senders)

    def check_server(self, url: str) -> None:
        """Raise ``UserError`` for a server that does not fit model and stage; ``ServerUnreachable``."""
        self._compatibility.check(url)

    def is_healthy(self, url: str, *, checks: int = 1) -> bool:
        """Return whether the server generates."""
        return is_healthy(url, self._headers, checks=checks)

    def write_start_weights(self, bucket: Bucket, weight_version: str, *, last: bool) -> None:
        """Write this sender's part of the checkpoint that servers are started with."""
        self._disk.write(bucket, weight_version, last=last)

    def commit_start_weights(self) -> None:
        """Start servers with these weights from now on."""
        self._disk.written()

    def start_server(self, number: int) -> SglangServer:
        """Start a server with the last complete checkpoint."""
        if self._disk.complete is None:
            raise RuntimeError("no start weights were written")
        return SglangServer(
            self._settings.sglang,
            self._disk.complete,
            self._directory / f"server-{number}.log",
            write_api_key(self._directory, self._api_key),
            number=number,
            weight_version="none",
            max_positions=self._spec.max_position_embeddings,
            dtype=self._dtype,
            max_tokens=self._settings.max_batch_tokens,
            routed_experts=self._routed_experts,
            memory=self._memory,
            lora=self._lora,
        )

    def start_router(self) -> SglangRouter:
        """Start sglang-router without servers."""
        timeout = self._settings.server.request_timeout_seconds
        key_file = write_api_key(self._directory, self._api_key) if self._api_key else None
        return SglangRouter(self._settings.sglang, timeout, self._directory / "router.log", key_file)

    @contextlib.contextmanager
    def transfer_weights(self, urls: Sequence[str], sleeping_urls: Sequence[str]) -> Iterator[SglangWeightTransfer]:
        """Connect to this sender's servers for a weight update; those at ``sleeping_urls`` are woken up."""
        self._disk.begin()
        with ServerControl(urls, self._headers) as servers, ServerControl(sleeping_urls, self._headers) as sleepers:
            yield SglangWeightTransfer(self._sync, servers, sleepers)

    def use_weights(self, weight_version: str) -> None:
        """Name the adapter of these weights in coming requests, if servers load adapters."""
        if self._lora is not None:
            self._protocol.adapter = weight_version

    def release_memory(self, urls: Sequence[str]) -> dict[str, str]:
        """Release the GPU memory of idle servers; return address -> reason of a failure."""
        with ServerControl(urls, self._headers) as servers:
            return servers.release_memory()

    def weight_digests(self, urls: Sequence[str]) -> dict[str, str]:
        """Address -> digest of the weights that a server holds, for servers on a GPU."""
        with ServerControl(urls, self._headers) as servers:
            return servers.digests()

    def disconnect(self) -> None:
        """Leave process groups shared with the servers."""
        self._sync.reset()

    def remove_files(self) -> None:
        """Remove the files that servers read: weights and keys."""
        remove_api_key(self._directory)
        for name in ("weights", "adapters"):
            shutil.rmtree(self._directory / name, ignore_errors=True)


class SglangWeightTransfer:
    """See ``served.backend.WeightTransfer``."""

    def __init__(self, sync: WeightSync, servers: ServerControl, sleepers: ServerControl):
        """sleepers: those of the servers that have released their memory."""
        self._sync, self._servers, self._sleepers = sync, servers, sleepers

    def begin(self) -> None:
        """Wake servers up, stop their generation and drop the keys and values of the old weights."""
        wait_all(self._sleepers.post("/resume_memory_occupation", {"tags": ["weights", "cuda_graph"]}))
        self._servers.pause()

    def send(self, bucket: Bucket, weight_version: str, *, last: bool) -> None:
        """Send one bucket to this sender's servers, or write it for all."""
        try:
            self._sync.send(self._servers, bucket, weight_version, last=last)
        except (WeightUpdateFailed, UserError):
            self._sync.reset()
            raise

    def commit(self, weight_version: str) -> None:
        """Have the servers load what all senders have written; after it they report ``weight_version``."""
        self._sync.commit(self._servers, weight_version)

    def end(self, *, complete: bool) -> None:
        """Resume generation on the servers. Keys and values come last: the transfer needs memory of its own."""
        self._sync.end(complete=complete)
        wait_all(self._sleepers.post("/resume_memory_occupation", {"tags": ["kv_cache"]}))
        wait_all(self._servers.post("/continue_generation", {}))
