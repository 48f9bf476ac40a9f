"""Environments of a data source: what answers the model between its turns. No torch here (docs/environments.md)."""

from __future__ import annotations

import functools
import json
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config, dump
from megatron_s2d.config.reward import FUNCTION_PATTERN

PYTHON_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Run a Python program and return what it prints. Nothing is kept between two calls.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The program."}},
            "required": ["code"],
        },
    },
}


class EnvironmentLimits(Config):
    """Limits of every environment. Tokens of all turns and observations: ``sampling.max_response_length``."""

    max_turns: int = Field(8, ge=1, le=1000, description="turns of the model; an episode that needs more is truncated")
    max_turn_tokens: int | None = Field(
        None, ge=1, description="tokens of one turn; null: what is left of sampling.max_response_length"
    )
    max_seconds: float = Field(
        600.0,
        gt=0,
        description="time that one episode may spend in its environment, generation not counted; more is an error that "
        "ends the run, so that no result depends on it",
    )


class CalculatorEnvironment(EnvironmentLimits):
    """A calculator for the embedded task: `12 + 5 =` is a call, which it answers with the residue."""

    type: Literal["calculator"] = "calculator"
    modulus: int | None = Field(None, ge=3, le=997, description="of the arithmetic; by default that of the task")


class PythonEnvironment(EnvironmentLimits):
    """A tool of the chat template that runs Python programs in the sandbox of the code verifier."""

    type: Literal["python"] = "python"
    tool_parser: Literal["qwen3", "llama3"] = Field(
        description="how the model writes tool calls; qwen3: JSON between <tool_call> and </tool_call>; llama3: the "
        "message is JSON with `name` and `parameters`"
    )
    cpu_seconds: int = Field(5, ge=1, le=600, description="processor time of one program, then it is ended")
    memory_mb: int = Field(512, ge=16, description="memory of one program beyond that of Python")
    max_observation_tokens: int = Field(512, ge=16, description="longer results are cut")


class RetryEnvironment(EnvironmentLimits):
    """Grades every turn with the prompt's verifier; a wrong one is answered with `message`, and the model continues."""

    type: Literal["retry"] = "retry"
    max_turns: int = Field(2, ge=2, le=1000, description="attempts; the last one is final")
    message: str = Field(
        "Your answer is not correct ({label}). Try again.",
        min_length=1,
        description="observation after a wrong attempt, a message of the user; {label} and {detail} are the verifier's",
    )
    turn_reward: float = Field(0.0, description="reward of every attempt but the last, for example -0.1")
    max_observation_tokens: int = Field(512, ge=1, description="longer messages are cut")


class FunctionEnvironment(EnvironmentLimits):
    """A class of the user (``rollout/environments/environment.py``), which runs in the process of the trainer."""

    type: Literal["function"] = "function"
    function: str = Field(
        pattern=FUNCTION_PATTERN,
        description="`module:factory`; called with the tokenizer for every episode, returns an environment; the module "
        "is importable from the working directory, or installed",
    )


EnvironmentConfig = Annotated[
    CalculatorEnvironment | PythonEnvironment | RetryEnvironment | FunctionEnvironment, Field(discriminator="type")
]


def _from_text(value: Any) -> Any:
    """Return the settings that ``module:factory`` and the name of an environment stand for."""
    if isinstance(value, str):
        return {"type": "function", "function": value} if ":" in value else {"type": value}
    return value


EnvironmentSetting = Annotated[EnvironmentConfig, pydantic.BeforeValidator(_from_text)]


def environment_text(environment: EnvironmentConfig | None) -> str | None:
    """Return the text of ``Prompt.environment``: settings as JSON."""
    return None if environment is None else json.dumps(dump(environment), sort_keys=True)


@functools.lru_cache(maxsize=1024)  # every prompt of a source has the same
def read_environment(text: str) -> EnvironmentConfig:
    """Return what ``environment_text`` wrote."""
    settings: EnvironmentConfig = pydantic.TypeAdapter(EnvironmentConfig).validate_python(json.loads(text))
    return settings


def tools_of(environment: EnvironmentConfig | None) -> list[dict[str, Any]] | None:
    """Return the tools that the chat template offers to the model; None without any."""
    return [PYTHON_TOOL] if isinstance(environment, PythonEnvironment) else None
