"""Generation in the training process, by the live Megatron model itself, with its keys and values kept.

All ranks of one model replica (tensor x pipeline) call ``generate`` with the same requests and return the same samples;
every data-parallel replica brings its own. Who waits for whom, once per generated token:

    stage 0 .. last   each stage sends its hidden states to the next (point to point)
    last stage        tensor ranks gather their vocabulary shards at tensor rank 0, the root; padded columns are cut off
    root              samples, decides which responses stop, and broadcasts (token, stopped) to the whole replica

so no rank ever draws a token of its own, and log-probabilities travel once, when a batch is finished. With experts
spread over data-parallel ranks, ranks that have finished keep joining the others' forward passes until all are done.

Left out: refilling the places of finished responses (they are dropped and the batch shrinks), pipelining several
batches through the stages, virtual pipeline stages, context parallelism.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_s2d.errors import UserError
from megatron_s2d.models.kv_cache import KeyValueCache
from megatron_s2d.parallel import device
from megatron_s2d.parallel.collectives import any_rank, is_same_on_all_ranks
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import Sample
from megatron_s2d.rollout.engine import ProgressCallback, Request, check_requests, requests_digest
from megatron_s2d.rollout.megatron.batching import ActiveRows, PromptTable, Responses, plan_batches
from megatron_s2d.rollout.megatron.sampling import sample_tokens

# A batch is shrunk when this share of its rows, or less, is still alive: copying the kept keys and values costs about
# as much memory traffic as one step's attention, while every dead row costs a whole row of every layer.
_SHRINK_BELOW = 0.75

# Megatron's switches of sequence parallelism on modules; a single decoded token cannot be cut over tensor ranks.
_SEQUENCE_PARALLEL_SWITCHES = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


class Decoder(Protocol):
    """What stop strings need of a tokenizer; Hugging Face tokenizers have it."""

    def decode(self, token_ids: list[int]) -> str: ...


class MegatronEngine:
    """A ``RolloutEngine`` over the model that is being trained; a push only raises the version."""

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
        """``chunks``: the bare model of this rank; ``vocab_size``: tokens that exist, without padding.

        ``tokenizer`` is needed for stop strings only. ``max_batch_size`` bounds the rows of a batch and
        ``max_batch_tokens`` its rows x (prompt + response), which bounds the memory of keys and values.
        """
        if len(chunks) != 1:
            raise UserError(f"generation does not support virtual pipeline stages (found {len(chunks)} on a rank)")
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
        # Ranks of a replica are ordered by stage, tensor ranks within (Megatron's order).
        self._root = layout.tp_size * (layout.pp_size - 1)
        self._is_root = layout.groups.mp.rank() == self._root
        self._is_alone = layout.groups.mp.size() == 1

    def update_weights(self, chunks: Sequence[Any], version: int) -> None:
        """The engine reads the live weights, so only the version changes; ``chunks`` must be its own model."""
        if len(chunks) != 1 or chunks[0] is not self._chunk:
            raise ValueError("this engine generates with the model it was built on and was pushed another one")
        self.version = version

    def metrics(self) -> dict[str, float]:
        """A push moves nothing."""
        return {}

    def close(self) -> None:
        """Nothing is held between calls."""

    def submit(self, requests: Sequence[Request], num_groups: int | None = None) -> None:
        """Nothing: the model generates when it does not train."""

    def sleep(self) -> None:
        """Nothing: between two calls of ``generate`` nothing is held."""

    def generate(
        self,
        requests: Sequence[Request],
        progress: ProgressCallback | None = None,
        *,
        num_groups: int | None = None,
    ) -> list[Sample]:
        """One sample per request, in order, the same on all ranks of the replica; parameters stay trainable.

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
            tokens, stopped = self._choose(logits, active, responses, stop_strings)
            active = active.after(stopped, responses.num_steps - 1)
            num_alive = int(active.alive.sum())
            if num_alive == 0:
                break
            if num_alive <= _SHRINK_BELOW * len(active.rows):
                kept = active.alive.nonzero().squeeze(1)
                active, tokens = active.select(kept), tokens[kept]
                cache.select(kept)
            logits = self._forward(tokens.unsqueeze(1), cache)
        if not self._is_alone:
            log_probs = responses.log_probs[: responses.num_steps].contiguous()
            dist.broadcast(log_probs, group=self._layout.groups.mp, group_src=self._root)
            responses.log_probs[: responses.num_steps] = log_probs
        return responses.samples(self.version)

    def _choose(
        self, logits: torch.Tensor | None, active: ActiveRows, responses: Responses, stop_strings: _StopStrings | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next tokens [A] int64 and which of them end their response [A] bool, the same on every rank."""
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
        """Shards [A, V / tensor ranks] put side by side at the root; None elsewhere."""
        shards = [torch.empty_like(logits) for _ in range(self._layout.tp_size)] if self._is_root else None
        dist.gather(logits.contiguous(), shards, group=self._layout.groups.tp, group_dst=0)
        return torch.cat(shards, dim=1) if shards is not None else None

    def _forward(self, token_ids: torch.Tensor, cache: KeyValueCache) -> torch.Tensor | None:
        """Logits of the last column on the last stage, [rows, V / tensor ranks]; None on the others."""
        self._announce(working=True)
        return self._run_stages(token_ids, cache)

    def _run_stages(self, token_ids: torch.Tensor, cache: KeyValueCache) -> torch.Tensor | None:
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

    def _announce(self, *, working: bool) -> bool:
        """Whether any rank that shares experts with this one still works; every forward pass begins with this."""
        return any_rank(working, self._layout.groups.ep)

    def _join_until_all_done(self) -> None:
        """Lend this rank's experts to the others: one token goes along with each of their forward passes."""
        while self._announce(working=False):
            token = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
            self._run_stages(token, KeyValueCache(None, 1, 1))

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """Evaluation mode, no graph, whole sequences on every tensor rank, no FP8; as before afterwards.

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
        """Ranks that decode different requests would wait for each other forever."""
        if not is_same_on_all_ranks(requests_digest(requests), self._layout.groups.mp):
            raise RuntimeError("the ranks of one model replica were given different requests")


class _StopStrings:
    """Finds responses whose text has just come to contain one of their stop strings."""

    def __init__(self, strings: list[tuple[str, ...]], decode: Any):
        self._strings = strings  # of each row of the batch
        self._decode = decode
        # A token has at least one byte, so a match that the newest token completes lies within as many tokens as the
        # string has bytes; a few more keep what a decoder does at the start of a text away from it.
        self._window = 4 + max(len(text.encode()) for texts in strings for text in texts)

    @classmethod
    def of(cls, requests: list[Request], tokenizer: Decoder | None) -> _StopStrings | None:
        """None where no request has stop strings."""
        strings = [request.params.stop_strings for request in requests]
        return cls(strings, tokenizer.decode) if any(strings) else None

    def completed(self, earlier: torch.Tensor, tokens: torch.Tensor, active: ActiveRows) -> torch.Tensor:
        """Which rows' ``tokens`` ([A]) complete a stop string, ``earlier`` ([T, B]) being before them: [A] bool."""
        history = earlier[max(0, len(earlier) + 1 - self._window) :, active.rows]
        windows = torch.cat([history, tokens.unsqueeze(0)]).T.tolist()
        rows, alive = active.rows.tolist(), active.alive.tolist()
        strings = [self._strings[row] if live else () for row, live in zip(rows, alive, strict=True)]
        found = [self._contains(window, texts) for window, texts in zip(windows, strings, strict=True)]
        return torch.tensor(found, device=tokens.device)

    def _contains(self, window: list[int], texts: tuple[str, ...]) -> bool:
        if not texts:
            return False
        decoded = self._decode(window)
        return any(text in decoded for text in texts)


def _last_column_logits(*, hidden_states, output_layer, output_weight, scale_logits, **_) -> torch.Tensor:
    """Megatron's output hook: logits of the last column only, this rank's part of the vocabulary."""
    logits, _ = output_layer(hidden_states[-1:], weight=output_weight, runtime_gather_output=False)
    return scale_logits(logits)[0]


def _sequence_parallel_switches(chunk: torch.nn.Module) -> list[tuple[Any, str]]:
    """Every (object, attribute) of the model that is on and cuts sequences over tensor ranks."""
    owners = {id(owner): owner for module in chunk.modules() for owner in (module, getattr(module, "config", None))}
    return [
        (owner, name)
        for owner in owners.values()
        for name in _SEQUENCE_PARALLEL_SWITCHES
        if getattr(owner, name, False) is True
    ]
