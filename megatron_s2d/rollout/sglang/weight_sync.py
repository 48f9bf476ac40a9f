"""Three transports of a bucket of weights from a sender of the trainer to SGLang servers; names are Hugging Face's.

Files that the servers read (``DiskWeightSync``), broadcasts in a process group of a sender and its servers' ranks
(``BroadcastWeightSync``: NCCL, or gloo on a CPU), and memory shared on one machine (``TensorWeightSync``). All raise
``WeightUpdateFailed``. That the weights arrived complete is checked elsewhere (``served/weight_checks.py``).
"""

from __future__ import annotations

import base64
import datetime
import io
import json
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol

import httpx
import torch
import torch.distributed as dist
import torch.multiprocessing  # also registers with ForkingPickler how tensors are shared
from safetensors.torch import save_file
from torch.distributed import distributed_c10d

from megatron_s2d.artifacts.files import disk_errors
from megatron_s2d.config.hf_config import hf_config_from_spec
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.training import is_loopback
from megatron_s2d.errors import UserError
from megatron_s2d.models.hf_checkpoint import INDEX_NAME
from megatron_s2d.parallel import device
from megatron_s2d.rollout.served.backend import Bucket, WeightUpdateFailed
from megatron_s2d.rollout.served.senders import Senders
from megatron_s2d.rollout.sglang.admin import ServerControl, first_failure, wait_all

_HOST = "127.0.0.1"
_GROUP_SECONDS = 300.0


class WeightSync(Protocol):
    """Sends the buckets of one weight update after another."""

    def send(self, servers: ServerControl, bucket: Bucket, weight_version: str, *, last: bool) -> None:
        """Send one bucket to the sender's servers, or write this sender's part of the files.

        After the ``last`` one of an update, and ``commit``, they report ``weight_version``.
        """
        ...

    def commit(self, servers: ServerControl, weight_version: str) -> None:
        """Have the servers load what all senders have written."""
        ...

    def end(self, *, complete: bool) -> None:
        """End an update. complete: no sender has failed."""
        ...

    def reset(self) -> None:
        """Reset after a failure: what the servers hold or are connected to is unknown."""
        ...


