"""Counts parameters, saved activations and operations of one rank's share of a model.

Follows ``models/build.py``. Three builds of a layer differ in the activations they save: on a CPU Megatron's linear
layers with PyTorch's norm, rotation and attention (measured by ``benchmarks/memory.py``), the same on a GPU, where the
norm is one kernel (measured by ``s2d plan --measure``), and ``fused``: Transformer Engine. The counting is that of
Korthikanti et al. 2022 (section 4), for gated MLPs, grouped queries, normalised queries and keys, and mixtures of
experts. No torch here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from megatron_s2d.arithmetic import round_up
from megatron_s2d.buffer_sizes import SINK_CHANNELS
from megatron_s2d.config.lora import LoraConfig, projection_shape
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.recompute import NO_RECOMPUTE, Recompute
from megatron_s2d.models.families import layers_of_pp_rank, padded_vocab_size

_BUFFER_ALIGNMENT = 64  # elements: alignment of a parameter in Megatron's gradient buffer
_BUCKET_ALIGNMENT = 128  # elements: alignment of a bucket's end, together with the number of data ranks


@dataclasses.dataclass(frozen=True)
class Build:
    """How a model's layers are built and run."""

    bytes_per_value: int  # 4 for float32, 2 for bfloat16
    fused: bool  # Transformer Engine's layers
    recompute: Recompute = NO_RECOMPUTE
    fp8: bool = False  # products of the layers in FP8; each of their matrices then has two FP8 copies, one transposed
    fp8_operands: bool = False  # inputs of the layers' products are saved in FP8
    on_gpu: bool = False  # PyTorch's kernels for CUDA; with Transformer Engine's layers they always are
    lora: LoraConfig | None = None  # trained instead of the weights

    @property
    def operand_bytes(self) -> int:
        """Bytes of an element of an input of a product that is saved for the weight's gradient."""
        return 1 if self.fp8_operands else self.bytes_per_value

    @property
    def fused_norm(self) -> bool:
        """Whether the norm is one kernel, which saves its input and one number for each row."""
        return self.fused or self.on_gpu


@dataclasses.dataclass(frozen=True)
class MicroBatchShape:
    """Sizes of one forward pass of one data rank."""

    tokens: int  # sequences times padded length
    seq_length: int  # padded tokens of a sequence
    response_tokens: int  # positions whose output the loss uses
    packed: bool = False  # sequences laid end to end: the rotary embedding has a row for each token


