"""Bounds of settings that only a slip of the keyboard exceeds, each with the reason. No torch here."""

from __future__ import annotations

from typing import Any

from megatron_s2d.errors import UserError

LARGEST_INTEGER = 10**12
LARGEST_FLOAT = 1e30

_CONTEXT = (10**8, "longer than the context of any model")
_MEMORY = "every rank has a record of each sample of a step in memory"
_LIMITS: dict[str, tuple[float, str]] = {
    "steps": (10**7, "at a step a second that would take four months"),
    "train_batch_size": (10**6, _MEMORY),
    "global_batch_size": (10**6, _MEMORY),
    "generation_batch_size": (10**6, _MEMORY),
    "eval_batch_size": (10**6, _MEMORY),
    "num_generations": (10**4, _MEMORY),
    "samples_per_prompt": (10**5, "every sample is stored and graded"),
    "ppo_epochs": (10**3, "that many passes only fit the noise of one batch"),
    "temperature": (100, "above that tokens are drawn almost uniformly"),
    "weight_decay": (10, "weights would vanish in a few steps"),
    "max_response_length": _CONTEXT,
    "max_prompt_length": _CONTEXT,
    "threads_per_rank": (4096, "no machine has that many cores"),
    "max_parallel_stages": (1000, "each has its own processes"),
    "initializer_range": (10, "outputs of such weights overflow"),
    "norm_eps": (0.1, "norms would be dominated by it"),
}
# Mappings whose keys are names of the user: columns, models, stages, domains.
_NAMED = ("min_values", "models", "data", "stages", "arms")


def refuse_implausible_numbers(value: Any, source: str, key: str = "", *, named: bool = False) -> None:
    """Raise ``UserError`` for the first number in plain data that is beyond its bound; ``key`` is its place.

    named: the keys of this mapping are names and not settings.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            place = f"{key}.{name}" if key else str(name)
            refuse_implausible_numbers(item, source, place, named=name in _NAMED and not named)
            if not named and isinstance(item, int | float) and not isinstance(item, bool):
                _check_limit(str(name), item, f"{source}: {place}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            refuse_implausible_numbers(item, source, f"{key}.{index}")
    elif isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise UserError(
            f"{source}: {key}: {value:.3g} is more than anything counted here (at most {LARGEST_INTEGER:,})"
        )
    elif isinstance(value, float) and abs(value) > LARGEST_FLOAT:
        raise UserError(f"{source}: {key}: {value:.3g} is too large for float32 arithmetic (at most {LARGEST_FLOAT:g})")


def _check_limit(name: str, value: float, where: str) -> None:
    largest, reason = _LIMITS.get(name, (None, ""))
    if largest is not None and value > largest:
        raise UserError(f"{where}: {value:,} is above {largest:,}: {reason}")