class DiskWeightSync:
    """Writes a Hugging Face directory, one file per bucket, and has the servers read it under the same path.

    Senders write the files in turn; each knows all of them, and the first writes what belongs to none.
    """

    def __init__(self, directory: Path, spec: ModelSpec, tokenizer: Any, senders: Senders):
        """directory: holds one version between weight updates. tokenizer: may be None."""
        self._parent, self._spec, self._tokenizer, self._senders = directory, spec, tokenizer, senders
        self._path: Path | None = None  # being written
        self._attempt = 0
        self._weight_map: dict[str, str] = {}
        self._num_bytes = self._num_files = 0
        self.complete: Path | None = None  # the last version that was written completely

    def begin(self) -> None:
        """Begin a version, which has another name than any before: a server may still read one that failed."""
        self._attempt += 1
        self._restart()

    def send(self, servers: ServerControl, bucket: Bucket, weight_version: str, *, last: bool) -> None:
        """See ``WeightSync``."""
        self.write(bucket, weight_version, last=last)

    def write(self, bucket: Bucket, weight_version: str, *, last: bool) -> None:
        """Write one more file of ``weight_version``, if it is this sender's; with the last one also the index."""
        self._path = path = self._parent / f"{weight_version}.{self._attempt}"
        name = f"model-{self._num_files:05d}.safetensors"
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            if self._senders.writes(self._num_files):
                # Cloned, because the tensors of a bucket are views of one tensor, which the format does not allow.
                contents = {key: tensor.cpu().clone() for key, tensor in bucket}
                save_file(contents, path / name, metadata={"format": "pt"})
            self._weight_map |= {key: name for key, _ in bucket}
            self._num_bytes += sum(tensor.nbytes for _, tensor in bucket)
            self._num_files += 1
            if last and self._senders.index == 0:
                self._finish(path, str(bucket[0][1].dtype).removeprefix("torch."))

    def _finish(self, path: Path, dtype: str) -> None:
        index = {"metadata": {"total_size": self._num_bytes}, "weight_map": self._weight_map}
        (path / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
        (path / "config.json").write_text(json.dumps(hf_config_from_spec(self._spec, dtype)), encoding="utf-8")
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(path)

    def written(self) -> Path:
        """Return the new version, which all senders have written, and which is ``complete`` from now on."""
        assert self._path is not None
        self._remove_except(self._path, self.complete)
        self.complete = self._path
        self._restart()
        return self.complete

    def commit(self, servers: ServerControl, weight_version: str) -> None:
        """See ``WeightSync``."""
        path = str(self.written().resolve())
        body = {"model_path": path, "weight_version": weight_version, "flush_cache": True}
        wait_all(servers.post("/update_weights_from_disk", body))

    def end(self, *, complete: bool) -> None:
        """See ``WeightSync``; after a failure two versions stay, because a server may still read the older one."""
        if complete:
            self._remove_except(self.complete)
        elif self._path is not None and self._senders.index == 0:  # a sender has not written its part
            shutil.rmtree(self._path, ignore_errors=True)
        self._restart()

    def _remove_except(self, *paths: Path | None) -> None:
        """Remove other versions: all but the newest once every server has read that, all but two before."""
        for other in self._parent.iterdir() if self._senders.index == 0 else ():
            if other not in paths:
                shutil.rmtree(other)

    def reset(self) -> None:
        """Do nothing: ``end`` removes an incomplete version, when no other sender writes into it any more."""

    def _restart(self) -> None:
        self._path, self._weight_map, self._num_bytes, self._num_files = None, {}, 0, 0


class TensorWeightSync:
    """Sends buckets through shared memory (CUDA IPC for tensors on a GPU)."""

    def send(self, servers: ServerControl, bucket: Bucket, weight_version: str, *, last: bool) -> None:
        """See ``WeightSync``."""
        if not device.capabilities().cuda:
            # The other strategy passes file descriptors, which only related processes can.
            torch.multiprocessing.set_sharing_strategy("file_system")
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump(bucket)  # views of one tensor, whose memory is shared once
        text = base64.b64encode(buffer.getvalue()).decode("ascii")
        counts = servers.ranks()

        def body(index: int) -> dict[str, Any]:
            return {
                "serialized_named_tensors": [text] * counts[index],
                "flush_cache": last,
                "weight_version": weight_version if last else None,
            }

        wait_all(servers.post("/update_weights_from_tensor", body))

    def commit(self, servers: ServerControl, weight_version: str) -> None:
        """Do nothing: the servers have loaded every bucket."""

    def end(self, *, complete: bool) -> None:
        """Do nothing: this transport has no state."""

    def reset(self) -> None:
        """Do nothing: this transport has no state."""


class BroadcastWeightSync:
    """Broadcasts buckets in a group of this process and all ranks of the servers, created again after a failure."""

    def __init__(self) -> None:
        self._urls: list[str] = []
        self._name = ""
        self._connected = False  # whether the first broadcast of the group has ended
        self._group: dist.ProcessGroup | None = None

    def send(self, servers: ServerControl, bucket: Bucket, weight_version: str, *, last: bool) -> None:
        """See ``WeightSync``; every sender has a group of its own, and its servers are in no other."""
        if not servers.urls:
            return
        if self._group is None or self._urls != servers.urls:
            self.reset()
            self._join(servers)
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": self._name,
            "load_format": "flattened_bucket",
            "flush_cache": last,
            "weight_version": weight_version if last else None,
        }
        replies = servers.post("/update_weights_from_distributed", body)
        flat = torch.cat([tensor.contiguous().flatten().view(torch.uint8) for _, tensor in bucket])
        # A server that refuses answers at once and never joins: waiting for the broadcast alone would hang.
        work = self._start_broadcast(flat, replies)
        while not work.is_completed():
            if (failure := first_failure(replies)) is not None:
                raise failure
            time.sleep(0.0005)
        self._connected = True
        wait_all(replies)

    def _start_broadcast(self, flat: torch.Tensor, replies: Sequence[Future[None]]) -> dist.Work:
        """Start to send ``flat``. NCCL connects in the first call of a group, which returns when all ranks have."""
        if self._connected:
            return dist.broadcast(flat, src=0, group=self._group, async_op=True)
        group, stream = self._group, torch.cuda.current_stream() if flat.is_cuda else None
        started: Future[dist.Work] = Future()

        def start() -> None:
            try:
                with torch.cuda.stream(stream):  # the current one, and its device, are those of a thread
                    started.set_result(dist.broadcast(flat, src=0, group=group, async_op=True))
            except Exception as error:
                started.set_exception(WeightUpdateFailed(f"the weight group did not form: {error}"))

        # A thread that is never joined: NCCL offers no way out of this call.
        threading.Thread(target=start, name="weight group", daemon=True).start()
        deadline = time.monotonic() + _GROUP_SECONDS
        while not started.done():
            failure = first_failure(replies)
            if failure is None and time.monotonic() > deadline:
                failure = WeightUpdateFailed(f"the weight group did not form within {_GROUP_SECONDS} s")
            if failure is not None:
                self._group = None  # left as it is: destroying it would wait for the thread
                raise failure
            time.sleep(0.0005)
        return started.result()

    def commit(self, servers: ServerControl, weight_version: str) -> None:
        """Do nothing: the servers have loaded every bucket."""

    def end(self, *, complete: bool) -> None:
        """Do nothing: the group stays for the next update."""

    def reset(self) -> None:
        """Leave the group; the next one has another name."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _join(self, servers: ServerControl) -> None:
        counts, host = servers.ranks(), trainer_address(servers.urls)
        world_size, backend, seconds = 1 + sum(counts), device.backend(), datetime.timedelta(seconds=_GROUP_SECONDS)
        store = dist.TCPStore(host, 0, world_size, True, seconds, wait_for_workers=False)
        self._name = f"weights-{uuid.uuid4().hex[:12]}"

        def body(index: int) -> dict[str, Any]:
            return {
                "master_address": host,
                "master_port": store.port,
                "rank_offset": 1 + sum(counts[:index]),
                "world_size": world_size,
                "group_name": self._name,
                "backend": backend,
            }

        joined = servers.post("/init_weights_update_group", body)
        try:
            # There is no public function for a group with processes outside of the default one.
            group, _ = distributed_c10d._new_process_group_helper(
                world_size,
                0,
                [],
                distributed_c10d.Backend(backend),
                dist.PrefixStore(self._name, store),
                group_name=self._name,
                timeout=seconds,
            )
        except (RuntimeError, dist.DistError) as error:
            raise first_failure(joined) or WeightUpdateFailed(f"the weight group did not form: {error}") from None
        distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
        self._group, self._urls, self._connected = group, list(servers.urls), False
        wait_all(joined)


def trainer_address(urls: Sequence[str]) -> str:
    """Return the address by which the servers at ``urls`` reach this machine: loopback if all of them are on it."""
    remote = [httpx.URL(url) for url in urls if not is_loopback(url)]
    if not remote:
        return _HOST
    try:
        target = socket.getaddrinfo(remote[0].host, remote[0].port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(target[0], socket.SOCK_DGRAM) as probe:
            probe.connect(target[4])  # sends nothing; the system chooses the interface
            return probe.getsockname()[0]
    except OSError as error:
        raise WeightUpdateFailed(f"{remote[0]}: no route to that machine ({error})") from None


def refuse_remote(urls: Sequence[str]) -> None:
    """Raise ``UserError`` for a server on another machine, which shared memory does not reach."""
    for url in urls:
        if not is_loopback(url):
            raise UserError(
                f"rollout.sglang.urls: {url} is another machine, which weight_sync: tensor does not reach; set "
                "rollout.sglang.weight_sync: distributed, or disk (through a directory that both see)"
            )
