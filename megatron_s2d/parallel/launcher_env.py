"""What a launcher (torchrun, srun) told this process through its environment. No torch here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from megatron_s2d.errors import UserError

# A server that a rank starts has process groups of its own and must not take these for its own place.
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """Whether a launcher started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_rank() -> int:
    """This process's rank, as the launcher counts."""
    return int(os.environ["RANK"])


def launched_world_size() -> int:
    """How many ranks the launcher started; ``UserError`` without one."""
    if not is_launched():
        raise UserError("--elastic takes the number of ranks from torchrun or srun; start s2d under one of them")
    return int(os.environ["WORLD_SIZE"])


def local_rank() -> int:
    """This process's place among those on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def child_environment(added: Mapping[str, str], path: Path | None = None) -> dict[str, str]:
    """This process's environment for a child that is no rank: without the launcher's variables, with ``added``, and
    with ``path`` first on its module search path."""
    found = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK} | dict(added)
    if path is not None:
        found["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [found.get("PYTHONPATH")])])
    return found
