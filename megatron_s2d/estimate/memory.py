"""Memory of one rank while a stage runs: resident models by role, and the bytes that each phase adds, by purpose.

Bytes are those of tensors; the CUDA context, communication buffers and fragmentation come on top
(``AssumptionsConfig.reserved_memory``). Lengths are worst cases: every response reaches its limit. The counting follows
``train/megatron_model.py``, ``parallel/trainable_model.py``, ``kl/fused.py`` and ``rollout/megatron/engine.py``;
docs/preflight.md compares it with measured peaks. No torch here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from megatron_s2d.arithmetic import ceil_div, round_up
from megatron_s2d.buffer_sizes import (
    CHUNKS_PER_PRODUCT,
    FEWEST_COLUMNS_IN_BLOCKS,
    LOGITS_CHUNK_BYTES,
    MOST_BATCHED_EXPERT_ROWS,
    P2P_BUCKET_BYTES,
    POSITIONS_PER_DRAW,
    ROW_BLOCK_ELEMENTS,
    TOP_K_ROWS_PER_CHUNK,
)
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import RolloutConfig, SamplingConfig
from megatron_s2d.estimate.host_copies import packed_weight_bytes
from megatron_s2d.estimate.layers import Build, MicroBatchShape, ModelShard

_CUBLAS_WORKSPACES = 2 * (32 << 20)  # on a GPU: of the thread that computes, and of autograd's
_BYTES_PER_POSITION = 50  # ids, labels, masks, positions and half a dozen float32 columns: data/packing.py


@dataclasses.dataclass(frozen=True)
class ResidentMemory:
    """Bytes that a model takes from the start of a stage to its end."""

    role: str  # student, teacher, reference; for a stage on the teacher's weights still the trained model: student
    model: str  # entry of `models`
    weights: int
    gradients: int = 0  # float32
    optimizer: int = 0  # Adam's moments and, in bfloat16, float32 masters; sharded over data ranks
    fp8_copies: int = 0  # of the weights of layers; the first pass makes them

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.fp8_copies


@dataclasses.dataclass(frozen=True)
class StageMemory:
    """Memory of one stage on the pipeline rank that needs most."""

    pp_rank: int
    models: tuple[ResidentMemory, ...]
    phases: Mapping[str, Mapping[str, int]]  # prefill, decode, score, train, update, save... -> purpose -> bytes
    workspaces: int = 0  # of cuBLAS, and Transformer Engine's gradients without values
    build: int = 0  # peak while models and optimizer are made
    outside: Mapping[str, int] = dataclasses.field(default_factory=dict)  # purpose -> device bytes beside PyTorch's
    pinned: Mapping[str, int] = dataclasses.field(default_factory=dict)  # purpose -> bytes of pinned host memory

    @property
    def models_total(self) -> int:
        """Bytes of all models."""
        return sum(item.total for item in self.models)

    @property
    def resident(self) -> int:
        """Bytes that are held from the first update to the end of the stage."""
        return self.models_total + self.workspaces

    @property
    def peak_phase(self) -> str:
        """The phase that needs most; ``build`` if it is the making of models and optimizer."""
        return max(self.peaks, key=lambda name: self.peaks[name])

    @property
    def peaks(self) -> dict[str, int]:
        """Peak bytes of every phase in PyTorch's allocator."""
        return {"build": self.build} | {
            name: self.resident + sum(added.values()) for name, added in self.phases.items()
        }

    @property
    def total(self) -> int:
        """Peak bytes, with those that PyTorch does not allocate."""
        return max(self.peaks.values()) + sum(self.outside.values())


@dataclasses.dataclass(frozen=True)
class Workload:
    """The micro-batches of one optimizer update on one data rank."""

    batch: MicroBatchShape  # of the largest micro-batch
    num_micro_batches: int

    @property
    def tokens(self) -> int:
        """Padded tokens of the update on a data rank."""
        return self.batch.tokens * self.num_micro_batches

    @property
    def response_tokens(self) -> int:
        """Tokens of responses among them."""
        return self.batch.response_tokens * self.num_micro_batches


