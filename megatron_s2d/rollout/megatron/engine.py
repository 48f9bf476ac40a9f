"""Generation in the training process by the trained Megatron model itself, with a key-value cache.

All ranks of one model replica (tensor x pipeline) call ``generate`` with the same requests and return the same samples;
every data-parallel replica brings its own. Communication for each generated token:

    pipeline ranks      each sends its hidden states to the next (point to point)
    last pipeline rank  tensor ranks gather their vocabulary shards at tensor rank 0, the root; padding is cut off
    root                samples, decides which responses stop, and broadcasts (token, stopped) to the replica

so only the root draws tokens, and log-probabilities are sent once, when a batch is finished. With experts on several
data-parallel ranks, ranks that have finished keep joining the others' forward passes until all are done.

Not supported: continuous batching (finished responses are dropped and the batch shrinks), pipelining several batches,
virtual pipeline stages, context parallelism. Shapes: a active requests, s response positions, v_tp local vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_s2d.errors import UserError
from megatron_s2d.models.kv_cache import KeyValueCache
from megatron_s2d.parallel import device
from megatron_s2d.parallel.collectives import any_rank, is_same_on_all_ranks
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import Sample
from megatron_s2d.rollout.engine import Decoder, ProgressCallback, Request, check_requests, requests_digest
from megatron_s2d.rollout.megatron.batching import ActiveRows, PromptTable, Responses, plan_batches
from megatron_s2d.rollout.megatron.sampling import sample_tokens

# A batch is shrunk when this share of its rows, or less, is still alive: copying the remaining keys and values costs
# about as much memory traffic as one step's attention, while every dead row costs a full row of every layer.
_SHRINK_BELOW = 0.75

# Megatron's switches of sequence parallelism on modules; a single decoded token cannot be split over tensor ranks.
_SEQUENCE_PARALLEL_SWITCHES = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


class MegatronEngine:
    """A ``RolloutEngine`` over the model that is being trained; a weight update only sets the version."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        vocab_size: int,
        layout: Layout,
        *,
        tokenizer: Decoder | None = None,
        max_batch_size: int = 1024,
        max_batch_tokens: int = 262_144,
    ):
        """chunks: the bare model of this rank. vocab_size: without padding. tokenizer: for stop strings only.

        max_batch_size: rows of a batch at most. max_batch_tokens: rows x (prompt + response) at most, which bounds
        the memory of keys and values.
        """
        if len(chunks) != 1:
            raise UserError(f"generation does not support virtual pipeline stages ({len(chunks)} chunks on a rank)")
        if layout.config.context_parallel_size > 1:
            raise UserError("generation does not support context_parallel_size > 1: generate with another layout")
        if max_batch_size < 1 or max_batch_tokens < 1:
            raise UserError("generation: max_batch_size and max_batch_tokens must be at least 1")
        self.version = 0
        self._chunk = chunks[0]
        self._vocab_size = vocab_size
        self._layout = layout
        self._tokenizer = tokenizer
        self._max_batch_size = max_batch_size
        self._max_batch_tokens = max_batch_tokens
        self._device = device.device()
        # Ranks of a replica are ordered by pipeline rank, then by tensor rank (Megatron's order).
        self._root = layout.tp_size * (layout.pp_size - 1)
        self._is_root = layout.groups.mp.rank() == self._root
        self._is_alone = layout.groups.mp.size() == 1

    def update_weights(self, chunks: Sequence[Any], version: int) -> None:
        """Set the version: the engine generates with the trained weights, and ``chunks`` must be its own model."""
        if len(chunks) != 1 or chunks[0] is not self._chunk:
            raise ValueError("this engine generates with the model that it was built on and got another one")
        self.version = version

    def metrics(self) -> dict[str, float]:
        """Return nothing: a weight update copies nothing."""
        return {}

    def close(self) -> None:
        """Do nothing: no memory is used between calls."""

    def submit(self, requests: Sequence[Request], num_groups: int | None = None) -> None:
        """Do nothing: the model generates when it does not train."""

    def sleep(self) -> None:
        """Do nothing: no memory is used between two calls of ``generate``."""

    def generate(
        self,
        requests: Sequence[Request],
        progress: ProgressCallback | None = None,
        *,
        num_groups: int | None = None,
    ) -> list[Sample]:
        """Return one sample per request, in order, the same on all ranks of the replica.

        Raises ``UserError`` for an empty prompt, an unknown token, a prompt and response longer than the model's
        positions, stop strings without a tokenizer, and a model whose outputs are not finite.
        """
        if num_groups is not None:
            raise ValueError("the engine in the training process completes all responses of a call")
        requests = list(requests)
        self._check(requests)
        samples: list[Sample | None] = [None] * len(requests)
        done = 0
        with self._inference():
            for batch in plan_batches(requests, self._max_batch_size, self._max_batch_tokens):
                generated = self._generate_batch([requests[index] for index in batch])
                for index, sample in zip(batch, generated, strict=True):
                    samples[index] = sample
                done += len(batch)
                if progress is not None:
                    progress(done, len(requests))
            self._join_until_all_done()
        return samples

    def _generate_batch(self, requests: list[Request]) -> list[Sample]:
        prompts = PromptTable.of(requests, self._device)
        active = ActiveRows.of(requests, self._vocab_size, self._device)
        responses = Responses(requests, self._device)
        stop_strings = _StopStrings.of(requests, self._tokenizer)
        prompt_length = prompts.token_ids.shape[1]
        cache = KeyValueCache(prompts.pad_lengths, prompt_length, prompt_length + len(responses.tokens))
        logits = self._forward(prompts.token_ids, cache)
        cache.select(prompts.rows)
        logits = None if logits is None else logits[prompts.rows]
        while True:
            tokens, stopped = self._sample(logits, active, responses, stop_strings)
            active = active.after(stopped, responses.num_steps - 1)
            num_alive = int(active.alive.sum())
            if num_alive == 0:
                break
            if num_alive <= _SHRINK_BELOW * len(active.rows):
                alive = active.alive.nonzero().squeeze(1)
                active, tokens = active.select(alive), tokens[alive]
                cache.select(alive)
            logits = self._forward(tokens.unsqueeze(1), cache)
        if not self._is_alone:
            log_probs = responses.log_probs[: responses.num_steps].contiguous()
            dist.broadcast(log_probs, group=self._layout.groups.mp, group_src=self._root)
            responses.log_probs[: responses.num_steps] = log_probs
        return responses.samples(self.version)

    def _sample(
        self, logits: torch.Tensor | None, active: ActiveRows, responses: Responses, stop_strings: _StopStrings | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next tokens [a] int64 and which of them end their response [a] bool, the same on every rank."""
        position = responses.num_steps
        if logits is not None and self._layout.tp_size > 1:
            logits = self._gather_vocabulary(logits)
        decision = torch.empty(2, len(active.rows), dtype=torch.int64, device=self._device)
        if self._is_root:
            uniform = responses.uniforms(active.rows)
            tokens, log_probs = sample_tokens(logits[:, : self._vocab_size], active.params, uniform)
            responses.log_probs[position, active.rows] = log_probs
            stopped = (tokens.unsqueeze(1) == active.stop_ids).any(dim=1)
            if stop_strings is not None:
                stopped |= stop_strings.completed(responses.tokens[:position], tokens, active)
            decision[0], decision[1] = tokens, stopped
        if not self._is_alone:
            dist.broadcast(decision, group=self._layout.groups.mp, group_src=self._root)
        tokens, stopped = decision[0], decision[1].bool()
        responses.add(active.rows, tokens, stopped)
        return tokens, stopped

    def _gather_vocabulary(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Return the shards [a, v_tp] concatenated at the root; None elsewhere."""
        shards = [torch.empty_like(logits) for _ in range(self._layout.tp_size)] if self._is_root else None
        dist.gather(logits.contiguous(), shards, group=self._layout.groups.tp, group_dst=0)
        return torch.cat(shards, dim=1) if shards is not None else None

    def _forward(self, token_ids: torch.Tensor, cache: KeyValueCache) -> torch.Tensor | None:
        """Return logits of the last column on the last pipeline rank, [rows, v_tp]; None on the others."""
        self._any_working(working=True)
        return self._run_pipeline(token_ids, cache)

    def _run_pipeline(self, token_ids: torch.Tensor, cache: KeyValueCache) -> torch.Tensor | None:
        layout, config = self._layout, self._chunk.config
        if not layout.is_pipeline_first_stage:
            shape = (token_ids.shape[1], token_ids.shape[0], config.hidden_size)
            hidden = torch.empty(shape, dtype=config.pipeline_dtype, device=self._device)
            dist.recv(hidden, group=layout.groups.pp, group_src=layout.pp_rank - 1)
            self._chunk.set_input_tensor(hidden)
        output = self._chunk(
            token_ids, None, cache.attention_mask, inference_context=cache, output_processor=_last_column_logits
        )
        cache.advance()
        if layout.is_pipeline_last_stage:
            return output
        dist.send(output.contiguous(), group=layout.groups.pp, group_dst=layout.pp_rank + 1)
        return None

    def _any_working(self, *, working: bool) -> bool:
        """Return whether a rank that shares experts with this one still generates; called before each forward pass."""
        return any_rank(working, self._layout.groups.ep)

    def _join_until_all_done(self) -> None:
        """Run this rank's experts for the others: one token joins each of their forward passes."""
        while self._any_working(working=False):
            token = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
            self._run_pipeline(token, KeyValueCache(None, 1, 1))

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """Switch to evaluation mode, without graph, sequence parallelism and FP8, and back afterwards.

        ``no_grad`` rather than ``inference_mode``: Megatron caches rotary tables that training uses too. A decoded
        token of a few rows does not fill the blocks of an FP8 product, so layers compute with their bfloat16 weights.
        """
        chunk, was_training = self._chunk, self._chunk.training
        fp8 = chunk.config.fp8
        chunk.eval()
        chunk.config.fp8 = None
        switches = _sequence_parallel_switches(chunk)
        for owner, name in switches:
            setattr(owner, name, False)
        try:
            with self._layout.active(), torch.no_grad():
                yield
        finally:
            for owner, name in switches:
                setattr(owner, name, True)
            chunk.config.fp8 = fp8
            if not self._layout.is_pipeline_first_stage:
                chunk.set_input_tensor(None)
            chunk.train(was_training)

    def _check(self, requests: list[Request]) -> None:
        check_requests(
            requests,
            vocab_size=self._vocab_size,
            max_positions=self._chunk.max_sequence_length,
            has_tokenizer=self._tokenizer is not None,
        )
        if not self._is_alone:
            self._check_same_requests(requests)

    def _check_same_requests(self, requests: list[Request]) -> None:
        """Raise if ranks of the replica have different requests: they would wait for each other forever."""
        if not is_same_on_all_ranks(requests_digest(requests), self._layout.groups.mp):
            raise RuntimeError("the ranks of one model replica have different requests")


class _StopStrings:
    """Finds responses whose newest token completes a stop string."""

    def __init__(self, strings: list[tuple[str, ...]], decode: Any):
        self._strings = strings  # of each row of the batch
        self._decode = decode
        # A token has at least one byte, so a match that the newest token completes spans at most as many tokens as
        # the string has bytes; a few more, because decoders treat the start of a text differently.
        self._window = 4 + max(len(text.encode()) for texts in strings for text in texts)

    @classmethod
    def of(cls, requests: list[Request], tokenizer: Decoder | None) -> _StopStrings | None:
        """Return None if no request has stop strings."""
        strings = [request.params.stop_strings for request in requests]
        return cls(strings, tokenizer.decode) if any(strings) else None

    def completed(self, earlier: torch.Tensor, tokens: torch.Tensor, active: ActiveRows) -> torch.Tensor:
        """Return which rows' ``tokens`` [a] complete a stop string after the ``earlier`` ones [s, b]: [a] bool."""
        history = earlier[max(0, len(earlier) + 1 - self._window) :, active.rows]
        windows = torch.cat([history, tokens.unsqueeze(0)]).T.tolist()
        rows, alive = active.rows.tolist(), active.alive.tolist()
        strings = [self._strings[row] if live else () for row, live in zip(rows, alive, strict=True)]
        flags = [self._contains(window, texts) for window, texts in zip(windows, strings, strict=True)]
        return torch.tensor(flags, device=tokens.device)

    def _contains(self, window: list[int], texts: tuple[str, ...]) -> bool:
        if not texts:
            return False
        decoded = self._decode(window)
        return any(text in decoded for text in texts)


def _last_column_logits(*, hidden_states, output_layer, output_weight, scale_logits, **_) -> torch.Tensor:
    """Return logits of the last column only, [a, v_tp]; Megatron's output hook."""
    logits, _ = output_layer(hidden_states[-1:], weight=output_weight, runtime_gather_output=False)
    return scale_logits(logits)[0]


def _sequence_parallel_switches(chunk: torch.nn.Module) -> list[tuple[Any, str]]:
    """Return every (object, attribute) of the model that is on and splits sequences over tensor ranks."""
    owners = {id(owner): owner for module in chunk.modules() for owner in (module, getattr(module, "config", None))}
    return [
        (owner, name)
        for owner in owners.values()
        for name in _SEQUENCE_PARALLEL_SWITCHES
        if getattr(owner, name, False) is True
    ]
