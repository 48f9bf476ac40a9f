"""The interface between ``served/`` and a kind of inference server; ``rollout/sglang`` implements it for SGLang.

``served/`` sends requests, retries them, checks replies, restarts servers and proves that weights have arrived. A
``ServerBackend`` knows how one kind of server is started, addressed and given weights. Shapes: s tokens of a response.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from megatron_s2d.rollout.engine import Request, SamplingParams
from megatron_s2d.rollout.served.senders import Senders

if TYPE_CHECKING:
    import torch

Bucket = list[tuple[str, "torch.Tensor"]]  # Hugging Face names with their weights
UNAUTHORIZED = (401, 403)  # statuses of requests without the right key
NEEDS_KEY = "refuses requests without its API key: name the file that has it in rollout.sglang.api_key_file"
ScoredToken = tuple[float | None, int, str | None]  # log-probability (None for a first token), token id, text


class InvalidReply(Exception):
    """A reply that breaks the protocol; a retry may help."""


class StaleWeights(InvalidReply):
    """The server answered with other weights than the current ones."""


class ContextLengthExceeded(Exception):
    """The server cut a response short of its limit; it would do so again."""


class ServerUnreachable(Exception):
    """The server does not answer now."""


class WeightUpdateFailed(Exception):
    """A server did not take the weights; it may hold a mixture of old and new ones."""


@dataclasses.dataclass(frozen=True)
class ServerRequirements:
    """The requests that a stage will send to its servers; none by default."""

    max_length: int = 0  # tokens of its longest sequence, prompt and response
    params: SamplingParams | None = None  # how responses are sampled; None: the stage samples none
    top_k: int | None = None  # most likely tokens that a score lists at each token (0: none); None: no scores
    routed_experts: bool = False  # responses come with the experts of their tokens, for routing replay


NO_REQUIREMENTS = ServerRequirements()


@dataclasses.dataclass(frozen=True, eq=False)
class PartialRollout:
    """The beginning of a response that was interrupted."""

    token_ids: np.ndarray  # [s] int64
    log_probs: np.ndarray  # [s] float32, of these tokens when they were sampled
    versions: np.ndarray  # [s] int64, of the weights that sampled them
    # [tokens of the prompt + s - 1, layers, experts per token]: see ``Sample``; None without routes
    routed_experts: np.ndarray | None = None

    @classmethod
    def empty(cls) -> PartialRollout:
        """Return a response without tokens."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64))

    @property
    def num_routed(self) -> int:
        """Number of tokens whose routes are there; the next reply's routes continue with this one."""
        return 0 if self.routed_experts is None else len(self.routed_experts)

    def extended(
        self, token_ids: Sequence[int], log_probs: np.ndarray, version: int, routes: np.ndarray | None = None
    ) -> PartialRollout:
        """Return this followed by the tokens that ``version`` sampled, and by their ``routes``."""
        parts = [part for part in (self.routed_experts, routes) if part is not None]
        return PartialRollout(
            np.concatenate([self.token_ids, np.array(token_ids, dtype=np.int64)]),
            np.concatenate([self.log_probs, log_probs]),
            np.concatenate([self.versions, np.full(len(token_ids), version)]),
            np.concatenate(parts) if parts else None,
        )


@dataclasses.dataclass(frozen=True)
class ServerCall:
    """A POST request to a server."""

    path: str
    body: dict[str, Any]
    request_ids: tuple[str, ...] = ()  # by which the server can abort it


@dataclasses.dataclass(slots=True)
class ServerReply:
    """The reply of a server for one sequence, parsed but not yet checked."""

    output_ids: list[int]  # the generated tokens
    finish_reason: Literal["stop", "length", "abort"]
    message: str  # why the server aborted the request; may be empty
    num_prompt_tokens: int  # -1: the server did not say
    num_output_tokens: int
    weight_version: str
    output_log_probs: list[ScoredToken] = dataclasses.field(default_factory=list)
    input_log_probs: list[ScoredToken] = dataclasses.field(default_factory=list)
    input_top_log_probs: list[list[ScoredToken] | None] = dataclasses.field(default_factory=list)
    routed_experts: np.ndarray | None = None  # flat, of all tokens, layers and choices in this order; None: none came