@dataclasses.dataclass(frozen=True)
class ModelShard:
    """The share of a model that one pipeline rank of a layout has (any of its tensor and data ranks)."""

    spec: ModelSpec
    parallel: ParallelConfig
    pp_rank: int

    @property
    def tp_size(self) -> int:
        return self.parallel.tensor_model_parallel_size

    @property
    def is_pipeline_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_pipeline_last_stage(self) -> bool:
        return self.pp_rank == self.parallel.pipeline_model_parallel_size - 1

    @property
    def num_layers(self) -> int:
        """Layers of this pipeline rank."""
        return len(layers_of_pp_rank(self.spec, self.pp_rank, self.parallel.pipeline_model_parallel_size))

    @property
    def sequence_shards(self) -> int:
        """Ranks over which sequence parallelism splits activations."""
        return self.tp_size if self.parallel.sequence_parallel else 1

    @property
    def local_vocab_size(self) -> int:
        """Rows of the embedding or output layer on a rank, padding included."""
        return padded_vocab_size(self.spec.vocab_size, self.tp_size) // self.tp_size

    @property
    def local_q_dim(self) -> int:
        """Query channels of a rank."""
        return self.spec.q_dim // self.tp_size

    @property
    def local_kv_dim(self) -> int:
        """Key channels of a rank: at least one head, which several ranks then replicate."""
        return max(self.spec.num_query_groups // self.tp_size, 1) * self.spec.head_dim

    @property
    def has_tied_output(self) -> bool:
        """Whether embedding and output layer are one parameter of this rank."""
        return self.spec.tie_word_embeddings and self.is_pipeline_first_stage and self.is_pipeline_last_stage

    def parameter_sizes(self) -> list[tuple[int, bool]]:
        """Return (elements, belongs to an expert) of every parameter of a rank, in the order of the model's modules."""
        spec, hidden, tp_size = self.spec, self.spec.hidden_size, self.tp_size
        dense = [hidden] * (4 if spec.parts.post_norms else 2) + [spec.head_dim] * (2 * spec.qk_norm)
        dense += [hidden * (spec.q_dim + 2 * spec.kv_dim) // tp_size, hidden * spec.q_dim // tp_size]
        dense += [(spec.q_dim + 2 * spec.kv_dim) // tp_size] * spec.parts.qkv_bias
        dense += [spec.num_attention_heads // tp_size] * spec.parts.attention_sinks
        dense += [hidden] * spec.parts.linear_biases
        experts: list[int] = []
        if spec.num_experts:
            dense += [spec.num_experts * hidden] + [spec.num_experts] * spec.parts.linear_biases
            width = spec.moe_ffn_hidden_size
            experts = [2 * width * hidden, width * hidden] + [2 * width, hidden] * spec.parts.linear_biases
            experts *= spec.num_experts // self.parallel.expert_model_parallel_size
        else:
            dense += [2 * spec.ffn_hidden_size * hidden // tp_size, spec.ffn_hidden_size * hidden // tp_size]
        layer = [(count, False) for count in dense] + [(count, True) for count in experts]
        sizes = [(self.local_vocab_size * hidden, False)] * self.is_pipeline_first_stage + layer * self.num_layers
        if self.is_pipeline_last_stage:
            sizes += [(hidden, False)] + [(self.local_vocab_size * hidden, False)] * (not self.has_tied_output)
        return sizes

    def trained_sizes(self, lora: LoraConfig | None) -> list[tuple[int, bool]]:
        """Return ``parameter_sizes`` of what is trained: all weights, or the A and B of an adapter."""
        if lora is None:
            return self.parameter_sizes()
        sizes = []
        local_experts = self.spec.num_experts // self.parallel.expert_model_parallel_size
        for name in lora.projections:
            rows, columns = projection_shape(self.spec, name)
            is_expert = self.spec.num_experts > 0 and name in ("gate_proj", "up_proj", "down_proj")
            tp_size = 1 if is_expert else self.tp_size
            if name in ("o_proj", "down_proj"):
                columns //= tp_size
            else:
                rows //= tp_size
            pair = [(lora.rank * columns, is_expert), (lora.rank * rows, is_expert)]
            sizes += pair * (local_experts if is_expert else 1) * self.num_layers
        return sizes

    @property
    def num_parameters(self) -> int:
        """Parameters of a rank."""
        return sum(count for count, _ in self.parameter_sizes())

    @property
    def num_layer_weights(self) -> int:
        """Elements of a rank's matrices inside layers."""
        hidden = self.spec.hidden_size
        return sum(count for count, _ in self.parameter_sizes() if count > hidden) - self.local_vocab_size * hidden * (
            self.is_pipeline_first_stage + (self.is_pipeline_last_stage and not self.has_tied_output)
        )

    def fp8_copy_bytes(self, build: Build) -> int:
        """Return bytes of the layers' matrices in FP8, plain and transposed, beside their bfloat16 weights."""
        return 2 * self.num_layer_weights if build.fp8 else 0

    def placeholder_bytes(self, build: Build) -> int:
        """Return bytes of the gradients without values that Transformer Engine keeps, one for each shape of a matrix.

        Autograd gets them; the values are summed in Megatron's buffers.
        """
        if not build.fused:
            return 0
        others = {self.local_vocab_size * self.spec.hidden_size, (self.spec.num_experts or 0) * self.spec.hidden_size}
        matrices = {count for count, _ in self.parameter_sizes() if count > self.spec.hidden_size} - others
        return build.bytes_per_value * sum(matrices)

    def gradient_buffers(self, lora: LoraConfig | None = None) -> list[tuple[int, int]]:
        """Return (elements with alignment, ranks that shard the optimizer state) of Megatron's gradient buffers.

        Experts get a separate buffer as soon as their sharding differs from that of the dense parameters.
        """
        parallel = self.parallel
        data_ranks = parallel.data_parallel_size * parallel.context_parallel_size
        separate = parallel.expert_model_parallel_size > 1 or self.tp_size > 1
        sizes = self.trained_sizes(lora)
        dense = [count for count, is_expert in sizes if not (is_expert and separate)]
        buffers = [(_aligned_size(dense, data_ranks), data_ranks)]
        experts = [count for count, is_expert in sizes if is_expert and separate]
        if experts and not dense:
            buffers = []
        if experts:
            ranks = self.tp_size * data_ranks // parallel.expert_model_parallel_size
            buffers.append((_aligned_size(experts, ranks), ranks))
        return buffers

    # ---------------------------------------------------------------- activations that the forward pass saves

    def layer_activation_bytes(self, build: Build, batch: MicroBatchShape) -> int:
        """Return bytes that one layer saves for its backward pass, if the layer is not recomputed."""
        per_token = self._norm_bytes(build) + self._attention_bytes(build)
        if not (build.recompute.recomputes("moe") or build.recompute.recomputes("mlp")):
            per_token += self._feed_forward_bytes(build)
        per_token += self._adapter_bytes(build)
        rotary_tables = 0 if build.fused else 4 * self.spec.head_dim * build.bytes_per_value  # cosine, sine, q and k
        rows = batch.tokens if batch.packed else batch.seq_length
        if self.parallel.context_parallel_size > 1 and not (build.fused or build.recompute.recomputes("core_attn")):
            per_token += self._gathered_keys_bytes(build, batch)
        elif build.on_gpu and not (build.fused or build.recompute.recomputes("core_attn")):
            per_token += self._masked_attention_bytes(build, batch)
        return int(batch.tokens * per_token + rows * rotary_tables)

    def _adapter_bytes(self, build: Build) -> float:
        """Per token: the products with A; their inputs are those that the linear layers would save for themselves."""
        if build.lora is None:
            return 0.0
        copies = {"o_proj": 1 / self.sequence_shards}
        if self.spec.num_experts:
            copies |= dict.fromkeys(
                ("gate_proj", "up_proj", "down_proj"), self.spec.num_experts_per_tok / self.sequence_shards
            )
        else:
            copies["down_proj"] = 1 / self.sequence_shards
        return build.bytes_per_value * build.lora.rank * sum(copies.get(name, 1) for name in build.lora.projections)

    def _feed_forward_bytes(self, build: Build) -> float:
        return self._moe_bytes(build) if self.spec.num_experts else self._mlp_bytes(build)

    def recomputed_bytes(self, build: Build, batch: MicroBatchShape) -> int:
        """Return bytes of activations that the backward pass recomputes beyond those that are saved at that time."""
        recompute = build.recompute
        if recompute.recomputes("moe") or recompute.recomputes("mlp"):
            return int(batch.tokens * self._feed_forward_bytes(build))
        recomputed = recompute.num_recomputed(self.num_layers)
        if recomputed < self.num_layers:
            return 0  # the layers that are not recomputed come last, and their activations are freed before
        unit = min(recompute.num_layers, recomputed) if recompute.method == "uniform" else 1
        return unit * self.layer_activation_bytes(build, batch)

    def recomputed_share(self, build: Build) -> float:
        """Return the forward operations of the layers that are run again, as a share of all of theirs."""
        if build.recompute.recomputes("moe") or build.recompute.recomputes("mlp"):
            spec = self.spec
            experts = spec.num_experts_per_tok * spec.moe_ffn_hidden_size if spec.num_experts else spec.ffn_hidden_size
            inside, attention = 3 * experts, 2 * spec.q_dim + 2 * spec.kv_dim
            return inside / (inside + attention)
        return build.recompute.num_recomputed(self.num_layers) / self.num_layers

    def _norm_bytes(self, build: Build) -> float:
        """Per token: the norms around attention and MLP, with the outputs that linear layers or the router read."""
        hidden, size = self.spec.hidden_size, build.bytes_per_value
        # PyTorch's norm computes in float32: its input (a float32 copy of bfloat16) and the normalised values.
        norm = size * hidden if build.fused_norm else 8 * hidden
        if build.fused_norm and self.spec.parts.zero_centered_norm:
            norm = 4 * hidden
        norms = 4 if self.spec.parts.post_norms else 2  # the outputs of those after a block are not saved
        second = 0 if build.recompute.recomputes("layernorm") else build.operand_bytes  # the norm before the experts
        if self.spec.num_experts and second:
            second = size  # the router reads it
        return (norms * (norm + 4) + (build.operand_bytes + second) * hidden) / self.sequence_shards

    def _attention_bytes(self, build: Build) -> float:
        """Per token: fused query/key/value, rotated query and key, output, normalised query and key, softmax stats."""
        spec, size, q_dim, kv_dim = self.spec, build.bytes_per_value, self.local_q_dim, self.local_kv_dim
        # If ranks share key heads, Megatron gathers the product of all ranks and saves it.
        qkv_is_gathered = spec.num_query_groups < self.tp_size
        qkv_dim = (spec.q_dim + 2 * spec.kv_dim) / (1 if qkv_is_gathered else self.tp_size)
        heads, groups = q_dim // spec.head_dim, kv_dim // spec.head_dim
        saved = size * (qkv_dim + 2 * q_dim + kv_dim)
        is_repeated = q_dim != kv_dim and not (build.on_gpu or build.fused)  # keys and values, on a CPU
        if is_repeated and self.parallel.context_parallel_size == 1:
            saved = size * (4 * q_dim + qkv_dim * (spec.qk_norm and size == 4))
        if self.parallel.context_parallel_size > 1 and not build.fused:
            # The rotated keys are gathered; queries, keys and values keep their common product only for a norm.
            saved += size * (q_dim - kv_dim - qkv_dim * (not spec.qk_norm))
        if not build.recompute.recomputes("core_attn") or build.fused:
            saved += 4 * heads
        if build.fp8_operands:
            saved += q_dim  # of the output, beside that in bfloat16
        if spec.qk_norm:
            saved += 4 * (heads + groups)
            if build.on_gpu and not build.fused:
                saved += size * q_dim  # the keys' norm reads the product itself
            elif not build.fused:  # Transformer Engine's rotation saves nothing of its input
                saved += 8 * q_dim + (4 if size == 4 else 8) * kv_dim
        return saved

    def _masked_attention_bytes(self, build: Build, batch: MicroBatchShape) -> float:
        """Per token, beside ``_attention_bytes``: for kernels that take a mask, and neither groups nor sinks.

        Keys and values are repeated for grouped queries. A key of the sinks needs further channels in all of them, and
        every packed sequence runs by itself. FlashAttention has windows in packed sequences, which need nothing.
        """
        spec, q_dim, kv_dim, length = self.spec, self.local_q_dim, self.local_kv_dim, batch.seq_length
        qkv_dim = q_dim + 2 * kv_dim
        if spec.parts.attention_sinks:
            wide = q_dim + q_dim // spec.head_dim * SINK_CHANNELS
            values = 4 * wide - qkv_dim - q_dim - kv_dim  # of queries, keys, values and output
            share = 1.0
        else:
            layers = layers_of_pp_rank(spec, self.pp_rank, self.parallel.pipeline_model_parallel_size)
            windows = [spec.window_of_layer(layer) or length for layer in layers]
            share = 0.0 if batch.packed else sum(window < length for window in windows) / len(windows)
            # For a norm queries and keys keep the product, which values are part of without a copy.
            values = (2 * q_dim - kv_dim - qkv_dim * (not spec.qk_norm)) * (q_dim != kv_dim)
        mask = length if batch.packed else length * length / batch.tokens
        return share * build.bytes_per_value * (values + mask)

    def _gathered_keys_bytes(self, build: Build, batch: MicroBatchShape) -> float:
        """Per token: keys and values of all context ranks, repeated for grouped queries, and the attention's mask."""
        is_grouped = self.local_q_dim != self.local_kv_dim
        keys = 2 * (self.local_q_dim if is_grouped else self.local_kv_dim)
        gathered = keys * self.parallel.context_parallel_size * build.bytes_per_value
        mask = batch.seq_length * (build.bytes_per_value if build.on_gpu else 1)
        return gathered + mask

    def _mlp_bytes(self, build: Build) -> float:
        """Per token: gate and up, and their product; unfused also the gate's activation and a copy of up."""
        before = 2 if build.fused else 4
        return (before * build.bytes_per_value + build.operand_bytes) * self.spec.ffn_hidden_size / self.tp_size

    def _moe_bytes(self, build: Build) -> float:
        """Per token: its copies sorted by expert, the experts' activations, and the routing; experts evenly loaded."""
        spec, size, top_k = self.spec, build.bytes_per_value, self.spec.num_experts_per_tok
        inside = (2 if build.fused else 5) * size
        inside += 0 if build.recompute.recomputes("moe_act") else build.operand_bytes
        routing = top_k * (4 + 4 + 8 + 8) + 8 * spec.num_experts
        experts = build.operand_bytes * spec.hidden_size + inside * spec.moe_ffn_hidden_size
        return (top_k * experts + routing) / self.sequence_shards

    def layer_gradient_bytes(self, build: Build, batch: MicroBatchShape) -> int:
        """Return bytes of the gradients that exist at once in the backward pass of a layer's MLP."""
        spec = self.spec
        inside = spec.num_experts_per_tok * (spec.hidden_size + spec.moe_ffn_hidden_size) / self.sequence_shards
        if not spec.num_experts:
            inside = 2 * spec.ffn_hidden_size / self.tp_size
        return int(batch.tokens * build.bytes_per_value * (spec.hidden_size / self.sequence_shards + inside))

    def activation_bytes(self, build: Build, batch: MicroBatchShape) -> int:
        """Return bytes that this rank's layers save of one micro-batch until its backward pass."""
        size, tokens, hidden = build.bytes_per_value, batch.tokens, self.spec.hidden_size / self.sequence_shards
        recomputed = build.recompute.num_recomputed(self.num_layers)
        saved = (self.num_layers - recomputed) * self.layer_activation_bytes(build, batch)
        unit = build.recompute.num_layers if build.recompute.method == "uniform" else 1
        saved += math.ceil(recomputed / unit) * tokens * size * hidden  # inputs of the units
        if self.is_pipeline_first_stage:
            saved += 8 * tokens
        if not self.is_pipeline_last_stage:
            saved += tokens * size * hidden  # the output that was sent to the next pipeline rank
        if not self.is_pipeline_first_stage and build.bytes_per_value == 2 and not build.fused_norm:
            saved += tokens * size * hidden  # the received input; in float32 the first norm saves it anyway
        return int(saved)

    def final_norm_bytes(self, build: Build, batch: MicroBatchShape) -> int:
        """Return bytes that the final norm saves, with its output; freed before the layers' backward pass."""
        hidden = self.spec.hidden_size / self.sequence_shards
        norm = (build.bytes_per_value if build.fused_norm else 8) * hidden + 4
        saved = int(batch.tokens * (norm + build.bytes_per_value * hidden))
        return saved if self.is_pipeline_last_stage else 0

    # ---------------------------------------------------------------- operations

    def layer_flops(self, tokens: float, attention_span: float) -> float:
        """Return operations of the forward pass of one layer on one rank.

        attention_span: positions that a token attends to on average.
        """
        spec = self.spec
        dense = spec.hidden_size * (2 * spec.q_dim + 2 * spec.kv_dim) / self.tp_size
        if spec.num_experts:
            shards = self.sequence_shards
            experts = 3 * spec.moe_ffn_hidden_size * spec.num_experts_per_tok
            dense += spec.hidden_size * (spec.num_experts + experts) / shards
        else:
            dense += 3 * spec.hidden_size * spec.ffn_hidden_size / self.tp_size
        return 2 * tokens * (dense + 2 * self.local_q_dim * attention_span)

    def output_flops(self, tokens: float) -> float:
        """Return operations of the output layer for ``tokens`` positions on one rank of the last pipeline stage."""
        return 2 * tokens * self.spec.hidden_size * self.local_vocab_size


def pipeline_shards(spec: ModelSpec, parallel: ParallelConfig) -> list[ModelShard]:
    """Return the model's shards, one for each pipeline rank."""
    return [ModelShard(spec, parallel, pp_rank) for pp_rank in range(parallel.pipeline_model_parallel_size)]


def model_flops(spec: ModelSpec, tokens: float, attention_span: float) -> float:
    """Return operations of one forward pass through all layers of the full model, without the output layer."""
    return spec.num_layers * ModelShard(spec, ParallelConfig(), 0).layer_flops(tokens, attention_span)


def _aligned_size(counts: Sequence[int], ranks: int) -> int:
    multiple = math.lcm(ranks, _BUCKET_ALIGNMENT)
    end = 0
    for count in counts:
        end = round_up(end, _BUFFER_ALIGNMENT) + count
    return round_up(end, multiple)
