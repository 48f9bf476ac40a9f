"""From rewards, which are any finite numbers, and failures of grading to verdicts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from megatron_s2d.config.reward import FunctionReward, HttpReward
from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt
from megatron_s2d.verify.verifier import Verdict

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """A response that could not be graded."""

    label: str  # one word: "timeout", "error", ...
    message: str  # what happened, one line


Graded = tuple[float, str | None] | Failure  # reward with the grader's remark, or a failure


def verdict_of(reward: float, correct_at: float, detail: str | None = None) -> Verdict:
    """Return the verdict of a reward: ``correct`` from ``correct_at`` on, else ``wrong``."""
    return Verdict(reward, "correct" if reward >= correct_at else "wrong", detail)


def as_verdicts(
    prompts: Sequence[Prompt], graded: Sequence[Graded], settings: FunctionReward | HttpReward, name: str
) -> list[Verdict]:
    """Return the verdicts; failures get ``failure_reward``, their own label, and one line in the log for all.

    A failure is never ``correct``, whatever its reward. Raises ``UserError`` for a failure where ``failure_reward`` is
    None.
    """
    failures = [(prompt, item) for prompt, item in zip(prompts, graded, strict=True) if isinstance(item, Failure)]
    if failures:
        prompt, failure = failures[0]
        line = (
            f"{name}: {len(failures)} of {len(graded)} responses could not be graded, for example to prompt "
            f"{prompt.id}: {failure.label}: {failure.message}"
        )
        if settings.failure_reward is None:
            raise UserError(f"{line}; mend it, or set failure_reward to a number to continue with that reward")
        logger.warning("%s (they count as reward %g)", line, settings.failure_reward)
    verdicts = []
    for item in graded:
        if isinstance(item, Failure):
            assert settings.failure_reward is not None
            verdicts.append(Verdict(settings.failure_reward, item.label, item.message))
        else:
            verdicts.append(verdict_of(item[0], settings.correct_at, item[1]))
    return verdicts
