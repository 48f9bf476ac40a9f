"""Least time of a rank's phases, part by part, from what was counted and the data sheet of the GPU. No torch here.

Matrix products take the longer of their operations at the dense peak and of their operands at the memory's bandwidth,
attention its operations, every other kernel the bytes of its operands, a collective the bytes that the rank sends in a
ring at the link's bandwidth, and the host a stated cost for each launch. Device and host work side by side, so a phase
takes the longer of the two; overlapped collectives take no time of their own. Nothing is divided by an assumed
efficiency: real times are longer. Left out: latencies, waits for slower ranks, and what kernels read twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from megatron_s2d.config.hardware import Gpu
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.estimate.layers import ModelShard
from megatron_s2d.estimate.memory import Workload
from megatron_s2d.estimate.roofline import Machine
from megatron_s2d.measure.comparison import bytes_sent
from megatron_s2d.measure.measurement import PhaseCall
from megatron_s2d.measure.stub import Collective, Product

_SIZES = {"f64": 8, "f32": 4, "tf32": 4, "bf16": 2, "f16": 2, "e4m3": 1, "e5m2": 1}
_ONCE = ("gradients", "tied embedding", "weights")  # in an update, not in every micro-batch
_BACKWARD_ATTENTION = 2.5  # products of the backward pass over those of the forward pass, which it runs again
_KL_PASSES = 2  # over float32 logits: statistics, gradient


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a phase, for all micro-batches of an update on one rank."""

    phase: str
    name: str
    counted: str  # what the time was computed from
    seconds: float
    overlapped: bool = False  # beside the products: not part of the phase's time


@dataclasses.dataclass(frozen=True)
class PhaseTime:
    """A phase of an update."""

    phase: str
    parts: tuple[Part, ...]
    host_seconds: float  # of launching
    launches: int
    idle_seconds: float = 0.0  # of a pipeline that fills and drains

    @property
    def device_seconds(self) -> float:
        """Seconds of all parts that do not overlap."""
        return sum(part.seconds for part in self.parts if not part.overlapped)

    @property
    def seconds(self) -> float:
        """Least time of the phase."""
        return max(self.device_seconds, self.host_seconds) + self.idle_seconds


@dataclasses.dataclass(frozen=True)
class Model:
    """The model whose passes a phase runs."""

    spec: ModelSpec
    parallel: ParallelConfig
    pp_rank: int
    recomputed: float = 0.0  # share of the layers' forward pass that runs again

    @property
    def shard(self) -> ModelShard:
        return ModelShard(self.spec, self.parallel, self.pp_rank)


def phase_time(
    call: PhaseCall, overlapped: Sequence[Collective], model: Model, work: Workload, machine: Machine
) -> PhaseTime:
    """Return the least time of ``call``, as often as an update of ``work`` runs its micro-batches.

    overlapped: see ``Measurement.overlapped``.
    """
    times = work.num_micro_batches / call.micro_batches if call.micro_batches else 1.0
    gpu, trains = machine.gpu, call.phase == "train"
    products = sum(_product_seconds(item, gpu) for item in call.products)
    parts = [Part(call.phase, "matrix products", _tera(call.flops * times, "FLOP"), products * times)]
    if call.micro_batches:
        flops = times * call.micro_batches * _attention_flops(model, work, trains=trains)
        parts.append(Part(call.phase, "attention", _tera(flops, "FLOP"), flops / gpu.bf16_flops))
    moved = times * sum(call.moved.values())
    parts.append(Part(call.phase, "other PyTorch kernels", _giga(moved), moved / gpu.memory_bandwidth))
    if trains and (logits := _logits(call.products, model)):
        read = times * logits * (4 * _KL_PASSES + 2)
        parts.append(Part(call.phase, "divergence kernels", _giga(read), read / gpu.memory_bandwidth))
    parts += _collectives(call, overlapped, model, machine, times)
    num_launches = int(call.num_launches * times)
    host = num_launches * machine.assumptions.launch_seconds
    phase = PhaseTime(call.phase, tuple(parts), host, num_launches)
    if call.micro_batches and model.parallel.pipeline_model_parallel_size > 1:
        steps = (model.parallel.pipeline_model_parallel_size - 1) / model.parallel.virtual_pipeline_model_parallel_size
        phase = dataclasses.replace(phase, idle_seconds=steps * phase.seconds / work.num_micro_batches)
    return phase


