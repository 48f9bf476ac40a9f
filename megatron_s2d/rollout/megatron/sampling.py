"""Samples tokens from logits: temperature, top-k, top-p, and random numbers that depend on (seed, position) only.

The random number of a token is a function of its request's seed and its index in the response, and the token is the
inverse of the cumulative distribution at that number, in the order of the vocabulary. So a request draws the same
tokens in any batch, any order and any layout, up to the rounding of its logits.

The numbers are computed here rather than by ``torch.Generator``: a generator's output depends on everything that was
drawn from it before, so each request would need a generator of its own, one kernel launch per row and token, and CPU
and GPU generators draw different numbers. Shapes: b requests of the batch, v vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from megatron_s2d.buffer_sizes import FEWEST_COLUMNS_IN_BLOCKS
from megatron_s2d.parallel import device
from megatron_s2d.rollout.engine import SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

# Likeliest tokens that top-p looks at first on a CPU; a response's next token is rarely less certain.
_CANDIDATES = 1024

# Tokens of a block whose mass is summed on its own on a CPU.
_BLOCK = 128


def uniforms(seeds: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Return random numbers of the response positions ``[start, stop)``: [stop - start, b] float64 in [0, 1).

    seeds: [b] uint64. SplitMix64 (Steele, Lea, Flood 2014) as a counter-based generator: the stream of a seed starts
    at its mixed state, and position t is its t-th output, of which the upper 52 bits are used.
    """
    positions = np.arange(start + 1, stop + 1, dtype=np.uint64)[:, None]
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the algorithm
        state = _mix(seeds.astype(np.uint64) + _GOLDEN)[None, :] + positions * _GOLDEN
        return (_mix(state) >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class BatchParams:
    """The sampling parameters of a batch as columns; None if no row of the batch needs the step."""

    inverse_temperature: torch.Tensor | None  # [b, 1] float32, of the reported log-probabilities; None: all 1
    greedy: torch.Tensor | None  # [b, 1] bool
    top_k: torch.Tensor | None  # [b, 1] int64, the vocabulary size for a row without top-k
    top_p: torch.Tensor | None  # [b, 1] float64
    max_top_k: int  # of the rows with top-k
    all_greedy: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_size: int) -> BatchParams:
        """Return the columns of the rows' ``params``, on this rank's device."""

        def column(values: list, neutral: float, dtype: type) -> torch.Tensor | None:
            if all(value == neutral for value in values):
                return None
            return device.copy_to_device(torch.from_numpy(np.array(values, dtype=dtype))).unsqueeze(1)

        top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
        greedy = [p.temperature == 0 for p in params]
        return cls(
            inverse_temperature=column([1.0 / p.log_prob_temperature for p in params], 1.0, np.float32),
            greedy=column(greedy, False, np.bool_),
            top_k=column(top_k, vocab_size, np.int64),
            top_p=column([p.top_p for p in params], 1.0, np.float64),
            max_top_k=max((k for k in top_k if k < vocab_size), default=vocab_size),
            all_greedy=all(greedy),
        )

    def select(self, rows: torch.Tensor) -> BatchParams:
        """Return the columns of ``rows`` (int64 indices) only."""
        columns = {
            name: None if (column := getattr(self, name)) is None else column[rows]
            for name in ("inverse_temperature", "greedy", "top_k", "top_p")
        }
        return dataclasses.replace(self, **columns)


