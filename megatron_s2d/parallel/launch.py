"""What a launcher (torchrun, srun) told this process through its environment. No torch here."""

from __future__ import annotations

import os

from megatron_s2d.config.base import UserError


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
