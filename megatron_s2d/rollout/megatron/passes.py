"""Forward passes of generation over the ranks of one model replica, and the tokens that are drawn from them.

Communication for each generated token:

    pipeline ranks      each sends its hidden states to the next (point to point)
    last pipeline rank  tensor ranks gather their vocabulary shards at tensor rank 0, the root; padding is cut off
    root                samples, and broadcasts the tokens to the replica

so only the root draws tokens. With experts on several data-parallel ranks, ranks that have finished keep joining the
others' forward passes until all are done; before each pass their hosts agree on what it is. Shapes: a active requests,
u distinct prompts, p prompt length, s response positions, v_tp local vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_s2d.buffer_sizes import FEWEST_PREPARED_TOKENS, POSITIONS_PER_CHECK
from megatron_s2d.models.batched_experts import BatchedExperts
from megatron_s2d.models.decoding import decode, decode_kernels
from megatron_s2d.models.fixed_kv_cache import FixedKeyValueCache
from megatron_s2d.models.kv_cache import KeyValueCache
from megatron_s2d.models.packed_weights import packed_weights
from megatron_s2d.parallel import device
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.rollout.megatron.batching import PromptTable, TokenBlock
from megatron_s2d.rollout.megatron.sampling import BatchParams, sample_tokens

_MANY_ROWS = 1 << 30  # more than are batched over all experts

# Megatron's switches of sequence parallelism on modules; a single decoded token cannot be split over tensor ranks.
_SEQUENCE_PARALLEL_SWITCHES = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


class ModelPasses:
    """The model of this rank's replica as a generator of next tokens. Every method is collective over the replica."""

    def __init__(self, chunk: torch.nn.Module, vocab_size: int, layout: Layout):
        """chunk: the bare model of this rank. vocab_size: without padding."""
        self.chunk, self.layout = chunk, layout
        self.device = device.device()
        self.fixed_buffers = self.device.type == "cuda"  # keys and values stay where they are between two tokens
        self._vocab_size = vocab_size
        # Decode with all experts at once where that saves waits of the host: on a GPU.
        self.batches_experts = self.fixed_buffers and chunk.config.num_moe_experts is not None
        self._experts: BatchedExperts | None = None  # within ``inference``
        self._expert_rows: int | None = None  # of each rank in the next pass; None: its experts are not batched
        self._kernels = decode_kernels()
        # Ranks of a replica are ordered by pipeline rank, then by tensor rank (Megatron's order).
        self._root = layout.tp_size * (layout.pp_size - 1)
        self.is_root = layout.groups.mp.rank() == self._root
        self.is_alone = layout.groups.mp.size() == 1

    @property
    def vocab_size(self) -> int:
        """Tokens without padding."""
        return self._vocab_size

    def new_cache(self, prompts: PromptTable, num_columns: int) -> KeyValueCache:
        """Return an empty cache for ``prompts`` and ``num_columns`` tokens after them."""
        cache_class = FixedKeyValueCache if self.fixed_buffers else KeyValueCache
        length = prompts.token_ids.shape[1]
        return cache_class(prompts.pad_lengths, length, length + num_columns)

    @property
    def positions_per_check(self) -> int:
        """Tokens that are decoded before the host looks for ended responses."""
        return POSITIONS_PER_CHECK[self.device.type]

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the root's ``tensor`` on all ranks of the replica; it is overwritten on the others."""
        if not self.is_alone:
            dist.broadcast(tensor, group=self.layout.groups.mp, group_src=self._root)
        return tensor

    def step(self, params: BatchParams, block: TokenBlock, cache: KeyValueCache) -> None:
        """Decode one token of each row; nothing here is a decision or a number of the host where buffers are fixed."""
        layout, config = self.layout, self.chunk.config
        cache.begin_token()
        hidden = None
        if not layout.is_pipeline_first_stage:
            shape = (1, len(block.newest), config.hidden_size)
            hidden = torch.empty(shape, dtype=config.pipeline_dtype, device=self.device)
            dist.recv(hidden, group=layout.groups.pp, group_src=layout.pp_rank - 1)
        experts = self._experts if self._expert_rows is not None else None
        output = decode(self.chunk, block.newest, hidden, cache, self._kernels, experts)
        if not layout.is_pipeline_last_stage:
            dist.send(output.contiguous(), group=layout.groups.pp, group_dst=layout.pp_rank + 1)
        self.sample(output if layout.is_pipeline_last_stage else None, params, block)

    def sample(self, logits: torch.Tensor | None, params: BatchParams, block: TokenBlock) -> None:
        """Draw the next tokens, the same on every rank of the replica, and write them to ``block``."""
        if logits is not None and self.layout.tp_size > 1:
            logits = self._gather_vocabulary(logits)
        tokens, log_probs = block.newest, None
        if self.is_root:
            tokens, log_probs = sample_tokens(logits[:, : self._vocab_size], params, block.uniform())
        block.add(self.broadcast(tokens), log_probs)

    def _gather_vocabulary(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Return the shards [a, v_tp] concatenated at the root; None elsewhere."""
        shards = [torch.empty_like(logits) for _ in range(self.layout.tp_size)] if self.is_root else None
        dist.gather(logits.contiguous(), shards, group=self.layout.groups.tp, group_dst=0)
        return torch.cat(shards, dim=1) if shards is not None else None

    def prefill(self, token_ids: torch.Tensor, cache: KeyValueCache) -> torch.Tensor | None:
        """Return logits [u, v_tp] behind the prompts [u, p] on the last pipeline rank; None elsewhere."""
        self.begin_pass(_MANY_ROWS)
        return self._run_pipeline(token_ids, cache)

    def _run_pipeline(self, token_ids: torch.Tensor, cache: KeyValueCache) -> torch.Tensor | None:
        layout, config = self.layout, self.chunk.config
        if not layout.is_pipeline_first_stage:
            shape = (token_ids.shape[1], token_ids.shape[0], config.hidden_size)
            hidden = torch.empty(shape, dtype=config.pipeline_dtype, device=self.device)
            dist.recv(hidden, group=layout.groups.pp, group_src=layout.pp_rank - 1)
            self.chunk.set_input_tensor(hidden)
        output = self.chunk(
            token_ids, None, cache.attention_mask, inference_context=cache, output_processor=_last_column_logits
        )
        cache.advance()
        if layout.is_pipeline_last_stage:
            return output
        dist.send(output.contiguous(), group=layout.groups.pp, group_dst=layout.pp_rank + 1)
        return None

    def begin_pass(self, num_rows: int, *, working: bool = True) -> bool:
        """Agree with the ranks that share experts on the next forward pass; return whether one of them needs it.

        num_rows: tokens that this rank decodes in it; ``_MANY_ROWS`` for prompts. The host waits for the other hosts,
        and for no device.
        """
        is_working, most_rows = self.layout.host_ep.max(np.array([int(working), num_rows]))
        if self._experts is not None:
            self._expert_rows = self._experts.padded_rows(int(most_rows))
            if self._expert_rows is not None:
                self._experts.begin_pass(self._expert_rows)
        return bool(is_working)

    @property
    def graph_key(self) -> int | None:
        """What the next ``step`` depends on beside its buffers; None: on numbers that the host has to read."""
        return 0 if self.chunk.config.num_moe_experts is None else self._expert_rows

    def join_until_all_done(self) -> None:
        """Run this rank's experts for the others: in each of their forward passes."""
        while self.begin_pass(0, working=False):
            if self._expert_rows is not None:
                self._experts.serve(self.chunk.config.hidden_size, self.chunk.config.params_dtype)
                continue
            token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            self._run_pipeline(token, KeyValueCache(None, 1, 1))

    def _batched_experts(self) -> BatchedExperts | None:
        """Return the experts of decoded tokens; None where they are not batched: on all ranks or on none."""
        if not self.batches_experts:
            return None
        experts, layout = BatchedExperts(self.chunk, self.layout), self.layout
        is_impossible = np.array([int(not experts.is_possible)])
        for group in (layout.host_ep, layout.host_replica, layout.host_ep):  # all replicas, all their pipeline ranks
            is_impossible = group.max(is_impossible)
        return None if is_impossible[0] else experts

    @contextlib.contextmanager
    def inference(self, num_tokens: int) -> Iterator[None]:
        """Switch to evaluation mode, without graph, sequence parallelism and FP8, and back afterwards.

        num_tokens: that are decoded one after the other, at most.

        ``no_grad`` rather than ``inference_mode``: Megatron caches rotary tables that training uses too. A decoded
        token of a few rows does not fill the blocks of an FP8 product, so layers compute with their bfloat16 weights.
        """
        chunk, was_training = self.chunk, self.chunk.training
        fp8 = chunk.config.fp8
        chunk.eval()
        chunk.config.fp8 = None
        switches = _sequence_parallel_switches(chunk)
        for owner, name in switches:
            setattr(owner, name, False)
        try:
            is_worth_it = num_tokens >= FEWEST_PREPARED_TOKENS
            packed = packed_weights(chunk) if is_worth_it else contextlib.nullcontext()
            with self.layout.active(), torch.no_grad(), packed:
                self._experts = self._batched_experts()
                yield
        finally:
            self._experts = self._expert_rows = None
            for owner, name in switches:
                setattr(owner, name, True)
            chunk.config.fp8 = fp8
            if not self.layout.is_pipeline_first_stage:
                chunk.set_input_tensor(None)
            chunk.train(was_training)


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
