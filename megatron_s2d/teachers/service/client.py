"""Requests to teacher servers: retried, every reply checked, and a server that has restarted is proven to be the same.

Every reply names the start of the server that gave it. A start that the client has not seen is accepted only after its
digests and its log-probabilities of fixed sequences are those of the teacher with which the stage began.
No torch here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import ssl
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from megatron_s2d.config.teacher_service import TeacherServiceConfig
from megatron_s2d.errors import UserError
from megatron_s2d.rollout.sglang.api_key import authorization
from megatron_s2d.teachers.service.info import TeacherInfo, probe_request
from megatron_s2d.teachers.service.wire import ScoreRequest, WireError, decode

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0
_CONNECT_SECONDS = 30.0
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}
RESUME = "the run can be resumed when the server is back"


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a teacher is recognised by."""

    weights: str
    probes: list[float]  # log-probabilities of the fixed sequences

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Identity:
        return cls(str(document["weights"]), [float(value) for value in document["probes"]])


def read_key(path: Path | None, where: str) -> str:
    """Return the key in a file; empty without a file. ``UserError``, which never shows the content, for a bad one."""
    if path is None:
        return ""
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not ASCII text"
        raise UserError(f"{where}: {path}: cannot be read ({reason})") from None
    if not text or not text.isprintable() or " " in text:
        raise UserError(f"{where}: {path}: expected one line with a key, without blanks")
    return text


