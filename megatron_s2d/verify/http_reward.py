"""Grades responses by a judge or a reward model behind HTTP: one address, bounded time, retries and size of replies."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import math
import re
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from megatron_s2d.config.reward import HttpReward
from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt
from megatron_s2d.verify.reward import Failure, Graded, as_verdicts
from megatron_s2d.verify.verifier import Verdict

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 10.0
_RETRIED = (429, 500, 502, 503, 504)
_MAX_DETAIL = 4000  # characters of a judge's text that are stored
_PLACE = re.compile(r"\{(prompt|response|answer)\}")


class _Retry(Exception):
    """An attempt failed in a way that another one may not."""


class HttpVerifier:
    """Asks an endpoint for each response, several at a time.

    Verdict labels: ``correct`` (a reward of at least ``correct_at``), ``wrong``, and for failures ``unreachable``,
    ``timeout``, ``refused`` (another status than 200), ``bad_reply``, ``too_long``, ``not_finite``. The verdict's
    detail is the judge's text.
    """

    def __init__(self, settings: HttpReward) -> None:
        self._settings, self._key = settings, None
        if settings.api_key_file is not None:
            try:
                self._key = settings.api_key_file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"api_key_file {settings.api_key_file}: cannot be read: {error}") from None
        self._threads = ThreadPoolExecutor(settings.max_concurrent_requests, thread_name_prefix="judge")
        self._closed = threading.Event()

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """Return one verdict per response, in order. Raises ``UserError`` as ``failure_reward: null`` asks for."""
        graded = list(self._threads.map(self._grade, prompts, responses))
        return as_verdicts(prompts, graded, self._settings, f"judge {self._settings.url}")

    def close(self) -> None:
        """Start no further attempt."""
        self._closed.set()
        self._threads.shutdown(cancel_futures=True)

    def _grade(self, prompt: Prompt, response: str) -> Graded:
        settings = self._settings
        body = json.dumps(_body(settings, prompt, response)).encode()
        for attempt in range(settings.max_retries + 1):
            if attempt:
                pause = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
                self._closed.wait(pause)
            try:
                return _read(settings, _post(settings, self._key, body))
            except _Retry as error:
                failure = error.args[0]
            except Refused as error:
                return error.args[0]
            if self._closed.is_set():
                break
        return failure


@functools.lru_cache(maxsize=64)  # several stages may have the same judge
def _first_failure(settings: HttpReward, text: str, answer: str | None) -> Failure | None:
    verifier = HttpVerifier(settings.model_copy(update={"max_retries": min(settings.max_retries, 1)}))
    try:
        graded = verifier._grade(Prompt("check", np.zeros(1, np.int64), text, "", None, answer), answer or "")
    finally:
        verifier.close()
    return graded if isinstance(graded, Failure) else None


def check_endpoint(settings: HttpReward, prompt: Prompt) -> None:
    """Ask once, about the label as a response to ``prompt``; raise ``UserError`` if no reward comes back."""
    failure = _first_failure(settings, prompt.text, prompt.answer)
    if failure is not None:
        raise UserError(
            f"verifier {settings.url} gives no reward for the label of prompt {prompt.id}: {failure.label}: "
            f"{failure.message}; start the endpoint, or correct its settings"
        )


class Refused(Exception):
    """A reply that another attempt would not change; its argument is the ``Failure``."""


def _body(settings: HttpReward, prompt: Prompt, response: str) -> dict[str, Any]:
    texts = {"prompt": prompt.text, "response": response, "answer": prompt.answer}
    if settings.protocol == "json":
        return texts
    # In one pass, so that a response that contains "{answer}" stays as it is.
    message = _PLACE.sub(lambda match: texts[match[1]] or "", settings.template)
    return {
        "model": settings.model,
        "messages": [{"role": "user", "content": message}],
        "temperature": 0.0,
        "max_tokens": settings.max_tokens,
    }


def _post(settings: HttpReward, key: str | None, body: bytes) -> bytes:
    """Return the reply's body. Raises ``_Retry`` or ``Refused``."""
    parts = urlsplit(settings.url)
    if parts.scheme == "https":
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            parts.hostname or "", parts.port, timeout=settings.timeout_seconds, context=ssl.create_default_context()
        )
    else:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=settings.timeout_seconds)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    started = time.monotonic()
    # A timeout of the socket limits each read, this one the whole attempt: a reply may come byte by byte.
    limit = threading.Timer(settings.timeout_seconds, _shut, [connection])
    limit.daemon = True
    limit.start()
    try:
        connection.request("POST", target, body, headers)
        reply = connection.getresponse()
        if reply.status != 200:
            failure = Failure("refused", f"status {reply.status} {reply.reason}")
            raise _Retry(failure) if reply.status in _RETRIED else Refused(failure)
        content = reply.read(settings.max_reply_bytes + 1)
        if time.monotonic() - started >= settings.timeout_seconds:
            raise TimeoutError
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, TimeoutError) or time.monotonic() - started >= settings.timeout_seconds:
            raise _Retry(Failure("timeout", f"no reply after {settings.timeout_seconds:g} s")) from None
        raise _Retry(Failure("unreachable", f"{type(error).__name__}: {error}")) from None
    finally:
        limit.cancel()
        connection.close()
    if len(content) > settings.max_reply_bytes:
        raise Refused(Failure("too_long", f"the reply has more than max_reply_bytes {settings.max_reply_bytes}"))
    return content


def _shut(connection: http.client.HTTPConnection) -> None:
    if connection.sock is not None:
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads


def _read(settings: HttpReward, content: bytes) -> Graded:
    """Return the reward in a reply. Raises ``Refused``."""
    try:
        reply = json.loads(content)
        if settings.protocol == "json":
            reward, detail = reply["reward"], reply.get("detail")
        else:
            detail = reply["choices"][0]["message"]["content"]
            scores = re.findall(settings.score_pattern, detail)
            if not scores:
                raise Refused(Failure("bad_reply", f"score_pattern has no match in the text {detail[-100:]!r}"))
            reward = float(scores[-1])
        if isinstance(reward, bool) or not isinstance(reward, (int, float)):
            raise TypeError("the reward is no number")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        text = content[:100].decode(errors="replace")
        raise Refused(Failure("bad_reply", f"{type(error).__name__} in the reply {text!r}")) from None
    if not math.isfinite(reward):
        raise Refused(Failure("not_finite", f"the reward is {reward}"))
    return float(reward), None if detail is None else str(detail)[:_MAX_DETAIL]