def workload(
    responses: int,
    length: int,
    response_length: int,
    *,
    max_tokens: int,
    parallel: ParallelConfig,
    packed: bool = False,
    equal_lengths: bool = False,
) -> Workload:
    """Return the workload of ``responses`` over all data ranks, each ``length`` tokens long with its prompt.

    Micro-batches are full, as those of responses of many lengths nearly are. equal_lengths: they have as many responses
    of ``length`` as fit, and no part of another.
    """
    alignment = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    cp_size = parallel.context_parallel_size
    length = round_up(length, alignment)
    on_rank = ceil_div(responses, parallel.data_parallel_size) * length / cp_size
    if equal_lengths:
        max_tokens = max(1, max_tokens * cp_size // length) * length // cp_size
    tokens = math.ceil(max(length / cp_size, min(max_tokens, on_rank)))
    batch = MicroBatchShape(tokens, length, round(tokens * min(1.0, response_length / length)), packed)
    return Workload(batch, math.ceil(on_rank / tokens))


def workspaces(*, on_gpu: bool) -> int:
    """Return bytes that libraries keep for their own use."""
    return _CUBLAS_WORKSPACES if on_gpu else 0


def trained_memory(shard: ModelShard, build: Build, model: str = "", role: str = "student") -> ResidentMemory:
    """Return weights, Megatron's float32 gradient buffers and the distributed optimizer's share of Adam's state."""
    size = build.bytes_per_value
    buffers = shard.gradient_buffers(build.lora)
    elements = sum(count for count, _ in buffers)
    share = sum(count / ranks for count, ranks in buffers)
    weights = elements * size
    if build.lora is not None:  # beside the frozen ones
        weights += shard.num_parameters * size
    optimizer = round(share * (12 if size == 2 else 8))
    return ResidentMemory(role, model, weights, elements * 4, optimizer, shard.fp8_copy_bytes(build))


def frozen_memory(shard: ModelShard, build: Build, role: str, model: str = "", copies: int = 1) -> ResidentMemory:
    """Return the memory of ``copies`` of a model's weights, without gradients or optimizer state."""
    weights, fp8_copies = shard.num_parameters * build.bytes_per_value, shard.fp8_copy_bytes(build)
    return ResidentMemory(role, model, copies * weights, fp8_copies=copies * fp8_copies)


@dataclasses.dataclass(frozen=True)
class TeacherInputs:
    """Teacher data that the loss reads, for all micro-batches of an update at once."""

    kind: str  # hidden (exact distributions), logits (a cache of full distributions) or topk
    spec: ModelSpec  # of the teacher
    sources: int = 1  # two with a reference beside the teacher
    top_k: int = 0
    copies_output_layer: bool = False  # if the layouts differ or the teacher is a cache: resident

    @property
    def is_dense(self) -> bool:
        """Whether the loss computes logits of the teacher."""
        return self.kind != "topk"

    def size(self, shard: ModelShard, build: Build, work: Workload, *, on_gpu: bool) -> int:
        """Return bytes on a rank of the last pipeline stage."""
        if self.kind == "logits":
            states = work.tokens * 4 * (self.spec.vocab_size + shard.local_vocab_size)
        elif self.kind == "topk":
            states = work.tokens * (12 * self.top_k + 4)
        else:
            states = lazy_hidden_states(shard, build, work, self.spec, on_gpu=on_gpu)
        return self.sources * states

    def output_layers(self, shard: ModelShard, build: Build) -> int:
        """Return bytes of the teachers' output layers that were brought to the shards of the student's."""
        if not (self.copies_output_layer and shard.is_pipeline_last_stage):
            return 0
        return self.sources * shard.local_vocab_size * self.spec.hidden_size * build.bytes_per_value


def lazy_hidden_states(shard: ModelShard, build: Build, work: Workload, teacher: ModelSpec, *, on_gpu: bool) -> int:
    """Return bytes on the device of hidden states of an update's responses, split over tensor ranks.

    They are offloaded to host memory: on a GPU they take no device memory.
    """
    return 0 if on_gpu else work.response_tokens * teacher.hidden_size * build.bytes_per_value // shard.tp_size


# -------------------------------------------------------------------------------- phases


def micro_batches_in_flight(shard: ModelShard, num_micro_batches: int) -> float:
    """Return how many micro-batches' activations a pipeline rank holds at most between both passes (1F1B)."""
    pp_size = shard.parallel.pipeline_model_parallel_size
    chunks = shard.parallel.virtual_pipeline_model_parallel_size
    if chunks == 1:
        return min(pp_size - shard.pp_rank, num_micro_batches)
    # Interleaved: of each micro-batch one chunk at a time.
    warmup = 2 * (pp_size - shard.pp_rank - 1) + (chunks - 1) * pp_size
    return min(warmup + 1, chunks * num_micro_batches) / chunks


def train_phase(
    shard: ModelShard, build: Build, work: Workload, *, on_gpu: bool, teacher: TeacherInputs | None = None
) -> dict[str, int]:
    """Return bytes that the forward and backward passes of one update add, by purpose."""
    batch, size = work.batch, build.bytes_per_value
    saved = int(shard.activation_bytes(build, batch) * micro_batches_in_flight(shard, work.num_micro_batches))
    if shard.parallel.sequence_parallel:
        saved += batch.tokens * shard.spec.hidden_size * size  # Megatron's buffer for gathered sequences
    backward = shard.layer_gradient_bytes(build, batch)
    backward += shard.recomputed_bytes(build, batch)
    added = {"batch": work.tokens * _BYTES_PER_POSITION}
    output = 0
    if shard.is_pipeline_last_stage:
        output = output_workspace(shard, build, batch, on_gpu=on_gpu, teacher=teacher)
        if teacher is not None:
            added["teacher states"] = teacher.size(shard, build, work, on_gpu=on_gpu)
    if shard.has_tied_output and build.lora is None:
        # The output layer's gradient exists until the embedding's is added, at the end of the backward pass.
        backward += shard.local_vocab_size * shard.spec.hidden_size * size
    # The loss runs when all activations are saved and no gradient exists yet: one of the two, not both.
    end = shard.final_norm_bytes(build, batch)
    return added | {"activations": saved + max(end, backward - output), "KL workspace": output}


def update_phase(shard: ModelShard, build: Build, *, on_gpu: bool) -> dict[str, int]:
    """Return bytes of gradient reduction and optimizer step.

    Transformer Engine's Adam works in place. PyTorch's takes the square roots of all second moments at once, in
    float32, one optimizer (of dense or expert parameters) after the other. On a CPU buffers are copied as well.
    """
    if build.fused:
        return {}
    if on_gpu:
        return {"square roots": max(4 * count // ranks for count, ranks in shard.gradient_buffers(build.lora))}
    trained = sum(count for count, _ in shard.gradient_buffers(build.lora))
    return {"reduction": max(4, build.bytes_per_value) * trained}


def output_workspace(
    shard: ModelShard,
    build: Build,
    batch: MicroBatchShape,
    *,
    on_gpu: bool,
    teacher: TeacherInputs | None,
    training: bool = True,
) -> int:
    """Return bytes of ``linear_divergence`` at its peak: chunks of logits, operands, gradients, statistics."""
    size, hidden, rows = build.bytes_per_value, shard.spec.hidden_size, batch.response_tokens
    columns = ceil_div(shard.spec.vocab_size, shard.tp_size)
    dense = teacher is not None and teacher.is_dense
    chunk = max(1, LOGITS_CHUNK_BYTES["cuda" if on_gpu else "cpu"] // (4 * columns * (1 + dense)))
    chunk = min(rows, chunk // 128 * 128 if chunk > 128 else chunk)
    logits = chunk * columns * 4 * (1 + dense)
    widened = 0 if on_gpu or size == 4 else 4  # a CPU multiplies float32
    operands = rows * hidden * (size + widened) + widened * columns * hidden
    if shard.parallel.sequence_parallel:
        operands += batch.tokens * hidden * size
    if dense and teacher.kind == "hidden":
        width = teacher.spec.hidden_size
        copied = size * (on_gpu or shard.tp_size > 1)  # a single rank on a CPU multiplies the states in place
        operands += teacher.sources * (rows * width * (copied + widened) + widened * columns * width)
    elif dense:
        operands += rows * columns * 4
    gradients = 0
    if training:
        gradients = hidden * size * (rows + batch.tokens)
        if build.lora is None:
            gradients += shard.local_vocab_size * hidden * 4
        if on_gpu:  # gradients with respect to logits, collected for one product
            gradients += min(CHUNKS_PER_PRODUCT["cuda"] * chunk, rows) * columns * size
    statistics = 0
    if not on_gpu:
        block = min(chunk * columns, max(ROW_BLOCK_ELEMENTS, columns))
        statistics = block * (4 * (2 + 3 * dense) + 8 * (columns < 2048))
    return logits + operands + gradients + statistics


def score_phase(
    shard: ModelShard, build: Build, work: Workload, *, on_gpu: bool, states: int | None = None
) -> dict[str, int]:
    """Return bytes that forward passes without gradients add, by purpose.

    states: bytes of the resulting hidden states; None if the result is log-probabilities.
    """
    added = {"batch": work.tokens * _BYTES_PER_POSITION}
    layer = _forward_peak(shard, build, work.batch.tokens)
    if states is not None or not shard.is_pipeline_last_stage:
        return added | {"activations": layer} | ({} if states is None else {"teacher states": states})
    # The output layer runs when the last layer has ended: its input is what remains of the activations.
    output = output_workspace(shard, build, work.batch, on_gpu=on_gpu, teacher=None, training=False)
    hidden = 2 * work.batch.tokens * build.bytes_per_value * shard.spec.hidden_size // shard.sequence_shards
    return added | {"activations": max(layer - output, hidden), "KL workspace": output}


def _forward_peak(shard: ModelShard, build: Build, tokens: int) -> int:
    """Return peak bytes of one layer's forward pass: residual, norm, gate and up, activation and products.

    Without Transformer Engine ``up`` is copied, and every expert's output exists before they are concatenated: beside
    the sorted tokens, those of all ranks, and the same in the order of experts.
    """
    spec = shard.spec
    if not spec.num_experts:
        inside = (4 if build.fused else 5) * spec.ffn_hidden_size / shard.tp_size
    elif build.fused:
        inside = spec.num_experts_per_tok * (4 * spec.moe_ffn_hidden_size + 2 * spec.hidden_size)
        inside /= shard.sequence_shards
    else:
        copies = 5 if shard.parallel.expert_model_parallel_size > 1 else 4
        inside = copies * spec.num_experts_per_tok * spec.hidden_size / shard.sequence_shards
    return int(tokens * build.bytes_per_value * (3 * spec.hidden_size + inside))


def export_phase(shard: ModelShard, build: Build, bucket_bytes: int) -> dict[str, int]:
    """Return bytes while weights are exported to servers: full tensors in buckets (``models/weights.py``).

    What all ranks sent, and the tensors that are made of it; a tensor alone in its bucket is not copied again where
    tensor ranks send nothing. The bucket before is still held.
    """
    vocabulary = shard.spec.vocab_size * shard.spec.hidden_size
    peak, before = {"bucket before": 0, "bucket": 0}, 0
    for sizes in _export_buckets(shard.spec, build, bucket_bytes):
        is_alone = len(sizes) == 1 and shard.tp_size == 1 and sizes[0] >= vocabulary * build.bytes_per_value
        bucket = sum(sizes) * (1 if is_alone else 2)
        if before + bucket > sum(peak.values()):
            peak = {"bucket before": before, "bucket": bucket}
        before = sum(sizes)
    return peak


def _export_buckets(spec: ModelSpec, build: Build, bucket_bytes: int) -> list[list[int]]:
    """Return the bytes of the parameters in each bucket, in their order; experts have buckets of their own."""
    buckets: list[list[int]] = []
    kind = None
    for count, is_expert in ModelShard(spec, ParallelConfig(), 0).parameter_sizes():
        size = count * build.bytes_per_value
        if kind != is_expert or sum(buckets[-1]) + size > bucket_bytes:
            buckets.append([])
        buckets[-1].append(size)
        kind = is_expert
    return buckets


def states_travel_phase(work: Workload, teacher: ModelSpec, bytes_per_value: int, tp_size: int) -> dict[str, int]:
    """Return bytes while a teacher's hidden states travel between layouts (``parallel/p2p.py``), in both directions."""
    states = work.response_tokens * teacher.hidden_size * bytes_per_value // tp_size
    return {"buckets": 2 * min(P2P_BUCKET_BYTES, states)}


def generate_phases(
    shard: ModelShard,
    build: Build,
    *,
    requests: int,
    prompts: int,
    prompt_length: int,
    sampling: SamplingConfig,
    rollout: RolloutConfig,
    records_routes: bool = False,
    turns: int = 1,
) -> dict[str, dict[str, int]]:
    """Return bytes of ``prefill`` and ``decode`` of the in-process engine on one data rank, by purpose.

    prompts: distinct prompts of the ``requests``. records_routes: for routing replay. turns: of an episode at most.
    """
    spec = shard.spec
    size, length = build.bytes_per_value, prompt_length + sampling.max_response_length
    rows = max(1, min(requests, rollout.max_batch_size, rollout.max_batch_tokens // length))
    distinct = max(1, min(prompts, rows))
    prefilled = distinct * prompt_length
    if turns > 1:  # the last turns of all rows may join at the same time, each after its own tokens
        prefilled = rows * length
    column = 2 * shard.local_kv_dim * size  # one position of one sequence and layer
    buffers = sampling.max_response_length * rows * (8 + 4 + 1) + POSITIONS_PER_DRAW * rows * 8
    if records_routes:
        route = shard.num_layers * spec.num_experts_per_tok * (1 if spec.expert_index_dtype == "uint8" else 2)
        buffers += (sampling.max_response_length * rows + prefilled) * route
    prefill = {
        "KV cache": prefilled * column * shard.num_layers,
        "activations": _forward_peak(shard, build, prefilled),
        "rollout buffers": buffers,
    }
    decode = {
        # The cache doubles when it is full, layer after layer: the last layer's old cache exists beside all new ones.
        "KV cache": rows * column * (length * shard.num_layers + length // 2),
        "rollout buffers": buffers,
        "sampling": rows * _sampling_bytes(shard, build, sampling) if shard.is_pipeline_last_stage else 0,
    }
    if packed := packed_weight_bytes(shard, build, sampling.max_response_length):
        prefill["packed weights"] = decode["packed weights"] = packed
    if spec.num_experts and build.on_gpu:
        decode["experts"] = _batched_experts_bytes(shard, build, rows)
    return {"prefill": prefill, "decode": decode}


def _batched_experts_bytes(shard: ModelShard, build: Build, rows: int) -> int:
    """Bytes of one layer's experts for a decoded token of ``rows`` sequences, all rows with all local experts."""
    spec, ranks = shard.spec, shard.parallel.expert_model_parallel_size
    all_rows = (1 << (rows - 1).bit_length()) * ranks
    if all_rows > MOST_BATCHED_EXPERT_ROWS:
        return 0
    of_row = 2 * spec.moe_ffn_hidden_size * (build.bytes_per_value + 4) + spec.hidden_size * build.bytes_per_value
    return all_rows * (spec.num_experts // ranks) * of_row


def _sampling_bytes(shard: ModelShard, build: Build, sampling: SamplingConfig) -> int:
    """Bytes for one sequence at the rank that samples: logits, float32 copy, weights, float64 cumulative sums."""
    size, vocabulary = build.bytes_per_value, shard.local_vocab_size * shard.tp_size
    sums = 8 if build.on_gpu or vocabulary < FEWEST_COLUMNS_IN_BLOCKS else 0
    per_column = size * (2 if shard.tp_size > 1 else 1) + (4 if size == 2 else 0) + 4 + sums
    if sampling.temperature not in (0.0, 1.0):
        per_column += 4
    if sampling.top_p < 1 or sampling.top_k > 0:
        per_column += 1 + 8 + 8 + 4  # ties, their numbers, the mass before each, filtered weights
    return vocabulary * per_column + shard.local_vocab_size * size


def top_k_selection_bytes(shard: ModelShard, teacher: ModelSpec) -> int:
    """Return bytes while top-k tokens are selected: logits of both models, the teacher's output layer in float32."""
    logits = TOP_K_ROWS_PER_CHUNK * shard.local_vocab_size * 4
    return 3 * logits + shard.local_vocab_size * teacher.hidden_size * 4