def sample_tokens(
    logits: torch.Tensor, params: BatchParams, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens [b] int64 and their log-probabilities [b] float32; NaN logits give a NaN log-probability.

    logits: [b, v], without padded columns. uniform: [b] float64 in [0, 1). The log-probability is that of
    ``softmax(logits / temperature)`` over the full vocabulary (``rollout/engine.py``), summed in float64.
    """
    logits = logits.float()
    if params.inverse_temperature is not None:
        logits = logits * params.inverse_temperature
    max_logit = logits.amax(dim=-1, keepdim=True)
    exp_logits = (logits - max_logit).exp_()
    mass = _CumulativeMass(exp_logits)
    log_total = mass.total().log()
    if params.all_greedy:
        tokens = logits.argmax(dim=-1, keepdim=True)
    else:
        if params.top_k is not None or params.top_p is not None:
            mass = _CumulativeMass(_filter(exp_logits, params))
        tokens = mass.invert(uniform)
        if params.greedy is not None:
            tokens = torch.where(params.greedy, logits.argmax(dim=-1, keepdim=True), tokens)
    log_probs = (logits.gather(1, tokens) - max_logit).double() - log_total
    return tokens.squeeze(1), log_probs.squeeze(1).float()


def _filter(exp_logits: torch.Tensor, params: BatchParams) -> torch.Tensor:
    """Return ``exp_logits`` [b, v] with zeros where top-k or top-p drops a token.

    Top-k comes first and top-p applies to the remaining tokens, renormalised. A token stays in the top-p set while the
    likelier tokens before it hold less than ``top_p``, so the likeliest token always stays. Of equally likely tokens
    the first ones of the vocabulary stay. The vocabulary is not sorted: both filters find the least mass that stays.
    """
    if params.top_k is not None:
        exp_logits = _keep_top_k(exp_logits, params.top_k, params.max_top_k)
    if params.top_p is not None:
        exp_logits = _keep_top_p(exp_logits, params.top_p)
    return exp_logits


def _keep_top_k(mass: torch.Tensor, top_k: torch.Tensor, max_top_k: int) -> torch.Tensor:
    # Rows without top-k have the vocabulary size.
    likeliest = mass.topk(max_top_k, dim=-1).values
    least = likeliest.gather(1, (top_k - 1).clamp(max=max_top_k - 1))
    ties = mass == least
    num_above = (mass > least).sum(dim=-1, keepdim=True)
    stays = (mass > least) | (ties & (num_above + ties.cumsum(dim=-1) <= top_k)) | (top_k == mass.shape[1])
    return torch.where(stays, mass, 0.0)


def _keep_top_p(mass: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    target = top_p * mass.sum(dim=-1, keepdim=True, dtype=torch.float64)
    least = _least_mass_on_device(mass, target) if mass.is_cuda else _least_mass_on_host(mass, target)
    above = torch.where(mass > least, mass, 0.0).sum(dim=-1, keepdim=True, dtype=torch.float64)
    ties = mass == least
    before = above + (ties.cumsum(dim=-1) - 1) * least.double()
    # A row with top_p 1 keeps even the tokens whose predecessors round up to all of the mass.
    stays = (mass > least) | (ties & (before < target)) | (top_p == 1.0)
    return torch.where(stays, mass, 0.0)


def _least_mass_on_host(mass: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the largest mass such that the tokens of at least that mass hold ``target``: [b, 1].

    Sorts a few candidates, and the whole vocabulary only of rows where these do not hold enough.
    """
    num_candidates = min(_CANDIDATES, mass.shape[1])
    candidates = mass.topk(num_candidates, dim=-1).values
    index = (candidates.cumsum(dim=-1, dtype=torch.float64) < target).sum(dim=-1, keepdim=True)
    least = candidates.gather(1, index.clamp(max=num_candidates - 1))
    short = (index == num_candidates).squeeze(1).nonzero().squeeze(1)
    if len(short):
        candidates = mass[short].sort(dim=-1, descending=True).values
        index = (candidates.cumsum(dim=-1, dtype=torch.float64) < target[short]).sum(dim=-1, keepdim=True)
        least[short] = candidates.gather(1, index.clamp(max=mass.shape[1] - 1))
    return least


def _least_mass_on_device(mass: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """As ``_least_mass_on_host``, without a decision that the host would wait for: by bisection.

    Floats that are not negative are ordered as their bits are, and no mass is above 1, so that 30 bits are to be found.
    """
    bits = torch.zeros(len(mass), 1, dtype=torch.int32, device=mass.device)
    for bit in range(29, -1, -1):
        larger = bits | (1 << bit)
        held = torch.where(mass >= larger.view(torch.float32), mass, 0.0).sum(dim=-1, keepdim=True, dtype=torch.float64)
        bits = torch.where(held >= target, larger, bits)
    return bits.view(torch.float32)


class _CumulativeMass:
    """The cumulative mass of ``mass`` [b, v] in float64: of every token, or on a CPU of blocks of a large vocabulary.

    There only the block of the drawn token is summed token by token.
    """

    def __init__(self, mass: torch.Tensor):
        self._mass = mass
        body = mass.shape[1] // _BLOCK * _BLOCK
        if mass.is_cuda or body < FEWEST_COLUMNS_IN_BLOCKS:
            self._sums = None
            self._cumulative = mass.cumsum(dim=-1, dtype=torch.float64)
            return
        sums = mass[:, :body].unflatten(1, (-1, _BLOCK)).sum(dim=2, dtype=torch.float64)
        if body < mass.shape[1]:
            sums = torch.cat([sums, mass[:, body:].sum(dim=1, keepdim=True, dtype=torch.float64)], dim=1)
        self._sums, self._cumulative = sums, sums.cumsum(dim=1)

    def total(self) -> torch.Tensor:
        """Return the mass of all tokens, [b, 1]."""
        return self._cumulative[:, -1:]

    def invert(self, uniform: torch.Tensor) -> torch.Tensor:
        """Return the first token whose cumulative mass exceeds the uniform's share [b] of the total: [b, 1] int64.

        A token of mass zero is never drawn: the cumulative sum does not grow there, and the uniform has 52 bits and is
        below 1, so its share stays below the total. Only NaN reaches past the end, where the clamp keeps it a valid
        index.
        """
        target = uniform.unsqueeze(1) * self.total()
        index = torch.searchsorted(self._cumulative, target, right=True).clamp_(max=self._cumulative.shape[1] - 1)
        return index if self._sums is None else self._in_block(index, target)

    def _in_block(self, block: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the token in ``block`` [b, 1]."""
        assert self._sums is not None
        last = self._mass.shape[1] - 1
        tokens = block * _BLOCK + torch.arange(_BLOCK, device=block.device)
        mass = self._mass.gather(1, tokens.clamp(max=last)).double().masked_fill_(tokens > last, 0.0)
        cumulative = mass.cumsum(dim=1)
        rest = target - (self._cumulative - self._sums).gather(1, block)
        # Sums in another order may differ in the last bit; the token still has to be one that has mass.
        below_all = torch.nextafter(cumulative[:, -1:], cumulative.new_zeros(()))
        rest = torch.minimum(rest.clamp_(min=0.0), below_all)
        return (block * _BLOCK + torch.searchsorted(cumulative, rest, right=True)).clamp_(max=last)
