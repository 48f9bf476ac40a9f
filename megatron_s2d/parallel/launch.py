"""What a launcher (torchrun, srun) told this process through its environment. No torch here."""

from __future__ import annotations

import os


def is_launched() -> bool:
    """Whether a launcher started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_rank() -> int:
    """This process's rank, as the launcher counts."""
    return int(os.environ["RANK"])


def local_rank() -> int:
    """This process's place among those on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))