class TeacherClient:
    """One teacher, on one or more servers. Its methods may be called from several threads."""

    def __init__(self, settings: TeacherServiceConfig, where: str):
        """where: the key of ``settings`` in the configuration, for messages."""
        self.settings, self._where = settings, where
        self._headers = authorization(read_key(settings.api_key_file, f"{where}.api_key_file"))
        self._identity: Identity | None = None
        self._info: TeacherInfo | None = None
        self._proven: dict[str, str] = {}  # address -> the start of the server that was proven
        self._proving = threading.Lock()
        self._next = 0
        self._closed = threading.Event()

    @property
    def info(self) -> TeacherInfo:
        """The teacher, as the first server describes it; ``connect`` before."""
        assert self._info is not None
        return self._info

    @property
    def identity(self) -> Identity:
        assert self._identity is not None
        return self._identity

    def connect(self, expected: Identity | None = None) -> None:
        """Reach every server and prove that all hold one teacher: ``expected``, or that of the first.

        Raises ``UserError`` for servers that cannot be reached within the attempts or hold something else.
        """
        self._identity = expected
        for url in self.settings.urls:
            self._attempt(lambda url=url: self._prove(url))

    def score(self, request: ScoreRequest) -> dict[str, np.ndarray]:
        """Return the checked tensors of the reply."""
        body = request.encode()
        with self._proving:
            self._next += 1
            first = self._next

        def ask(attempt: int) -> dict[str, np.ndarray]:
            url = self.settings.urls[(first + attempt) % len(self.settings.urls)]
            meta, tensors = decode(self._call(url, "POST", "/score", body))
            # First who answered: another teacher's reply may have other sizes, and no attempt would change that.
            if meta.get("instance") != self._proven.get(url):
                with self._proving:
                    if meta.get("instance") != self._proven.get(url):
                        self._prove(url)
                if meta.get("instance") != self._proven.get(url):
                    raise WireError("it restarted while it answered")
            info = self.info
            request.check_reply(tensors, info.vocab_size, info.hidden_size, info.dtype)
            return tensors

        return self._attempt(ask, counts=True)

    def output_rows(self, start: int, stop: int) -> np.ndarray:
        """Return rows ``start`` to ``stop`` of the output layer [stop - start, h], compared with their digests."""
        info, blocks = self.info, []
        size = info.output_block_rows
        first = start // size
        for number in range(first, -(-stop // size)):
            blocks.append(self._attempt(lambda number=number: self._block(number)))
        if not blocks:
            dtype = np.uint16 if info.dtype == "bfloat16" else np.float32
            return np.zeros((0, info.hidden_size), dtype=dtype)
        return np.concatenate(blocks)[start - first * size : stop - first * size]

    def tokenizer_json(self) -> bytes:
        """Return the tokenizer.json of the teacher."""
        return self._attempt(lambda: self._call(self.settings.urls[0], "GET", "/tokenizer"))

    def describe(self, seconds: float) -> TeacherInfo:
        """Return what the first server says of itself, without any check; raises what the connection does."""
        return TeacherInfo.from_json(self._call(self.settings.urls[0], "GET", "/info", seconds=seconds))

    def close(self) -> None:
        """End attempts that wait."""
        self._closed.set()

    # ------------------------------------------------------------------ proofs

    def _prove(self, url: str) -> None:
        """Accept the server's present start, if it holds the teacher; ``UserError`` if it holds another one."""
        info = TeacherInfo.from_json(self._call(url, "GET", "/info"))
        wanted = self.settings.weights_digest
        if wanted is not None and info.weights_digest != wanted:
            raise UserError(
                f"{url} serves weights with the digest {info.weights_digest}, and {self._where}.weights_digest asks "
                f"for {wanted}: start the server with those, or change the key"
            )
        request = probe_request(info.vocab_size, info.max_positions)
        meta, tensors = decode(self._call(url, "POST", "/score", request.encode()))
        request.check_reply(tensors, info.vocab_size, info.hidden_size, info.dtype)
        if meta.get("instance") != info.instance:
            raise WireError("it restarted while it was checked")
        found = Identity(info.weights, tensors["log_probs"].tolist())
        if self._identity is not None:
            self._compare(url, info, found)
        self._identity, self._info = self._identity or found, self._info or info
        self._proven[url] = info.instance

    def _compare(self, url: str, info: TeacherInfo, found: Identity) -> None:
        expected = self._identity
        assert expected is not None
        what = ""
        if found.weights != expected.weights:
            what = f"its digest is {found.weights[:12]} instead of {expected.weights[:12]}"
        elif len(found.probes) != len(expected.probes):
            what = "it checks other sequences"
        else:
            limit = self.settings.weight_check_tolerance or _TOLERANCE[info.dtype]
            difference = float(np.abs(np.subtract(found.probes, expected.probes)).max())
            if not difference <= limit:
                what = f"log-probabilities of the check sequences differ by {difference:.3g} nats, limit {limit:g}"
        if what:
            raise UserError(
                f"{url} does not hold the teacher with which this stage began ({what}): serve that one again, and "
                "resume the run; for another teacher remove the stage's directory"
            )

    def _block(self, number: int) -> np.ndarray:
        info = self.info
        url = self.settings.urls[number % len(self.settings.urls)]
        _, tensors = decode(self._call(url, "GET", f"/output/{number}"))
        rows = tensors.get("rows")
        if rows is None or hashlib.sha256(rows.tobytes()).hexdigest() != info.output_digests[number]:
            raise WireError(f"block {number} of its output layer is not what its digest says")
        count = min(info.output_block_rows, info.vocab_size - number * info.output_block_rows)
        dtype = np.uint16 if info.dtype == "bfloat16" else np.float32
        if rows.shape != (count, info.hidden_size) or rows.dtype != dtype:
            raise WireError(f"block {number} of its output layer is {rows.dtype} {list(rows.shape)}")
        return rows

    # ------------------------------------------------------------------ requests

    def _attempt[Result](self, action: Callable[..., Result], *, counts: bool = False) -> Result:
        """Call ``action``, with the number of the attempt if it ``counts``, until it succeeds or attempts are spent."""
        pause, last = _FIRST_PAUSE_SECONDS, ""
        for attempt in range(self.settings.max_attempts):
            if attempt and self._closed.wait(pause):
                break
            pause = _FIRST_PAUSE_SECONDS if not attempt else min(2 * pause, _LONGEST_PAUSE_SECONDS)
            try:
                return action(attempt) if counts else action()
            except (WireError, OSError, http.client.HTTPException) as error:
                last = str(error) or type(error).__name__
        addresses = ", ".join(self.settings.urls)
        raise UserError(
            f"{self._where}: the teacher at {addresses} gave no good reply in {self.settings.max_attempts} attempts "
            f"({last}); {RESUME}"
        )

    def _call(
        self, url: str, method: str, path: str, body: bytes | None = None, *, seconds: float | None = None
    ) -> bytes:
        """Return the content of a reply of status 200; ``UserError`` for a request that no attempt would change.

        seconds: time limit, by default those of the settings.
        """
        connect = min(_CONNECT_SECONDS, seconds or _CONNECT_SECONDS)
        parts = urlsplit(url)
        if parts.scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=connect, context=ssl.create_default_context()
            )
        else:
            connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=connect)
        with contextlib.closing(connection):
            connection.connect()
            connection.sock.settimeout(seconds or self.settings.request_timeout_seconds)
            connection.request(method, parts.path + path, body, headers=self._headers)
            reply = connection.getresponse()
            content = reply.read()
        if reply.status in (401, 403):
            raise UserError(f"{url} refuses requests without its API key: name its file in {self._where}.api_key_file")
        text = content[:300].decode("utf-8", "replace")
        if 400 <= reply.status < 500:
            raise UserError(f"{url} refused a request: {text}")
        if reply.status != 200:
            raise WireError(f"status {reply.status}: {text}")
        return content