class ServerProtocol(Protocol):
    """Requests and replies of one kind of server; ``InvalidReply`` for a reply that cannot be parsed."""

    original_log_probs_hint: str  # likely cause of log-probabilities at temperature 1, as a question
    headers: Mapping[str, str]  # of every request, such as its authorization

    def generate(self, request: Request, partial: PartialRollout | None = None) -> ServerCall:
        """Return the call for one response, or for the rest of ``partial``; each call has a request id of its own."""
        ...

    def score(self, sequences: Sequence[np.ndarray], top_k: int = 0, starts: Sequence[int] = ()) -> ServerCall:
        """Return the call that scores the tokens of ``sequences`` and generates none.

        starts: of each sequence the first token that is read for its prediction of the next one; earlier tokens get no
        scores, and come from the server's prefix cache if it has them. Empty: all tokens.
        """
        ...

    def abort(self, request_id: str) -> ServerCall:
        """Return the call that aborts a request."""
        ...

    def parse_reply(self, content: bytes) -> ServerReply:
        """Parse the reply to ``generate``."""
        ...

    def parse_scores(self, content: bytes, sequences: Sequence[np.ndarray]) -> list[ServerReply]:
        """Parse the reply to ``score``. sequences: from their ``starts`` on."""
        ...


class ServerProcess(Protocol):
    """A process that the backend started on this machine."""

    url: str
    log: Path

    @property
    def is_alive(self) -> bool:
        """Whether the process runs; a process that hangs does."""
        ...

    def wait(self, deadline: float) -> None:
        """Wait until it answers; ``UserError`` if it has ended or ``time.monotonic()`` is past ``deadline``."""
        ...

    def close(self) -> None:
        """End it and its children."""
        ...


class RouterProcess(ServerProcess, Protocol):
    """A router that distributes requests over servers."""

    def serve(self, urls: Sequence[str]) -> str:
        """Send requests to the servers at ``urls`` only; returns the problem if that fails."""
        ...


class WeightTransfer(Protocol):
    """One weight update of one sender's idle servers. Methods may raise ``WeightUpdateFailed`` or ``UserError``."""

    def begin(self) -> None:
        """Stop generation on the servers and discard results of the old weights."""
        ...

    def send(self, bucket: Bucket, weight_version: str, *, last: bool) -> None:
        """Send one bucket to the sender's servers, or write it for all servers."""
        ...

    def commit(self, weight_version: str) -> None:
        """Have the servers load what all senders have written; after it they report ``weight_version``."""
        ...

    def end(self, *, complete: bool) -> None:
        """Resume generation on the servers. complete: no sender has failed."""
        ...


class ServerBackend(Protocol):
    """How one kind of server is started, checked and given weights. Nothing here is collective.

    Senders call what sends weights, rank 0 the rest.
    """

    name: str  # for messages
    protocol: ServerProtocol
    num_servers: int  # to start
    uses_router: bool
    can_sleep: bool  # servers release their GPU memory while the trainer works
    weight_sync: str  # name of the transport of weights, for messages
    senders: Senders  # of weights
    bucket_bytes: int  # of weights sent together
    startup_timeout_seconds: float

    def check_server(self, url: str) -> None:
        """Raise ``UserError`` for a server that does not fit model and stage; ``ServerUnreachable``."""
        ...

    def is_healthy(self, url: str, *, checks: int = 1) -> bool:
        """Return whether the server generates; a slow one is asked ``checks`` times."""
        ...

    def write_start_weights(self, bucket: Bucket, weight_version: str, *, last: bool) -> None:
        """Write this sender's part of the weights that servers are started with."""
        ...

    def commit_start_weights(self) -> None:
        """Start servers with these weights from now on: all senders have written their parts."""
        ...

    def start_server(self, number: int) -> ServerProcess:
        """Start a server with the start weights."""
        ...

    def start_router(self) -> RouterProcess:
        """Start a router without servers."""
        ...

    def transfer_weights(
        self, urls: Sequence[str], sleeping_urls: Sequence[str]
    ) -> contextlib.AbstractContextManager[WeightTransfer]:
        """Connect to this sender's servers for a weight update; those at ``sleeping_urls`` are woken up."""
        ...

    def use_weights(self, weight_version: str) -> None:
        """Make coming requests of this rank for these weights, which the servers have; called on every rank."""
        ...

    def release_memory(self, urls: Sequence[str]) -> dict[str, str]:
        """Release the GPU memory of idle servers; return address -> reason of a failure."""
        ...

    def weight_digests(self, urls: Sequence[str]) -> dict[str, str]:
        """Address -> digest of the weights that a server holds, for servers that can compute one."""
        ...

    def disconnect(self) -> None:
        """Leave process groups shared with the servers."""
        ...

    def remove_files(self) -> None:
        """Remove the files that servers read: weights and keys."""
        ...
