"""Makes the environments of a stage's prompts, and the processes and threads that they share."""

from __future__ import annotations

import datetime
import functools
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from megatron_s2d.config.environment import (
    PYTHON_TOOL,
    CalculatorEnvironment,
    EnvironmentConfig,
    EnvironmentLimits,
    FunctionEnvironment,
    PythonEnvironment,
    RetryEnvironment,
    read_environment,
)
from megatron_s2d.data.tokenizer import has_conversations
from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.rollout.engine import Request
from megatron_s2d.rollout.environments.calculator import Calculator
from megatron_s2d.rollout.environments.chat import ChatObservations, PlainObservations
from megatron_s2d.rollout.environments.environment import Environment, SingleTurn
from megatron_s2d.rollout.environments.episode import SINGLE_TURN_LIMITS, run_episode
from megatron_s2d.rollout.environments.python_tool import PythonRunner, PythonTool
from megatron_s2d.rollout.environments.retry import AttemptGrader, Grader, Retry
from megatron_s2d.rollout.sampling_client import Episode, SamplingClient
from megatron_s2d.verify import Verdict
from megatron_s2d.verify.code_verifier import sandbox_layers


class EnvironmentManager:
    """The environments of a stage. Processes start with the first episode that needs them."""

    def __init__(self, tokenizer: Any, date: datetime.date, stop_token_ids: Sequence[int], grader: Grader | None):
        """date: for chat templates that write it. stop_token_ids: of the model. grader: None if nothing is graded."""
        self._tokenizer, self._date, self._stop_token_ids = tokenizer, date, tuple(stop_token_ids)
        self._grader = None if grader is None else AttemptGrader(grader)
        self._runner: PythonRunner | None = None
        self._observations = functools.cache(self._new_observations)

    def episode(self, request: Request) -> Episode[Sample]:
        """Return the episode of ``request``; a single turn for a prompt without an environment."""
        environment, limits = self.create(request.prompt)

        async def episode(client: SamplingClient) -> Sample:
            return await run_episode(client, request, environment, limits, self._tokenizer)

        return episode

    def create(self, prompt: Prompt) -> tuple[Environment, EnvironmentLimits]:
        """Return a new environment for ``prompt``, and its limits; ``UserError`` for one that cannot work here."""
        if prompt.environment is None:
            return SingleTurn(), SINGLE_TURN_LIMITS
        settings = read_environment(prompt.environment)
        return self._create(settings), settings

    def check(self, settings: EnvironmentConfig) -> None:
        """Raise ``UserError`` if an environment with these settings cannot work here."""
        if isinstance(settings, PythonEnvironment):
            sandbox_layers()
        environment = self._create(settings)
        if isinstance(environment, Retry):
            environment.message_of(Verdict(0.0, "wrong"))

    def close(self) -> None:
        """Stop processes and threads."""
        if self._runner is not None:
            self._runner.close()
        if self._grader is not None:
            self._grader.close()

    def _create(self, settings: EnvironmentConfig) -> Environment:
        match settings:
            case CalculatorEnvironment():
                if settings.modulus is None:
                    raise UserError("environment calculator: give the modulus of the arithmetic")
                return Calculator(self._tokenizer, settings.modulus)
            case PythonEnvironment():
                self._runner = self._runner or PythonRunner()
                return PythonTool(
                    self._runner,
                    self._observations("tool", settings.max_observation_tokens),
                    self._tokenizer,
                    tool_parser=settings.tool_parser,
                    cpu_seconds=settings.cpu_seconds,
                    memory_mb=settings.memory_mb,
                )
            case RetryEnvironment():
                if self._grader is None:
                    raise UserError(
                        "environment retry grades every attempt, and this stage uses no labels: use grpo, or opd with "
                        "reward_advantage"
                    )
                return Retry(
                    self._grader,
                    self._observations("user", settings.max_observation_tokens),
                    max_turns=settings.max_turns,
                    message=settings.message,
                    turn_reward=settings.turn_reward,
                )
            case FunctionEnvironment():
                return load_factory(settings.function)(self._tokenizer)

    def _new_observations(self, role: Any, max_tokens: int) -> ChatObservations | PlainObservations:
        if role == "user" and not has_conversations(self._tokenizer):
            return PlainObservations(self._tokenizer, max_tokens)
        tools = [PYTHON_TOOL] if role == "tool" else None
        return ChatObservations(self._tokenizer, self._date, role, self._stop_token_ids, tools, max_tokens)


@functools.cache
def load_factory(function: str) -> Any:
    """Return what ``module:factory`` names, from the working directory or installed; ``UserError`` if there is none."""
    module, _, name = function.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), name)
    except Exception as error:  # code of the user
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"environment {function} cannot be imported ({reason})") from error
    if not callable(factory):
        raise UserError(f"environment {function} is not callable: name a class or a function that returns environments")
    return factory
