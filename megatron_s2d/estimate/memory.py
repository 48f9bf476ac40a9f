"""Memory of one rank while a stage runs: what is held all the time, by role, and what each phase adds, by purpose.

Bytes are what tensors take; the CUDA context, communication buffers and fragmentation come on top
(``AssumptionsConfig.reserved_memory``). Lengths are worst cases: every response runs into its limit. What is counted
follows ``train/megatron_model.py``, ``parallel/trainable_model.py``, ``kl/fused.py`` and ``rollout/megatron/engine.py``; docs/preflight.md
has the comparison with measured peaks. No torch here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from megatron_s2d.arithmetic import ceil_div, round_up
from megatron_s2d.buffer_sizes import (
    CHUNKS_PER_PRODUCT,
    LOGITS_CHUNK_BYTES,
    POSITIONS_PER_DRAW,
    ROW_BLOCK_ELEMENTS,
    TOP_K_ROWS_PER_CHUNK,
)
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import RolloutConfig, SamplingConfig
from megatron_s2d.estimate.layers import Build, MicroBatch, Part

_BYTES_PER_POSITION = 50  # ids, labels, masks, positions and half a dozen float32 columns: data/packing.py


@dataclasses.dataclass(frozen=True)
class ResidentMemory:
    """Bytes that a model holds from the start of a stage to its end."""

    role: str  # student, teacher, reference; for a stage on the teacher's weights still the trained model: student
    model: str  # entry of `models`
    weights: int
    gradients: int = 0  # float32
    optimizer: int = 0  # Adam's moments and, in bfloat16, float32 masters; sharded over data ranks

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclasses.dataclass(frozen=True)
class StageMemory:
    """One stage on the pipeline rank that needs most."""

    pp_rank: int
    held: tuple[ResidentMemory, ...]
    phases: Mapping[str, Mapping[str, int]]  # prefill, decode, score, train, update -> purpose -> bytes

    @property
    def held_total(self) -> int:
        """Bytes of all models."""
        return sum(item.total for item in self.held)

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()), default="")

    @property
    def total(self) -> int:
        """Peak bytes."""
        return self.held_total + sum(self.phases.get(self.peak_phase, {}).values())


@dataclasses.dataclass(frozen=True)
class Workload:
    """What one optimizer update gives to one data rank."""

    batch: MicroBatch  # the largest
    num_micro_batches: int

    @property
    def tokens(self) -> int:
        """Padded tokens of the update on a data rank."""
        return self.batch.tokens * self.num_micro_batches

    @property
    def responses(self) -> int:
        """Tokens of responses among them."""
        return self.batch.responses * self.num_micro_batches


def workload(
    responses: int, length: int, response_length: int, *, max_tokens: int, parallel: ParallelConfig
) -> Workload:
    """``responses`` of an update over all data ranks, each ``length`` tokens long with its prompt."""
    multiple = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    context = parallel.context_parallel_size
    length = round_up(length, multiple)
    on_rank = ceil_div(responses, parallel.data_parallel_size) * length / context
    tokens = math.ceil(max(length / context, min(max_tokens, on_rank)))
    batch = MicroBatch(tokens, length, round(tokens * min(1.0, response_length / length)))
    return Workload(batch, math.ceil(on_rank / tokens))


def trained(part: Part, build: Build, model: str = "", role: str = "student") -> ResidentMemory:
    """Weights, Megatron's float32 gradient buffers and the distributed optimizer's share of Adam's state."""
    size = build.bytes_per_value
    buffers = part.buffers()
    elements = sum(count for count, _ in buffers)
    share = sum(count / ranks for count, ranks in buffers)
    weights = elements * size + part.fp8_copies(build)
    return ResidentMemory(role, model, weights, elements * 4, round(share * (12 if size == 2 else 8)))


def frozen(part: Part, build: Build, role: str, model: str = "", copies: int = 1) -> ResidentMemory:
    """Weights alone."""
    return ResidentMemory(role, model, copies * (part.parameters * build.bytes_per_value + part.fp8_copies(build)))


