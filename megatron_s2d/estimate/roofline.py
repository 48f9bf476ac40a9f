"""Time and traffic of a model at a layout: a roofline over data-sheet rates and assumed efficiencies. No torch here.

Operations are counted (``layers.py``) and divided by the peak that is assumed to be reached, decoding reads weights,
keys and values at the memory's bandwidth, a pipeline idles while it fills and drains (1F1B, with virtual stages
interleaved), and no communication overlaps with computation: what the training step overlaps is counted by
``s2d plan --measure``. Bytes are those that one rank sends, of ring algorithms. Left out: input, grading, checkpoints,
stragglers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_s2d.config.hardware import AssumptionsConfig, Gpu
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.estimate.layers import Build, ModelShard, pipeline_shards
from megatron_s2d.estimate.memory import Workload

_ADAM_BYTES = 36  # read and written per parameter of the optimizer's share: gradient, master, two moments, new weight


@dataclasses.dataclass(frozen=True)
class Machine:
    """A cluster of equal GPUs, and the assumed efficiencies."""

    gpu: Gpu
    assumptions: AssumptionsConfig = dataclasses.field(default_factory=AssumptionsConfig)

    @property
    def flops(self) -> float:
        """Operations per second that products reach, bfloat16."""
        return self.gpu.bf16_flops * self.assumptions.matmul_efficiency

    @property
    def memory_rate(self) -> float:
        """Bytes per second that decoding reads."""
        return self.gpu.memory_bandwidth * self.assumptions.memory_efficiency

    @property
    def usable_memory(self) -> int:
        """Bytes that tensors may take."""
        return self.gpu.memory - self.assumptions.reserved_memory

    def link_rate(self, span: int) -> float:
        """Return bytes per second of one rank in a group that spans ``span`` neighbouring ranks."""
        within = span <= self.assumptions.gpus_per_node
        peak = self.gpu.link_bandwidth if within else self.assumptions.network_bandwidth
        return min(peak, self.gpu.link_bandwidth) * self.assumptions.link_efficiency


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One kind of communication of one rank."""

    bytes_sent: float
    calls: float
    span: int  # ranks between the first and the last of the group, both counted

    def seconds(self, machine: Machine) -> float:
        """Return the time of all calls, none of them overlapped."""
        return self.bytes_sent / machine.link_rate(self.span) + self.calls * machine.assumptions.latency


def hidden_state_traffic(
    teacher: ModelSpec, response_tokens: int, bytes_per_value: int, scorer: ParallelConfig, trainer: ParallelConfig
) -> Traffic:
    """Return the traffic of hidden states from a teacher's ranks to a student's, sent once and split over ranks.

    response_tokens: number of states. Counted for the side with fewer ranks (``teachers/hidden_state_transfer.py``).
    """
    ranks = min(layout.tensor_model_parallel_size * layout.data_parallel_size for layout in (scorer, trainer))
    return Traffic(response_tokens * teacher.hidden_size * bytes_per_value / ranks, 1, trainer.world_size)


def total_seconds(traffic: Mapping[str, Traffic], machine: Machine) -> float:
    """Return the seconds of all kinds of traffic, one after the other."""
    return sum(item.seconds(machine) for item in traffic.values())


def scale_traffic(traffic: Mapping[str, Traffic], count: float) -> dict[str, Traffic]:
    """Return ``count`` times the traffic."""
    return {name: Traffic(item.bytes_sent * count, item.calls * count, item.span) for name, item in traffic.items()}


def add_traffic(*terms: Mapping[str, Traffic]) -> dict[str, Traffic]:
    """Return the sum, kind by kind; the span is the widest."""
    total: dict[str, Traffic] = {}
    for term in terms:
        for name, item in term.items():
            old = total.get(name, Traffic(0.0, 0.0, 1))
            total[name] = Traffic(old.bytes_sent + item.bytes_sent, old.calls + item.calls, max(old.span, item.span))
    return total


