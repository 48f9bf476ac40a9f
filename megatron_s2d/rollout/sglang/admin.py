"""Administration requests to several SGLang servers in parallel, one thread each."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx

from megatron_s2d.errors import UserError
from megatron_s2d.rollout.served.backend import WeightUpdateFailed

_TIMEOUT_SECONDS = 1800.0  # loading a large checkpoint takes minutes
_IDLE_SECONDS = 120  # for the last steps of requests that were aborted


class ServerControl:
    """Use as a context manager; requests that still run at its end are not waited for."""

    def __init__(self, urls: Sequence[str], headers: Mapping[str, str]):
        self.urls = list(urls)
        self._client = httpx.Client(timeout=_TIMEOUT_SECONDS, headers=dict(headers), trust_env=False)
        self._threads = ThreadPoolExecutor(max_workers=max(1, len(self.urls)), thread_name_prefix="weight update")

    def __enter__(self) -> ServerControl:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def post(self, path: str, body: dict[str, Any] | Callable[[int], dict[str, Any]]) -> list[Future[None]]:
        """POST to every server; each result is None, or ``WeightUpdateFailed``. ``body`` may depend on the index."""
        bodies = [body(index) if callable(body) else body for index in range(len(self.urls))]
        return [
            self._threads.submit(self._post, url, path, content) for url, content in zip(self.urls, bodies, strict=True)
        ]

    def pause(self) -> None:
        """Abort all requests and wait until nothing runs."""
        wait_all(self.post("/pause_generation", {"mode": "abort"}))
        # A request that its sender aborted may still be running, and SGLang ends itself if it has to drop the keys and
        # values of old weights then: wait until it is idle.
        wait_all(self.post(f"/flush_cache?timeout={_IDLE_SECONDS}", {}))

    def _post(self, url: str, path: str, body: dict[str, Any]) -> None:
        try:
            reply = self._client.post(url + path, json=body)
        except httpx.HTTPError as error:
            raise WeightUpdateFailed(f"{url}{path}: {type(error).__name__}") from None
        if reply.status_code != 200:
            raise WeightUpdateFailed(f"{url}{path}: status {reply.status_code}: {reply.text[:300]}")

    def release_memory(self) -> dict[str, str]:
        """Release the GPU memory of every server; return address -> reason of a failure."""
        futures = {url: self._threads.submit(self._release_memory, url) for url in self.urls}
        concurrent.futures.wait(futures.values())
        return {url: str(error) for url, future in futures.items() if (error := future.exception()) is not None}

    def _release_memory(self, url: str) -> None:
        # A server that is not idle does not survive the request; its caches can be emptied only when it is.
        self._post(url, f"/flush_cache?timeout={_IDLE_SECONDS}", {})
        self._post(url, "/release_memory_occupation", {})

    def digests(self) -> dict[str, str]:
        """Return address -> digest of the weights that a server holds, for servers that can compute one (on a GPU)."""
        futures = {url: self._threads.submit(self._digest, url) for url in self.urls}
        return {url: digest for url, future in futures.items() if (digest := future.result())}

    def _digest(self, url: str) -> str:
        try:
            reply = self._client.post(f"{url}/weights_checker", json={"action": "checksum"})
            return reply.json().get("per_engine_checksum", "") if reply.status_code == 200 else ""
        except (httpx.HTTPError, ValueError, AttributeError):
            return ""

    def load_adapter(self, name: str, directory: str, older: str) -> list[Future[None]]:
        """Load the LoRA adapter ``name`` on every server, report it as the version, and unload older ones.

        older: beginning of the names of those that may be unloaded.
        """
        return [self._threads.submit(self._load_adapter, url, name, directory, older) for url in self.urls]

    def _load_adapter(self, url: str, name: str, directory: str, older: str) -> None:
        try:
            models = self._client.get(f"{url}/v1/models").json()["data"]
            loaded = [model["id"] for model in models if model.get("parent") and model["id"].startswith(older)]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise WeightUpdateFailed(f"{url}/v1/models: {type(error).__name__}: {error}") from None
        if name in loaded:  # by an update that failed afterwards
            self._post(url, "/unload_lora_adapter", {"lora_name": name})
        self._post(url, "/load_lora_adapter", {"lora_name": name, "lora_path": directory})
        self._post(url, "/update_weight_version", {"new_version": name, "abort_all_requests": False})
        for other in loaded:
            if other != name:
                self._post(url, "/unload_lora_adapter", {"lora_name": other})

    def ranks(self) -> list[int]:
        """Return the number of ranks of each server; ``UserError`` for one with pipeline parallelism.

        SGLang 0.5.17 numbers the ranks of a group by tensor rank only, so those of two pipeline stages would collide.
        """
        counts = []
        for url in self.urls:
            try:
                info = self._client.get(f"{url}/server_info").json()
                ranks, stages = int(info["tp_size"]), int(info["pp_size"])
            except (httpx.HTTPError, ValueError, KeyError) as error:
                raise WeightUpdateFailed(f"{url}/server_info: {type(error).__name__}: {error}") from None
            if stages > 1:
                raise UserError(
                    f"{url} runs with --pp-size {stages}, and only rollout.sglang.weight_sync: disk reaches "
                    "several pipeline stages: set that, or start the server with --tp-size instead"
                )
            counts.append(ranks)
        return counts


def wait_all(futures: Sequence[Future[None]]) -> None:
    """Wait for all; raise the first failure."""
    concurrent.futures.wait(futures)
    for future in futures:
        future.result()


def first_failure(futures: Sequence[Future[None]]) -> WeightUpdateFailed | None:
    """Return the failure of a request that has ended, if one has failed."""
    for future in futures:
        if future.done() and (error := future.exception()) is not None:
            return (
                error
                if isinstance(error, WeightUpdateFailed)
                else WeightUpdateFailed(f"{type(error).__name__}: {error}")
            )
    return None