@dataclasses.dataclass(frozen=True)
class TeacherInputs:
    """What the loss reads of teachers, for all micro-batches of an update at once."""

    kind: str  # hidden (exact distributions), logits (a cache of whole distributions) or topk
    spec: ModelSpec  # of the teacher
    sources: int = 1  # two with a reference beside the teacher
    top_k: int = 0
    own_copy: bool = False  # the output layer's rows, where the layouts differ or the teacher is a cache

    @property
    def is_dense(self) -> bool:
        """Whether the loss makes logits of the teacher's."""
        return self.kind != "topk"

    def size(self, part: Part, build: Build, work: Workload, *, on_gpu: bool) -> int:
        """Bytes on a rank of the last stage."""
        found = 0
        if self.kind == "logits":
            found = work.tokens * 4 * (self.spec.vocab_size + part.vocabulary)
        elif self.kind == "topk":
            found = work.tokens * (12 * self.top_k + 4)
        else:
            found = lazy_hidden_states(part, build, work, self.spec, on_gpu=on_gpu)
        weight = self.own_copy * part.vocabulary * self.spec.hidden_size * build.bytes_per_value
        return self.sources * (found + weight)


def lazy_hidden_states(part: Part, build: Build, work: Workload, teacher: ModelSpec, *, on_gpu: bool) -> int:
    """Hidden states of an update's responses, shared by tensor ranks: in host memory, which a CPU computes in."""
    return 0 if on_gpu else work.responses * teacher.hidden_size * build.bytes_per_value // part.tensor


# -------------------------------------------------------------------------------- phases


def train_phase(
    part: Part, build: Build, work: Workload, *, on_gpu: bool, teacher: TeacherInputs | None = None
) -> dict[str, int]:
    """Forward and backward passes of one update."""
    batch, size = work.batch, build.bytes_per_value
    behind = part.parallel.pipeline_model_parallel_size - part.stage  # micro-batches between the two passes (1F1B)
    kept = part.kept(build, batch) * min(behind, work.num_micro_batches)
    if part.parallel.sequence_parallel:
        kept += batch.tokens * part.spec.hidden_size * size  # Megatron's buffer for gathered sequences
    backward = part.backward_of_layer(build, batch)
    if build.recompute == "full":
        backward += part.kept_by_layer(build, batch)
    found = {"batch": work.tokens * _BYTES_PER_POSITION}
    output = 0
    if part.is_last:
        output = output_workspace(part, build, batch, on_gpu=on_gpu, teacher=teacher)
        if teacher is not None:
            found["teacher states"] = teacher.size(part, build, work, on_gpu=on_gpu)
    if part.ties_here:
        # The output layer's gradient waits for the embedding's, which comes last.
        backward += part.vocabulary * part.spec.hidden_size * size
    # The loss comes when everything is kept and no gradient exists yet: one of the two, not both.
    end = part.kept_at_end(build, batch)
    return found | {"activations": kept + max(end, backward - output), "KL workspace": output}


def update_phase(part: Part, build: Build, *, on_gpu: bool) -> dict[str, int]:
    """Reduction of gradients and the optimizer's step: in place on a GPU, through copies of the buffers on a CPU."""
    if on_gpu:
        return {}
    return {"reduction": max(4, build.bytes_per_value) * sum(count for count, _ in part.buffers())}


