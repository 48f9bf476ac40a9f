"""A model's part on one rank, counted: parameters, what the forward pass keeps for the backward pass, operations.

Follows ``models/build.py``. Two builds of a layer differ in what they keep: ``local`` (Megatron's linear layers with
PyTorch's norm, rotation and attention; also what a CPU runs, and what ``benchmarks/memory.py`` measures) and ``fused``
(Transformer Engine; counted as its layers are described, not measured). The counting is that of Korthikanti et al. 2022 (section
4), for gated MLPs, grouped queries, normalised queries and keys, and mixtures of experts. No torch here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from megatron_s2d.arithmetic import round_up
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.models.families import layers_of_pp_rank, padded_vocab_size

Recompute = Literal["none", "selective", "full"]

_BUFFER_ALIGNMENT = 64  # elements: where a parameter may begin in Megatron's gradient buffer
_BUCKET_ALIGNMENT = 128  # elements: what a bucket's end is a multiple of, beside the data ranks


@dataclasses.dataclass(frozen=True)
class Build:
    """How a model's layers are built and run."""

    bytes_per_value: int  # 4 for float32, 2 for bfloat16
    fused: bool  # Transformer Engine's layers
    recompute: Recompute = "none"
    fp8: bool = False  # the layers' products; each of their matrices is then held in FP8 as well, in both directions


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one data rank."""

    tokens: int  # rows times padded length
    length: int  # padded tokens of a row
    responses: int  # positions whose output the loss uses


@dataclasses.dataclass(frozen=True)
class Part:
    """A model at a layout, seen from one pipeline stage (any of its tensor and data ranks)."""

    spec: ModelSpec
    parallel: ParallelConfig
    stage: int  # pipeline rank

    @property
    def tensor(self) -> int:
        return self.parallel.tensor_model_parallel_size

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.parallel.pipeline_model_parallel_size - 1

    @property
    def num_layers(self) -> int:
        """Layers of this stage."""
        return len(layers_of_pp_rank(self.spec, self.stage, self.parallel.pipeline_model_parallel_size))

    @property
    def sequence_shards(self) -> int:
        """Ranks that share what sequence parallelism cuts."""
        return self.tensor if self.parallel.sequence_parallel else 1

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding or output layer on a rank, padding included."""
        return padded_vocab_size(self.spec.vocab_size, self.tensor) // self.tensor

    @property
    def query(self) -> int:
        """Query channels of a rank."""
        return self.spec.q_dim // self.tensor

    @property
    def kv(self) -> int:
        """Key channels of a rank: at least one head, which ranks then hold in common."""
        return max(self.spec.num_query_groups // self.tensor, 1) * self.spec.head_dim

    @property
    def ties_here(self) -> bool:
        """Whether embedding and output layer are one parameter of this stage."""
        return self.spec.tie_word_embeddings and self.is_first and self.is_last

    def tensors(self) -> list[tuple[int, bool]]:
        """(elements, belongs to an expert) of every parameter of a rank."""
        spec, hidden, tensor = self.spec, self.spec.hidden_size, self.tensor
        dense = [hidden, hidden] + [spec.head_dim] * (2 * spec.qk_norm)
        dense += [hidden * (spec.q_dim + 2 * spec.kv_dim) // tensor, hidden * spec.q_dim // tensor]
        experts: list[int] = []
        if spec.num_experts:
            dense.append(spec.num_experts * hidden)
            width = spec.moe_ffn_hidden_size
            experts = [2 * width * hidden, width * hidden] * (
                spec.num_experts // self.parallel.expert_model_parallel_size
            )
        else:
            dense += [2 * spec.ffn_hidden_size * hidden // tensor, spec.ffn_hidden_size * hidden // tensor]
        found = [(count, False) for count in dense * self.num_layers]
        found += [(count, True) for count in experts * self.num_layers]
        if self.is_first:
            found.append((self.vocabulary * hidden, False))
        if self.is_last:
            found += [(hidden, False)] + [(self.vocabulary * hidden, False)] * (not self.ties_here)
        return found

    @property
    def parameters(self) -> int:
        """Parameters of a rank."""
        return sum(count for count, _ in self.tensors())

    @property
    def layer_matrices(self) -> int:
        """Elements of a rank's matrices inside layers."""
        width = self.spec.hidden_size
        return sum(count for count, _ in self.tensors() if count > width) - self.vocabulary * width * (
            self.is_first + (self.is_last and not self.ties_here)
        )

    def fp8_copies(self, build: Build) -> int:
        """Bytes of the layers' matrices in FP8, as they are and transposed, beside their bfloat16 weights."""
        return 2 * self.layer_matrices if build.fp8 else 0

    def buffers(self) -> list[tuple[int, int]]:
        """(elements with alignment, ranks that share the optimizer's part) of Megatron's gradient buffers.

        Experts have a buffer of their own as soon as they are cut differently from the rest.
        """
        parallel = self.parallel
        data = parallel.data_parallel_size * parallel.context_parallel_size
        apart = parallel.expert_model_parallel_size > 1 or self.tensor > 1
        dense = [count for count, expert in self.tensors() if not (expert and apart)]
        found = [(_aligned(dense, data), data)]
        experts = [count for count, expert in self.tensors() if expert and apart]
        if experts:
            ranks = self.tensor * data // parallel.expert_model_parallel_size
            found.append((_aligned(experts, ranks), ranks))
        return found

    # ---------------------------------------------------------------- what the forward pass keeps

    def kept_by_layer(self, build: Build, batch: MicroBatch) -> int:
        """Bytes that one layer keeps for its backward pass without recomputation of whole layers."""
        per_token = self._norms(build) + self._attention(build)
        per_token += self._experts(build) if self.spec.num_experts else self._mlp(build)
        tables = 0 if build.fused else 4 * self.spec.head_dim * build.bytes_per_value  # cosine, sine of both
        return int(batch.tokens * per_token + batch.length * tables)

    def _norms(self, build: Build) -> float:
        """The two norms before attention and MLP, with their outputs, which linear layers (or the router) keep."""
        hidden, size = self.spec.hidden_size, build.bytes_per_value
        # PyTorch's norm computes in float32: its input (a float32 copy of bfloat16) and the normalised values.
        norm = size * hidden if build.fused else 8 * hidden
        return 2 * (norm + 4 + size * hidden) / self.sequence_shards

    def _attention(self, build: Build) -> float:
        """Fused query/key/value, rotated query and key, output, normalised query and key, softmax statistics."""
        spec, size, query, kv = self.spec, build.bytes_per_value, self.query, self.kv
        # Where ranks share key heads, Megatron gathers the whole product and keeps it.
        whole = spec.num_query_groups < self.tensor
        mixed = (spec.q_dim + 2 * spec.kv_dim) / (1 if whole else self.tensor)
        heads, groups = query // spec.head_dim, kv // spec.head_dim
        kept = size * (mixed + 2 * query + kv)
        if build.recompute != "selective" or build.fused:
            kept += 4 * heads
        if spec.qk_norm:
            kept += 4 * (heads + groups)
            if build.fused:
                kept += size * (query + kv)
            else:
                kept += 8 * query + (4 if size == 4 else 8) * kv
        return kept

    def _mlp(self, build: Build) -> float:
        """Gate and up together, and their product; unfused also the gate's activation and a copy of up."""
        return build.bytes_per_value * (3 if build.fused else 5) * self.spec.ffn_hidden_size / self.tensor

    def _experts(self, build: Build) -> float:
        """Tokens sorted by expert, the experts' insides, and the routing; tokens spread evenly over experts."""
        spec, size, chosen = self.spec, build.bytes_per_value, self.spec.num_experts_per_tok
        inside = (3 if build.fused else 6) * spec.moe_ffn_hidden_size
        routing = chosen * (4 + 4 + 8 + 8) + 8 * spec.num_experts
        return (size * chosen * (spec.hidden_size + inside) + routing) / self.sequence_shards

    def backward_of_layer(self, build: Build, batch: MicroBatch) -> int:
        """Bytes of gradients that exist at once while a layer's MLP is differentiated, beside what was kept."""
        spec = self.spec
        inside = spec.num_experts_per_tok * (spec.hidden_size + spec.moe_ffn_hidden_size) / self.sequence_shards
        if not spec.num_experts:
            inside = 2 * spec.ffn_hidden_size / self.tensor
        return int(batch.tokens * build.bytes_per_value * (spec.hidden_size / self.sequence_shards + inside))

    def kept(self, build: Build, batch: MicroBatch) -> int:
        """Bytes that this stage's layers keep of one micro-batch until its backward pass."""
        size, tokens, hidden = build.bytes_per_value, batch.tokens, self.spec.hidden_size / self.sequence_shards
        layer = tokens * size * hidden if build.recompute == "full" else self.kept_by_layer(build, batch)
        found = self.num_layers * layer
        if self.is_first:
            found += 8 * tokens
        if not self.is_last:
            found += tokens * size * hidden  # the output that was sent on
        if not self.is_first and build.bytes_per_value == 2 and not build.fused:
            found += tokens * size * hidden  # the input that was received; in float32 the first norm keeps it anyway
        return int(found)

    def kept_at_end(self, build: Build, batch: MicroBatch) -> int:
        """Bytes that the final norm keeps, with its output; gone before the layers are differentiated."""
        hidden = self.spec.hidden_size / self.sequence_shards
        norm = (build.bytes_per_value if build.fused else 8) * hidden + 4
        return int(batch.tokens * (norm + build.bytes_per_value * hidden)) if self.is_last else 0

    # ---------------------------------------------------------------- operations

    def layer_flops(self, tokens: float, context: float) -> float:
        """Of the forward pass of one layer on one rank; ``context``: positions that a token looks at on average."""
        spec = self.spec
        dense = spec.hidden_size * (2 * spec.q_dim + 2 * spec.kv_dim) / self.tensor
        if spec.num_experts:
            shards = self.sequence_shards
            experts = 3 * spec.moe_ffn_hidden_size * spec.num_experts_per_tok
            dense += spec.hidden_size * (spec.num_experts + experts) / shards
        else:
            dense += 3 * spec.hidden_size * spec.ffn_hidden_size / self.tensor
        return 2 * tokens * (dense + 2 * self.query * context)

    def output_flops(self, tokens: float) -> float:
        """Of the output layer's product for ``tokens`` positions on one rank of the last stage."""
        return 2 * tokens * self.spec.hidden_size * self.vocabulary


def parts(spec: ModelSpec, parallel: ParallelConfig) -> list[Part]:
    """The model's pipeline stages."""
    return [Part(spec, parallel, stage) for stage in range(parallel.pipeline_model_parallel_size)]


def model_flops(spec: ModelSpec, tokens: float, context: float) -> float:
    """Operations of one forward pass through all layers of the whole model; the output layer is left out."""
    return spec.num_layers * Part(spec, ParallelConfig(), 0).layer_flops(tokens, context)


def _aligned(counts: Sequence[int], ranks: int) -> int:
    multiple = math.lcm(ranks, _BUCKET_ALIGNMENT)
    end = 0
    for count in counts:
        end = round_up(end, _BUFFER_ALIGNMENT) + count
    return round_up(end, multiple)
