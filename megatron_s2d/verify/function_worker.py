"""The worker process of a reward function: a script of its own. It imports the user's module and answers JSON lines.

The first line names the function; the reply is ``ready`` or the reason why it cannot be called. Every further line
``{"prompts", "responses", "answers", "batched", "timeout_seconds"}`` is answered by a JSON list with one
``[reward, detail]`` or ``[null, reason, message]`` for each response. What the function prints goes to standard error.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import math
import numbers
import os
import sys
from collections.abc import Callable
from typing import Any

from sandbox import die_with_parent

_MAX_TEXT = 4000  # characters of a detail or of a message


def load(request: dict[str, Any]) -> Callable[..., Any]:
    """Return the function that ``request`` names."""
    sys.path[:] = request["path"]
    module_name, _, name = request["function"].partition(":")
    function = getattr(importlib.import_module(module_name), name)
    if not callable(function):
        raise TypeError(f"{name} is not a function")
    if request["concurrency"] > 1 and not inspect.iscoroutinefunction(function):
        raise TypeError("concurrency above 1 needs an async function")
    return function


def check(value: Any) -> list[Any]:
    """Return ``[reward, detail]`` for what a function returned for one response, or why it is none."""
    detail = None
    if isinstance(value, tuple) and len(value) == 2:
        value, detail = value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # numpy's and torch's scalars
        value = value.item()
    if not isinstance(value, numbers.Real):
        return [None, "wrong_shape", f"returned {type(value).__name__}, not a number or (number, text)"]
    if not math.isfinite(value):
        return [None, "not_finite", f"returned {value}"]
    return [float(value), None if detail is None else str(detail)[:_MAX_TEXT]]


def failed(error: BaseException) -> list[Any]:
    """Return the reply for an exception."""
    reason = "timeout" if isinstance(error, TimeoutError) else "error"
    return [None, reason, f"{type(error).__name__}: {error}".replace("\n", " ")[:_MAX_TEXT]]


async def grade(function: Callable[..., Any], request: dict[str, Any]) -> list[list[Any]]:
    """Call ``function`` for all responses of ``request``."""

    async def call(**arguments: Any) -> Any:
        value = function(**arguments)
        return await asyncio.wait_for(value, request["timeout_seconds"]) if inspect.isawaitable(value) else value

    texts = {name: request[f"{name}s"] for name in ("prompt", "response", "answer")}
    count = len(texts["response"])
    if request["batched"]:
        try:
            values = await call(**texts)
        except Exception as error:
            return [failed(error)] * count
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, (list, tuple)) or len(values) != count:
            size = f"{len(values)} values" if hasattr(values, "__len__") else type(values).__name__
            return [[None, "wrong_shape", f"returned {size} for {count} responses"]] * count
        return [check(value) for value in values]
    calls = [call(**dict(zip(texts, row, strict=True))) for row in zip(*texts.values(), strict=True)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    return [failed(value) if isinstance(value, BaseException) else check(value) for value in results]


def main() -> None:
    die_with_parent()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        function = load(json.loads(sys.stdin.readline()))
    except Exception as error:
        print(failed(error)[2], file=replies, flush=True)
        return
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(asyncio.run(grade(function, json.loads(line)))), file=replies, flush=True)


if __name__ == "__main__":
    main()
