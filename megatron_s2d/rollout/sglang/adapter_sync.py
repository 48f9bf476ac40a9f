"""LoRA adapters on SGLang servers: written as a PEFT directory and loaded beside the base weights, one a version.

The servers have the base weights from their start. An adapter's name is the weight version; requests name it
(``protocol.py``), so a server never answers with another one. Names of one run begin with its tag.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_s2d.artifacts.files import disk_errors
from megatron_s2d.config.lora import LoraConfig
from megatron_s2d.models.peft_files import write_adapter
from megatron_s2d.rollout.served.backend import Bucket
from megatron_s2d.rollout.served.senders import Senders
from megatron_s2d.rollout.sglang.admin import ServerControl, wait_all


class AdapterSync:
    """See ``weight_sync.WeightSync``; the only bucket of an update has A and B of every target."""

    def __init__(self, directory: Path, lora: LoraConfig, senders: Senders):
        """directory: every server sees it under the same path; holds one version between updates."""
        self._parent, self._lora, self._senders = directory, lora, senders
        self._newest: Path | None = None

    def send(self, servers: ServerControl, bucket: Bucket, weight_version: str, *, last: bool) -> None:
        """Write the PEFT directory of ``weight_version``; the first sender does, for the servers of all."""
        assert last, "an adapter is one bucket"
        self._newest = self._parent / weight_version
        if self._senders.index == 0:
            with disk_errors(self._newest):
                shutil.rmtree(self._newest, ignore_errors=True)  # of an update that failed
                self._parent.mkdir(parents=True, exist_ok=True)
                write_adapter(self._newest, self._lora, dict(bucket), "")

    def commit(self, servers: ServerControl, weight_version: str) -> None:
        """Load the adapter, name it the server's version, and unload the older ones of this run."""
        assert self._newest is not None
        tag, _, _ = weight_version.rpartition("-")
        wait_all(servers.load_adapter(weight_version, str(self._newest.resolve()), older=f"{tag}-"))

    def end(self, *, complete: bool) -> None:
        """Remove the directories of older versions, once every server has the newest."""
        if complete and self._senders.index == 0 and self._parent.is_dir():
            for other in self._parent.iterdir():
                if other != self._newest:
                    shutil.rmtree(other)

    def reset(self) -> None:
        """Do nothing: this transport has no state that a failure could spoil."""