def _product_seconds(item: Product, gpu: Gpu) -> float:
    """The longer of operations at the peak of the operands' type and operands at the memory's bandwidth."""
    peak = gpu.bf16_flops
    if item.a in ("e4m3", "e5m2") and gpu.fp8_flops is not None:
        peak = gpu.fp8_flops
    elif item.a == "f32":
        peak = gpu.bf16_flops / (2 if "tf32" in item.compute else 16)  # without tensor cores
    result = item.m * item.n * _SIZES.get(item.c, 4) * (2 if item.accumulates else 1)
    operands = item.k * (item.m * _SIZES.get(item.a, 4) + item.n * _SIZES.get(item.b, 4))
    moved = item.batch * item.count * (operands + result)
    return max(item.flops / peak, moved / gpu.memory_bandwidth)


def _attention_flops(model: Model, work: Workload, *, trains: bool) -> float:
    """Operations of causal attention in one micro-batch on this rank; its kernels are not seen as products."""
    batch, shard = work.batch, model.shard
    forward = 4 * batch.tokens * shard.local_q_dim * batch.seq_length / 2 * shard.num_layers
    return forward * (1 + (_BACKWARD_ATTENTION + model.recomputed) * trains)


def _logits(products: Iterable[Product], model: Model) -> int:
    """Elements of the logits, student's and teacher's, that the products of the output layer wrote.

    Of cuBLAS' results they alone have as many rows as there are columns of the vocabulary; the weight's gradient has
    them as columns.
    """
    columns = -(-model.spec.vocab_size // model.parallel.tensor_model_parallel_size)
    return sum(
        item.m * item.n * item.count
        for item in products
        if item.m == columns and item.c == "f32" and not item.accumulates
    )


def _collectives(
    call: PhaseCall, overlapped: Sequence[Collective], model: Model, machine: Machine, times: float
) -> list[Part]:
    parallel = model.parallel
    pp_size, world = parallel.pipeline_model_parallel_size, parallel.world_size
    spans = {
        "tensor": parallel.tensor_model_parallel_size,
        "context": parallel.tensor_model_parallel_size * parallel.context_parallel_size,
        "expert": parallel.expert_model_parallel_size,
        "gradients": world // pp_size,
        "weights": world // pp_size,
    }
    gathers = "weights" if call.phase == "update" else "tensor"

    def sent(collectives: Iterable[Collective]) -> dict[str, float]:
        return bytes_sent(collectives, parallel, gathers, is_middle=0 < model.pp_rank < pp_size - 1)

    hidden_bytes, parts = sent(overlapped), []
    for kind, size in sent(call.collectives).items():
        within = spans.get(kind, world) <= machine.assumptions.gpus_per_node
        rate = machine.gpu.link_bandwidth if within else machine.assumptions.network_bandwidth
        count = 1.0 if kind in _ONCE else times
        hidden = count * min(size, hidden_bytes.get(kind, 0.0))
        for part, is_hidden in ((hidden, True), (count * size - hidden, False)):
            if part > 1e6:
                name = f"{kind} traffic" + (", overlapped" if is_hidden else "")
                parts.append(Part(call.phase, name, _giga(part), part / rate, is_hidden))
    return parts


def _tera(value: float, unit: str) -> str:
    return f"{value / 1e12:,.1f} T{unit}"


def _giga(value: float) -> str:
    return f"{value / 1e9:,.1f} GB"
