"""Rewards of a data source beside the verifiers with a name: functions, HTTP endpoints, test cases, sums; no torch.

``verifier:`` of a data source takes one of them, or a text: the name of a verifier, ``module:function``, or an URL.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config, dump

FUNCTION_PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
CORRECT_AT = (
    "smallest reward of a correct response: what pass@k, pass-rate checks, `only_correct` and the verdict count as "
    "correct (avg@k and advantages use the reward itself)"
)
FAILURE_REWARD = "reward of a response whose grading failed, after all retries; null: stop the run with an error"


class FunctionReward(Config):
    """A Python function of the user, called in worker processes (docs/rewards.md)."""

    type: Literal["function"] = "function"
    function: str = Field(
        pattern=FUNCTION_PATTERN,
        description="`module:function`; the module is importable from the working directory, or installed",
    )
    timeout_seconds: float = Field(30.0, gt=0, description="time of one call, after which its process is killed")
    batch_size: int = Field(
        1, ge=1, description="responses of a call; above 1 the function gets lists of at most so many, returns a list"
    )
    concurrency: int = Field(1, ge=1, description="calls that an async function awaits at the same time in one process")
    num_workers: int | None = Field(None, ge=1, description="worker processes; null: one per core, at most 8")
    correct_at: float = Field(1.0, description=CORRECT_AT)
    failure_reward: float | None = Field(0.0, description=FAILURE_REWARD)

    @pydantic.model_validator(mode="after")
    def _check_calls(self) -> FunctionReward:
        if self.batch_size > 1 and self.concurrency > 1:
            raise ValueError("batch_size and concurrency are two ways to grade several responses: set one of them")
        return self


class HttpReward(Config):
    """A judge or a reward model behind an HTTP endpoint (docs/rewards.md)."""

    type: Literal["http"] = "http"
    url: str = Field(description="the only address that is asked; redirects and proxies are not followed")
    protocol: Literal["json", "openai"] = Field(
        "json",
        description='json: POST {"prompt", "response", "answer"}, reply {"reward": number}; openai: chat completions, '
        "whose text is read by `score_pattern`",
    )
    model: str | None = Field(None, description="for protocol openai: name of the judge")
    template: str = Field(
        "Question:\n{prompt}\n\nReference answer:\n{answer}\n\nResponse:\n{response}\n\nIs the response correct? End "
        "with 'Score: ' and a number from 0 (wrong) to 1 (right).",
        description="for protocol openai: the judge's message, with the places {prompt}, {response} and {answer}",
    )
    score_pattern: str = Field(
        r"[Ss]core:\s*(-?\d+(?:\.\d+)?)",
        description="for protocol openai: regular expression with one group; its last match in the text is the reward",
    )
    max_tokens: int = Field(1024, ge=1, description="for protocol openai: tokens of the judge's text")
    api_key_file: Path | None = Field(None, description="file with the key that is sent as a bearer token")
    timeout_seconds: float = Field(60.0, gt=0, description="time of one attempt, from connection to the last byte")
    max_retries: int = Field(3, ge=0, le=20, description="further attempts after refused connections, 429 and 5xx")
    max_concurrent_requests: int = Field(16, ge=1, le=1024, description="requests in flight, of one data-parallel rank")
    max_reply_bytes: int = Field(1 << 20, ge=64, description="longer replies are refused")
    correct_at: float = Field(1.0, description=CORRECT_AT)
    failure_reward: float | None = Field(0.0, description=FAILURE_REWARD)

    @pydantic.model_validator(mode="after")
    def _check_endpoint(self) -> HttpReward:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise ValueError(f"url {self.url!r}: expected http://host:port/path or https://..., without a user name")
        if (self.protocol == "openai") != (self.model is not None):
            raise ValueError("`model` goes with protocol: openai, and only with it")
        try:
            groups = re.compile(self.score_pattern).groups
        except re.error as error:
            raise ValueError(f"score_pattern is not a regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"score_pattern needs one group in parentheses, the number; it has {groups}")
        return self


class MathReward(Config):
    """Mathematical answers, with the last number of a response where it states no answer; `verifier: math` has none."""

    type: Literal["math"] = "math"
    last_number: bool = Field(
        True, description="a response without a box, `####` or 'the answer is' answers with its last number"
    )


class CodeReward(Config):
    """Unit tests with a reward for the share of the test cases that pass; `verifier: code` is all or nothing."""

    type: Literal["code"] = "code"
    partial_credit: bool = Field(
        True,
        description="reward: passed cases / all cases (scripts, calls, asserts of test code); false: 1 for all, else 0",
    )
    correct_at: float = Field(1.0, description=CORRECT_AT)


class WeightedReward(Config):
    """One summand of ``SumReward``."""

    weight: float
    verifier: Verifier


class SumReward(Config):
    """A weighted sum of rewards of the same response."""

    type: Literal["sum"] = "sum"
    terms: tuple[WeightedReward, ...] = Field(min_length=1)
    correct_at: float = Field(1.0, description=CORRECT_AT)


def _from_text(value: Any) -> Any:
    """Return the settings that ``module:function`` and an URL stand for; anything else unchanged."""
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        return {"type": "http", "url": value}
    if isinstance(value, str) and ":" in value:
        return {"type": "function", "function": value}
    return value


RewardConfig = Annotated[FunctionReward | HttpReward | MathReward | CodeReward | SumReward, Field(discriminator="type")]
Verifier = Annotated[
    Annotated[str, pydantic.Tag("text")] | Annotated[RewardConfig, pydantic.Tag("settings")],
    pydantic.Discriminator(lambda value: "text" if isinstance(value, str) else "settings"),
    pydantic.BeforeValidator(_from_text),
]
WeightedReward.model_rebuild()
SumReward.model_rebuild()


def verifier_text(verifier: str | RewardConfig | None) -> str | None:
    """Return the text of ``Prompt.verifier``: a verifier's name, or settings as JSON."""
    return verifier if verifier is None or isinstance(verifier, str) else json.dumps(dump(verifier))


@functools.lru_cache(maxsize=1024)  # every prompt of a source has the same
def read_verifier(text: str) -> str | RewardConfig:
    """Return what ``verifier_text`` wrote."""
    if not text.startswith("{"):
        return text
    settings: str | RewardConfig = pydantic.TypeAdapter(Verifier).validate_python(json.loads(text))
    return settings


def parts_of(verifier: str | RewardConfig | None) -> Iterator[str | RewardConfig]:
    """Yield the verifiers that grade a response: itself, or the summands of a sum."""
    if isinstance(verifier, SumReward):
        for term in verifier.terms:
            yield from parts_of(term.verifier)
    elif verifier is not None:
        yield verifier


def runs_unit_tests(verifier: str | RewardConfig | None) -> bool:
    """Return whether labels are unit tests."""
    return any(part == "code" or isinstance(part, CodeReward) for part in parts_of(verifier))


def needs_label(verifier: str | RewardConfig | None) -> bool:
    """Return whether a response can only be graded with a label; a function or a judge may do without."""
    return any(isinstance(part, str | MathReward | CodeReward) for part in parts_of(verifier))