@dataclasses.dataclass(frozen=True)
class ModelOnMachine:
    """A model at a layout on a machine."""

    spec: ModelSpec
    parallel: ParallelConfig
    build: Build
    machine: Machine
    pp_rank: int = -1  # the last has the most to compute, because it has the output layer

    @property
    def shard(self) -> ModelShard:
        """The shard of the pipeline rank."""
        return pipeline_shards(self.spec, self.parallel)[self.pp_rank]

    @property
    def replica_span(self) -> int:
        """Ranks that the data ranks of one pipeline rank span (Megatron's order: data before pipeline)."""
        return self.world_size // self.parallel.pipeline_model_parallel_size

    @property
    def world_size(self) -> int:
        return self.parallel.world_size

    # ------------------------------------------------------------------------------ traffic

    def pass_traffic(self, work: Workload, *, trains: bool) -> dict[str, Traffic]:
        """Return the traffic of one micro-batch on one rank: forward, with ``trains`` also backward and recompute."""
        shard, size, parallel = self.shard, self.build.bytes_per_value, self.parallel
        tokens, tp_size, layers = work.batch.tokens, shard.tp_size, shard.num_layers
        hidden = tokens * self.spec.hidden_size * size
        repeats = 1 + (shard.recomputed_share(self.build) if trains else 0)
        traffic = {}
        if tp_size > 1:
            pairs = 1 if self.spec.num_experts else 2  # a column- and a row-parallel product; experts are not split
            forward, backward = (2, 3) if parallel.sequence_parallel else (1, 1)
            count = layers * pairs * (forward * repeats + backward * trains)
            if shard.is_pipeline_first_stage:  # the embedding
                count += 1 + (trains and parallel.sequence_parallel)
            if shard.is_pipeline_last_stage:  # the output layer
                count += parallel.sequence_parallel + 2 * trains
            ring = (tp_size - 1) / tp_size * (1 if parallel.sequence_parallel else 2)
            traffic["tensor"] = Traffic(count * hidden * ring, count, tp_size)
        if (cp_size := parallel.context_parallel_size) > 1:
            # Keys and values of all other ranks; their gradients, which Transformer Engine's ring sends beside them.
            count = layers * (repeats + self.build.recompute.recomputes("core_attn") * trains)
            count += layers * (1 + self.build.fused) * trains
            traffic["context"] = Traffic(
                count * 2 * tokens * shard.local_kv_dim * size * (cp_size - 1), 2 * count, tp_size * cp_size
            )
        if parallel.pipeline_model_parallel_size > 1:
            calls = (1 + trains) * parallel.virtual_pipeline_model_parallel_size  # of a rank in the middle
            traffic["pipeline"] = Traffic(calls * hidden / shard.sequence_shards, calls, self.world_size)
        ep_size = parallel.expert_model_parallel_size
        if ep_size > 1:
            calls = layers * 2 * (repeats + trains)
            sent = hidden / shard.sequence_shards * self.spec.num_experts_per_tok * (ep_size - 1) / ep_size
            traffic["expert"] = Traffic(calls * sent, calls, ep_size)
        return traffic

    def update_traffic(self) -> dict[str, Traffic]:
        """Return the traffic of one update: float32 gradient reduction, weight gathering, tied embedding gradients."""
        shard, size = self.shard, self.build.bytes_per_value
        gradients = weights = 0.0
        buffers = shard.gradient_buffers(self.build.lora)
        for count, ranks in buffers:
            gradients += 4 * count * (ranks - 1) / ranks
            weights += size * count * (ranks - 1) / ranks
        traffic = {}
        if gradients:
            traffic["gradients"] = Traffic(gradients, len(buffers), self.replica_span)
            traffic["weights"] = Traffic(weights, len(buffers), self.replica_span)
        if self.build.lora is None and self.spec.tie_word_embeddings and self.parallel.pipeline_model_parallel_size > 1:
            traffic["tied embedding"] = Traffic(4 * shard.local_vocab_size * self.spec.hidden_size, 1, self.world_size)
        return traffic

    def train_traffic(self, work: Workload) -> dict[str, Traffic]:
        """Return the traffic of all passes and of the update."""
        return scale_traffic(self.pass_traffic(work, trains=True), work.num_micro_batches) | self.update_traffic()

    def decode_traffic(self, rows: float, tokens: float) -> dict[str, Traffic]:
        """Return the traffic of ``tokens`` decoding steps of ``rows`` responses: all-reduces and hidden states."""
        shard, size = self.shard, self.build.bytes_per_value
        hidden = rows * self.spec.hidden_size * size
        traffic = {}
        if shard.tp_size > 1:
            calls = tokens * (2 * shard.num_layers + 1)
            traffic["tensor"] = Traffic(calls * hidden * 2 * (shard.tp_size - 1) / shard.tp_size, calls, shard.tp_size)
        if self.parallel.pipeline_model_parallel_size > 1:
            traffic["pipeline"] = Traffic(tokens * hidden, tokens, self.world_size)
        return traffic

    # ------------------------------------------------------------------------------ seconds

    def _layers_seconds(self, tokens: float, attention_span: float, passes: float) -> float:
        return passes * self.shard.num_layers * self.shard.layer_flops(tokens, attention_span) / self.machine.flops

    def train_seconds(self, work: Workload, teacher: ModelSpec | None = None) -> dict[str, float]:
        """Return seconds of one update: passes (with pipeline idle time and communication), loss, gradients, optimizer.

        teacher: if given, the products of its output layer are part of the loss.
        """
        batch, pp_size = work.batch, self.parallel.pipeline_model_parallel_size
        products = 3 if self.build.lora is None else 2  # frozen weights have no gradients
        passes = products + self.shard.recomputed_share(self.build)
        layers = self._layers_seconds(batch.tokens, batch.seq_length / 2, passes)
        loss = products * self.shard.output_flops(batch.response_tokens)
        if teacher is not None:
            loss += 2 * batch.response_tokens * teacher.hidden_size * self.shard.local_vocab_size
        loss /= self.machine.flops
        communication = total_seconds(self.pass_traffic(work, trains=True), self.machine)
        count, idle = work.num_micro_batches, (pp_size - 1) / self.parallel.virtual_pipeline_model_parallel_size
        return {
            "layers": count * layers,
            "loss": count * loss,
            "tensor, pipeline, context, expert traffic": count * communication,
            "pipeline idle": idle * (layers + loss + communication),
            "gradients and weights": total_seconds(self.update_traffic(), self.machine),
            "optimizer": self.optimizer_seconds(),
        }

    def optimizer_seconds(self) -> float:
        """Return the time of Adam's reads and writes of this rank's share."""
        share = sum(count / ranks for count, ranks in self.shard.gradient_buffers(self.build.lora))
        return share * _ADAM_BYTES / self.machine.memory_rate

    def score_seconds(self, work: Workload, *, outputs: bool) -> float:
        """Return the time of forward passes alone; ``outputs``: with the output layer (for log-probabilities)."""
        batch, pp_size = work.batch, self.parallel.pipeline_model_parallel_size
        each = self._layers_seconds(batch.tokens, batch.seq_length / 2, 1)
        if outputs:
            each += self.shard.output_flops(batch.response_tokens) / self.machine.flops
        each += total_seconds(self.pass_traffic(work, trains=False), self.machine)
        return (work.num_micro_batches + pp_size - 1) * each

    def prefill_seconds(self, prompts: float, length: float) -> float:
        """Return the time of one data rank's prompts; pipeline ranks run one after the other (in-process engine)."""
        pp_size = self.parallel.pipeline_model_parallel_size
        return pp_size * self._layers_seconds(prompts * length, length / 2, 1)

    def decode_seconds(self, rows: float, prompt: float, response: float) -> float:
        """Return the time of a batch of ``rows`` on one data rank, ``response`` tokens each, all rows to the end.

        Per token the larger of matrix products and weight reads; keys and values are read on top.
        """
        shard, spec, size = self.shard, self.spec, self.build.bytes_per_value
        weights = shard.num_parameters - (
            shard.local_vocab_size * spec.hidden_size
            if shard.is_pipeline_first_stage and not shard.has_tied_output
            else 0
        )
        if spec.num_experts:  # experts that no token is routed to are not read
            routed = 1 - (1 - spec.num_experts_per_tok / spec.num_experts) ** max(rows, 1)
            experts = sum(count for count, is_expert in shard.parameter_sizes() if is_expert)
            weights -= experts * (1 - routed)
        products = shard.num_layers * shard.layer_flops(rows, 0) + shard.output_flops(rows)
        base = max(weights * size / self.machine.memory_rate, products / self.machine.flops)
        cached = 2 * rows * (prompt + response / 2) * shard.local_kv_dim * size * shard.num_layers
        each = base + cached / self.machine.memory_rate
        each += total_seconds(self.decode_traffic(rows, 1), self.machine)
        pp_size = self.parallel.pipeline_model_parallel_size
        return response * pp_size * each