def output_workspace(
    part: Part, build: Build, batch: MicroBatch, *, on_gpu: bool, teacher: TeacherInputs | None, training: bool = True
) -> int:
    """Bytes of ``linear_divergence`` at its peak: chunks of logits, operands, gradients, statistics."""
    size, hidden, rows = build.bytes_per_value, part.spec.hidden_size, batch.responses
    tensor = part.tensor
    columns = ceil_div(part.spec.vocab_size, tensor)
    dense = teacher is not None and teacher.is_dense
    chunk = max(1, LOGITS_CHUNK_BYTES["cuda" if on_gpu else "cpu"] // (4 * columns * (1 + dense)))
    chunk = min(rows, chunk // 128 * 128 if chunk > 128 else chunk)
    logits = chunk * columns * 4 * (1 + dense)
    widened = 0 if on_gpu or size == 4 else 4  # a CPU multiplies float32
    operands = rows * hidden * (size + widened) + widened * columns * hidden
    if part.parallel.sequence_parallel:
        operands += batch.tokens * hidden * size
    if dense and teacher.kind == "hidden":
        width = teacher.spec.hidden_size
        copied = size * (on_gpu or tensor > 1)  # one rank on a CPU multiplies what waits in host memory
        operands += teacher.sources * (rows * width * (copied + widened) + widened * columns * width)
    elif dense:
        operands += rows * columns * 4
    gradients = 0
    if training:
        gradients = hidden * size * (rows + batch.tokens) + part.vocabulary * hidden * 4
        if on_gpu:  # gradients by logits, collected for one product
            gradients += min(CHUNKS_PER_PRODUCT["cuda"] * chunk, rows) * columns * size
    statistics = 0
    if not on_gpu:
        block = min(chunk * columns, max(ROW_BLOCK_ELEMENTS, columns))
        statistics = block * (4 * (2 + 3 * dense) + 8 * (columns < 2048))
    return logits + operands + gradients + statistics


def score_phase(part: Part, build: Build, work: Workload, *, on_gpu: bool, states: int | None = None) -> dict[str, int]:
    """Forward passes without gradients. states: bytes that are kept of hidden states; None for log-probabilities."""
    found = {"batch": work.tokens * _BYTES_PER_POSITION, "activations": _forward_peak(part, build, work.batch.tokens)}
    if states is not None:
        return found | {"teacher states": states}
    if part.is_last:
        found["KL workspace"] = output_workspace(part, build, work.batch, on_gpu=on_gpu, teacher=None, training=False)
    return found


def _forward_peak(part: Part, build: Build, tokens: int) -> int:
    """Bytes inside one layer's MLP without gradients: residual, norm, gate and up, activation and products."""
    spec = part.spec
    width = spec.ffn_hidden_size / part.tensor
    if spec.num_experts:
        width = spec.num_experts_per_tok * (spec.moe_ffn_hidden_size + spec.hidden_size / 2) / part.sequence_shards
    return int(tokens * build.bytes_per_value * (3 * spec.hidden_size + 4 * width))


def generate_phases(
    part: Part,
    build: Build,
    *,
    requests: int,
    prompts: int,
    prompt_length: int,
    sampling: SamplingConfig,
    rollout: RolloutConfig,
) -> dict[str, dict[str, int]]:
    """``prefill`` and ``decode`` of the in-process engine on one data rank; ``prompts``: distinct ones."""
    size, length = build.bytes_per_value, prompt_length + sampling.max_response_length
    rows = max(1, min(requests, rollout.max_batch_size, rollout.max_batch_tokens // length))
    distinct = max(1, min(prompts, rows))
    column = 2 * part.kv * size  # of one row and layer
    buffers = sampling.max_response_length * rows * (8 + 4 + 1) + POSITIONS_PER_DRAW * rows * 8
    prefill = {
        "KV cache": distinct * prompt_length * column * part.num_layers,
        "activations": _forward_peak(part, build, distinct * prompt_length),
        "rollout buffers": buffers,
    }
    decode = {
        # Room is doubled when it is used up, layer after layer: the last layer's old room is there beside all new.
        "KV cache": rows * column * (length * part.num_layers + length // 2),
        "rollout buffers": buffers,
        "sampling": rows * _sampling_bytes(part, build, sampling) if part.is_last else 0,
    }
    return {"prefill": prefill, "decode": decode}


def _sampling_bytes(part: Part, build: Build, sampling: SamplingConfig) -> int:
    """Of one row at the rank that samples: logits, their float32 form, weights and float64 cumulative sums."""
    size, vocabulary = build.bytes_per_value, part.vocabulary * part.tensor
    per_column = size * (2 if part.tensor > 1 else 1) + (4 if size == 2 else 0) + 4 + 8
    if sampling.temperature not in (0.0, 1.0):
        per_column += 4
    if sampling.top_p < 1 or sampling.top_k > 0:
        per_column += 4 + 8 + 8 + 4 + 8  # sorted weights, their order, cumulative sums, what is kept, its sums
    return vocabulary * per_column + part.vocabulary * size


def support_bytes(part: Part, teacher: ModelSpec) -> int:
    """Bytes while the tokens of a top-k support are chosen: logits of both sides, and the teacher's rows in float32."""
    logits = TOP_K_ROWS_PER_CHUNK * part.vocabulary * 4
    return 3 * logits + part.vocabulary * teacher.hidden_size * 4
