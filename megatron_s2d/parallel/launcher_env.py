"""Environment variables of the launcher (torchrun, srun) that started this rank. No torch here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from megatron_s2d.errors import UserError

# A server that a rank starts creates process groups of its own and must not inherit these.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """Return whether a launcher started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_world_size() -> int:
    """Return the number of ranks that the launcher started; ``UserError`` without a launcher."""
    if not is_launched():
        raise UserError("--elastic takes the number of ranks from torchrun or srun; start s2d under one of them")
    return int(os.environ["WORLD_SIZE"])


def local_rank() -> int:
    """Return this process's rank on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first_of_machine(rank: int) -> bool:
    """Return whether ``rank`` (this process) is the first of its machine; without a launcher all ranks are on one."""
    return (local_rank() if is_launched() else rank) == 0


def child_environment(added: Mapping[str, str], path: Path | None = None) -> dict[str, str]:
    """Return the environment for a child process that is not a rank: without the launcher's variables, with ``added``.

    path: put first on the child's module search path.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES} | dict(added)
    if path is not None:
        search_path = [str(path), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(search_path)
    return environment


def use_nccl_like_sglang() -> None:
    """Set what NCCL reads at its first call as SGLang does, so that both can be in one group; call it before that.

    SGLang allocates NCCL's buffers without cuMem. A trainer that uses it, as by default, fails to map those of a server
    on its machine ("invalid argument"). NVLS needs cuMem. A variable that the user has set stays.
    """
    os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
