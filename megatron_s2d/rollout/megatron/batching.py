"""Plans generation batches and holds one as tensors for the decoding loop of ``megatron/engine.py``.

Prompts of a batch are padded on the left to one length; a prompt that several requests share appears once. Shapes:
b requests of the batch, a active requests, u distinct prompts, p prompt length, s response positions, n positions of a
block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from megatron_s2d.buffer_sizes import POSITIONS_PER_DRAW
from megatron_s2d.errors import UserError
from megatron_s2d.parallel import device
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
    def of(cls, requests: Sequence[Request]) -> PromptTable:
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
            token_ids=device.copy_to_device(torch.from_numpy(table)),
            pad_lengths=device.copy_to_device(torch.from_numpy(columns - lengths)) if padded else None,
            rows=device.copy_to_device(torch.from_numpy(rows)),
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
    def of(cls, requests: Sequence[Request], vocab_size: int) -> ActiveRows:
        """Return all ``requests`` as active."""
        width = max(len(request.params.stop_token_ids) for request in requests)
        stop_ids = [r.params.stop_token_ids + (-1,) * (width - len(r.params.stop_token_ids)) for r in requests]
        return cls(
            rows=device.copy_to_device(torch.from_numpy(np.arange(len(requests)))),
            alive=torch.ones(len(requests), dtype=torch.bool, device=device.device()),
            limits=device.copy_to_device(
                torch.from_numpy(np.array([request.params.max_new_tokens for request in requests]))
            ),
            stop_ids=device.copy_to_device(
                torch.from_numpy(np.array(stop_ids, dtype=np.int64).reshape(len(requests), width))
            ),
            params=BatchParams.of([request.params for request in requests], vocab_size),
        )

    def select(self, indices: torch.Tensor) -> ActiveRows:
        """Return the active rows at ``indices`` (int64)."""
        return ActiveRows(
            self.rows[indices],
            self.alive[indices],
            self.limits[indices],
            self.stop_ids[indices],
            self.params.select(indices),
        )


class TokenBlock:
    """The tokens of the active rows since the host last looked: at most n positions, which it has not seen yet.

    Buffers stay where they are and the device counts the lines itself, so that a CUDA graph of a step can be replayed.
    """

    def __init__(self, num_positions: int, num_rows: int):
        where = device.device()
        self.newest = torch.zeros(num_rows, dtype=torch.int64, device=where)  # [a], input of the next forward pass
        self.tokens = torch.zeros(num_positions, num_rows, dtype=torch.int64, device=where)  # [n, a]
        self.log_probs = torch.zeros(num_positions, num_rows, device=where)  # [n, a] float32, at the root
        self.uniforms = torch.zeros(num_positions, num_rows, dtype=torch.float64, device=where)  # [n, a]
        self._line = torch.zeros(1, dtype=torch.int64, device=where)

    def begin(self, uniforms: torch.Tensor) -> None:
        """Start again at the first line, with the random numbers of the next positions: [up to n, a] float64."""
        self.uniforms[: len(uniforms)] = uniforms
        self._line.zero_()

    def uniform(self) -> torch.Tensor:
        """Return the random numbers of the current position: [a] float64."""
        return self.uniforms.index_select(0, self._line)[0]

    def add(self, tokens: torch.Tensor, log_probs: torch.Tensor | None) -> None:
        """Write the current position ([a] each) and go on to the next."""
        self.newest.copy_(tokens)
        self.tokens.index_copy_(0, self._line, tokens.unsqueeze(0))
        if log_probs is not None:
            self.log_probs.index_copy_(0, self._line, log_probs.unsqueeze(0))
        self._line += 1


class Responses:
    """The tokens of a batch so far, and the random numbers that it draws from."""

    def __init__(self, requests: Sequence[Request]):
        steps, rows = max(request.params.max_new_tokens for request in requests), len(requests)
        where = device.device()
        self._requests = requests
        self._seeds = np.array([request.seed for request in requests], dtype=np.uint64)
        self._uniforms = torch.empty(0)
        self._first_drawn = self._end_drawn = 0  # positions of the random numbers
        self.limits = np.array([request.params.max_new_tokens for request in requests])  # [b]
        self.tokens = torch.zeros(steps, rows, dtype=torch.int64, device=where)  # [s, b]
        self.log_probs = torch.zeros(steps, rows, device=where)  # [s, b] float32
        self.stopped = torch.zeros(steps, rows, dtype=torch.bool, device=where)  # [s, b]
        self.num_steps = 0

    def uniforms(self, rows: torch.Tensor, num_positions: int) -> torch.Tensor:
        """Return random numbers of the next positions for ``rows``: [up to num_positions, a] float64."""
        if self.num_steps == self._end_drawn:
            stop = min(self.num_steps + POSITIONS_PER_DRAW, len(self.tokens))
            self._uniforms = device.copy_to_device(torch.from_numpy(uniforms(self._seeds, self.num_steps, stop)))
            self._first_drawn, self._end_drawn = self.num_steps, stop
        first = self.num_steps - self._first_drawn
        return self._uniforms[first : first + num_positions].index_select(1, rows)

    def add(
        self, active: ActiveRows, tokens: torch.Tensor, log_probs: torch.Tensor, matches: torch.Tensor | None
    ) -> ActiveRows:
        """Append ``tokens`` and ``log_probs`` [n, a]; return the same rows, alive as far as none of them ended.

        matches: [n, a] bool, tokens that complete a stop string; None: no request has any.
        """
        start, stop, rows = self.num_steps, self.num_steps + len(tokens), active.rows
        stopped = (tokens.unsqueeze(2) == active.stop_ids).any(dim=2)
        if matches is not None:
            stopped |= matches
        self.tokens[start:stop].index_copy_(1, rows, tokens)
        self.log_probs[start:stop].index_copy_(1, rows, log_probs)
        self.stopped[start:stop].index_copy_(1, rows, stopped)
        self.num_steps = stop
        alive = active.alive & ~stopped.any(dim=0) & (active.limits > stop)
        return dataclasses.replace(active, alive=alive)

    def samples(
        self, version: int, rows: Sequence[int], log_probs: torch.Tensor, aborted: Mapping[int, int]
    ) -> list[Sample]:
        """Return one record for each of ``rows``; ``UserError`` if the model's outputs were not finite.

        log_probs: [s, rows], the root's. aborted: row -> tokens after which its response was ended.
        """
        parts = [self.tokens[: self.num_steps], self.stopped[: self.num_steps]]
        if len(rows) < len(self._requests):
            selected = torch.tensor(rows, device=log_probs.device)
            parts = [part[:, selected] for part in parts]
        on_host = [device.copy_to_host(part) for part in (parts[0], log_probs, parts[1])]
        device.synchronize()
        tokens, log_probs, stopped = (np.ascontiguousarray(part.numpy().T) for part in on_host)
        requests = [self._requests[row] for row in rows]
        ends = np.array([aborted.get(row, self.num_steps) for row in rows])
        first_stop = np.where(stopped.any(axis=1), stopped.argmax(axis=1) + 1, self.num_steps + 1)
        limits = self.limits[np.array(rows)]
        lengths = np.minimum(np.minimum(first_stop, limits), ends)
        broken = ~np.isfinite(log_probs) & (np.arange(self.num_steps) < lengths[:, None])
        if broken.any():
            first = requests[int(broken.any(axis=1).argmax())]
            raise UserError(f"the model's outputs are not finite (sample {first.id}): its weights are broken")
        reasons = np.where(first_stop <= lengths, "stop", np.where(limits <= lengths, "length", "abort")).tolist()
        return [
            sample_of(request, tokens[row, :length], log_probs[row, :length], reason, version)
            for row, (request, length, reason) in enumerate(zip(requests, lengths.tolist(), reasons, strict=True))
        ]
