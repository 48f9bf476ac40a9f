"""From logits to tokens: temperature, top-k, top-p, and random numbers that depend on (seed, position) only.

The random number of a token is a function of its request's seed and its index in the response, and the token is the
inverse of the cumulative distribution at that number, taken in the order of the vocabulary. So a request draws the same
tokens in any batch, any order and any layout, up to the rounding of its logits. Tensors are rows of one batch;
shape suffixes: B requests of the batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from megatron_s2d.rollout.engine import SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniforms(seeds: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Random numbers of the response positions ``[start, stop)``: [stop - start, B] float64 in [0, 1).

    ``seeds``: [B] uint64. SplitMix64 (Steele, Lea, Flood 2014) as a counter-based generator: the stream of a seed
    begins at its own mixed state and position t is its t-th output, of which the upper 52 bits are used.
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
    """The sampling parameters of a batch as columns; None where no row of the batch needs the step."""

    inverse_temperature: torch.Tensor | None  # [B, 1] float32, of the reported log-probabilities; None: all 1
    greedy: torch.Tensor | None  # [B, 1] bool
    top_k: torch.Tensor | None  # [B, 1] int64, the size of the vocabulary where a row keeps every token
    top_p: torch.Tensor | None  # [B, 1] float64
    all_greedy: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> BatchParams:
        """Columns of the rows' ``params``."""

        def column(values: list, neutral: float, dtype: torch.dtype) -> torch.Tensor | None:
            if all(value == neutral for value in values):
                return None
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

        top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
        greedy = [p.temperature == 0 for p in params]
        return cls(
            inverse_temperature=column([1.0 / p.log_prob_temperature for p in params], 1.0, torch.float32),
            greedy=torch.tensor(greedy, device=device).unsqueeze(1) if any(greedy) else None,
            top_k=column(top_k, vocab_size, torch.int64),
            top_p=column([p.top_p for p in params], 1.0, torch.float64),
            all_greedy=all(greedy),
        )

    def select(self, rows: torch.Tensor) -> BatchParams:
        """The columns of ``rows`` ([B'] int64) only."""
        columns = {
            name: None if (column := getattr(self, name)) is None else column[rows]
            for name in ("inverse_temperature", "greedy", "top_k", "top_p")
        }
        return dataclasses.replace(self, **columns)


def sample_tokens(
    logits_BV: torch.Tensor, params: BatchParams, uniform_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B] int64 and their log-probabilities [B] float32; NaN logits give a NaN log-probability.

    ``logits_BV`` has real vocabulary columns only; ``uniform_B`` [B] float64 in [0, 1). The log-probability is that of
    ``softmax(logits / temperature)`` over the whole vocabulary (engine.py); its sum is accumulated in float64.
    """
    logits_BV = logits_BV.float()
    if params.inverse_temperature is not None:
        logits_BV = logits_BV * params.inverse_temperature
    highest_B1, likeliest_B1 = logits_BV.max(dim=-1, keepdim=True)
    weights_BV = (logits_BV - highest_B1).exp_()
    cumulative_BV = weights_BV.cumsum(dim=-1, dtype=torch.float64)
    log_total_B1 = cumulative_BV[:, -1:].log()
    if params.all_greedy:
        tokens_B1 = likeliest_B1
    else:
        if params.top_k is not None or params.top_p is not None:
            cumulative_BV = _filter(weights_BV, params).cumsum(dim=-1, dtype=torch.float64)
        tokens_B1 = _invert(cumulative_BV, uniform_B)
        if params.greedy is not None:
            tokens_B1 = torch.where(params.greedy, likeliest_B1, tokens_B1)
    log_probs_B1 = (logits_BV.gather(1, tokens_B1) - highest_B1).double() - log_total_B1
    return tokens_B1.squeeze(1), log_probs_B1.squeeze(1).float()


def _filter(weights_BV: torch.Tensor, params: BatchParams) -> torch.Tensor:
    """``weights_BV`` with zeros where top-k or top-p drops a token.

    Top-k comes first and top-p applies to what it leaves, renormalised. A token stays in the top-p set while the
    likelier tokens before it hold less than ``top_p``, so the likeliest token always stays.
    """
    sorted_BV, order_BV = weights_BV.sort(dim=-1, descending=True, stable=True)
    if params.top_k is not None:
        rank_V = torch.arange(weights_BV.shape[1], device=weights_BV.device)
        sorted_BV.masked_fill_(rank_V >= params.top_k, 0.0)
    if params.top_p is not None:
        cumulative_BV = sorted_BV.cumsum(dim=-1, dtype=torch.float64)
        before_BV = cumulative_BV - sorted_BV
        # A row at 1 keeps even the tokens whose predecessors round up to all of the mass.
        dropped_BV = (before_BV >= params.top_p * cumulative_BV[:, -1:]) & (params.top_p < 1.0)
        sorted_BV.masked_fill_(dropped_BV, 0.0)
    return torch.empty_like(weights_BV).scatter_(1, order_BV, sorted_BV)


def _invert(cumulative_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """First token whose cumulative weight exceeds the uniform's share of the total: [B, 1] int64.

    A token of weight zero is never chosen: the cumulative sum does not grow there, and the uniform has 52 bits and is
    below 1, so its share stays below the total. Only NaN weights reach past the end, where the clamp keeps them legal.
    """
    target_B1 = uniform_B.unsqueeze(1) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, target_B1, right=True).clamp_(max=cumulative_BV.shape[1] - 1)
