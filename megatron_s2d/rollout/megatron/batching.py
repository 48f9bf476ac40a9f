"""Plans generation batches and holds one as tensors for the decoding loop of ``megatron/engine.py``.

Prompts of a batch are padded on the left to one length; a prompt that several requests share appears once. Shapes:
b requests of the batch, a active requests, u distinct prompts, p prompt length, s response positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from megatron_s2d.buffer_sizes import POSITIONS_PER_DRAW
from megatron_s2d.errors import UserError
from megatron_s2d.records import Sample
from megatron_s2d.rollout.engine import Request, sample_of
from megatron_s2d.rollout.megatron.sampling import BatchParams, uniforms


def plan_batches(requests: Sequence[Request], max_batch_size: int, max_batch_tokens: int) -> list[list[int]]:
    """Return the indices of ``requests`` in batches of similar prompt length, equal prompts side by side.

    A batch has at most ``max_batch_size`` rows, and rows x (longest prompt + longest response) is at most
    ``max_batch_tokens``, except in a batch of one request.
    """
    keys = [(len(request.prompt.token_ids), request.prompt.token_ids.tobytes()) for request in requests]
    batches: list[list[int]] = []
    prompt_tokens = response_tokens = 0
    for index in sorted(range(len(requests)), key=keys.__getitem__):
        prompt_tokens = max(prompt_tokens, keys[index][0])
        response_tokens = max(response_tokens, requests[index].params.max_new_tokens)
        rows = len(batches[-1]) + 1 if batches else 0
        if not batches or rows > max_batch_size or rows * (prompt_tokens + response_tokens) > max_batch_tokens:
            batches.append([])
            prompt_tokens, response_tokens = keys[index][0], requests[index].params.max_new_tokens
        batches[-1].append(index)
    return batches


@dataclasses.dataclass(frozen=True)
class PromptTable:
    """The distinct prompts of a batch."""

    token_ids: torch.Tensor  # [u, p] int64, padded on the left with 0
    pad_lengths: torch.Tensor | None  # [u] int64; None if all prompts are equally long
    rows: torch.Tensor  # [b] int64, the prompt of each request

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> PromptTable:
        """Return the prompts of ``requests``."""
        index_of: dict[bytes, int] = {}
        prompts: list[np.ndarray] = []
        rows = np.empty(len(requests), dtype=np.int64)
        for row, request in enumerate(requests):
            content = request.prompt.token_ids.tobytes()
            if content not in index_of:
                index_of[content] = len(prompts)
                prompts.append(request.prompt.token_ids)
            rows[row] = index_of[content]
        lengths = np.array([len(prompt) for prompt in prompts])
        columns = int(lengths.max())
        table = np.zeros((len(prompts), columns), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            table[row, columns - len(prompt) :] = prompt
        padded = bool((lengths < columns).any())
        return cls(
            token_ids=torch.from_numpy(table).to(device),
            pad_lengths=torch.from_numpy(columns - lengths).to(device) if padded else None,
            rows=torch.from_numpy(rows).to(device),
        )


@dataclasses.dataclass(frozen=True)
class ActiveRows:
    """The requests of a batch that are decoded; finished ones stay until there are enough of them to drop."""

    rows: torch.Tensor  # [a] int64, index in the batch
    alive: torch.Tensor  # [a] bool
    limits: torch.Tensor  # [a] int64, max_new_tokens
    stop_ids: torch.Tensor  # [a, max stop ids] int64, padded with -1
    params: BatchParams

    @classmethod
    def of(cls, requests: Sequence[Request], vocab_size: int, device: torch.device) -> ActiveRows:
        """Return all ``requests`` as active."""
        width = max(len(request.params.stop_token_ids) for request in requests)
        stop_ids = [r.params.stop_token_ids + (-1,) * (width - len(r.params.stop_token_ids)) for r in requests]
        return cls(
            rows=torch.arange(len(requests), device=device),
            alive=torch.ones(len(requests), dtype=torch.bool, device=device),
            limits=torch.tensor([request.params.max_new_tokens for request in requests], device=device),
            stop_ids=torch.tensor(stop_ids, dtype=torch.int64, device=device).view(len(requests), width),
            params=BatchParams.of([request.params for request in requests], vocab_size, device),
        )

    def after(self, stopped: torch.Tensor, position: int) -> ActiveRows:
        """Return the same rows after the token of response ``position``; stopped: [a] bool."""
        return dataclasses.replace(self, alive=self.alive & ~stopped & (self.limits > position + 1))

    def select(self, indices: torch.Tensor) -> ActiveRows:
        """Return the active rows at ``indices`` (int64), all of them alive."""
        return ActiveRows(
            self.rows[indices],
            self.alive[indices],
            self.limits[indices],
            self.stop_ids[indices],
            self.params.select(indices),
        )


class Responses:
    """The tokens of a batch so far, and the random numbers that it draws from."""

    def __init__(self, requests: Sequence[Request], device: torch.device):
        steps, rows = max(request.params.max_new_tokens for request in requests), len(requests)
        self._requests = requests
        self._device = device
        self._seeds = np.array([request.seed for request in requests], dtype=np.uint64)
        self._uniforms = torch.empty(0)
        self.tokens = torch.zeros(steps, rows, dtype=torch.int64, device=device)  # [s, b]
        self.log_probs = torch.zeros(steps, rows, device=device)  # [s, b] float32
        self.stopped = torch.zeros(steps, rows, dtype=torch.bool, device=device)  # [s, b]
        self.num_steps = 0

    def uniforms(self, rows: torch.Tensor) -> torch.Tensor:
        """Return random numbers of the current position for ``rows``: [a] float64."""
        offset = self.num_steps % POSITIONS_PER_DRAW
        if offset == 0:
            stop = min(self.num_steps + POSITIONS_PER_DRAW, len(self.tokens))
            self._uniforms = torch.from_numpy(uniforms(self._seeds, self.num_steps, stop)).to(self._device)
        return self._uniforms[offset][rows]

    def add(self, rows: torch.Tensor, tokens: torch.Tensor, stopped: torch.Tensor) -> None:
        """Write the current position of ``rows`` ([a] each) and advance to the next."""
        self.tokens[self.num_steps, rows] = tokens
        self.stopped[self.num_steps, rows] = stopped
        self.num_steps += 1

    def samples(self, version: int) -> list[Sample]:
        """Return one record per request of the batch; ``UserError`` if the model's outputs were not finite."""
        tokens = self.tokens[: self.num_steps].T.contiguous().cpu().numpy()
        log_probs = self.log_probs[: self.num_steps].T.contiguous().cpu().numpy()
        stopped = self.stopped[: self.num_steps].T.cpu().numpy()
        limits = np.array([request.params.max_new_tokens for request in self._requests])
        first_stop = np.where(stopped.any(axis=1), stopped.argmax(axis=1) + 1, self.num_steps + 1)
        lengths = np.minimum(first_stop, limits)
        broken = ~np.isfinite(log_probs) & (np.arange(self.num_steps) < lengths[:, None])
        if broken.any():
            first = self._requests[int(broken.any(axis=1).argmax())]
            raise UserError(f"the model's outputs are not finite (sample {first.id}): its weights are broken")
        reasons = np.where(first_stop <= limits, "stop", "length").tolist()
        return [
            sample_of(request, tokens[row, :length], log_probs[row, :length], reason, version)
            for row, (request, length, reason) in enumerate(zip(self._requests, lengths.tolist(), reasons, strict=True))
        ]
