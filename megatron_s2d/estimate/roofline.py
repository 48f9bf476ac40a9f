"""Seconds and traffic of a model at a layout: a roofline over data-sheet rates and assumed efficiencies. No torch here.

Operations are counted (``arithmetic.py``) and divided by the peak that is assumed to be reached, decoding reads
weights, keys and values at the memory's bandwidth, a pipeline idles while it fills and drains (1F1B), and no
communication is hidden behind computation, because the training step hides none (``parallel/trainable_model.py``: no overlapped
reduction). Bytes are those that one rank sends, of ring algorithms. Left out: input, grading, checkpoints, stragglers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_s2d.config.hardware import AssumptionsConfig, Gpu
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.estimate.layers import Build, Part, parts
from megatron_s2d.estimate.memory import Workload

_ADAM_BYTES = 36  # read and written per parameter of the optimizer's share: gradient, master, two moments, new weight


@dataclasses.dataclass(frozen=True)
class Machine:
    """Equal GPUs and what is assumed of them."""

    gpu: Gpu
    assumptions: AssumptionsConfig = AssumptionsConfig()

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

    def link(self, span: int) -> float:
        """Bytes per second of one rank within a group that reaches over ``span`` neighbouring ranks."""
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
        return self.bytes_sent / machine.link(self.span) + self.calls * machine.assumptions.latency


def hidden_state_traffic(
    teacher: ModelSpec, responses: int, bytes_per_value: int, scorer: ParallelConfig, trainer: ParallelConfig
) -> Traffic:
    """Hidden states of ``responses`` tokens from a teacher's ranks to a student's: each once, every rank a share.

    What the busier of the two kinds of ranks moves, sent or received (``teachers/hidden_state_transfer.py``).
    """
    ranks = min(at.tensor_model_parallel_size * at.data_parallel_size for at in (scorer, trainer))
    return Traffic(responses * teacher.hidden_size * bytes_per_value / ranks, 1, trainer.world_size)


def total_seconds(traffic: Mapping[str, Traffic], machine: Machine) -> float:
    """Seconds of all kinds one after the other."""
    return sum(item.seconds(machine) for item in traffic.values())


def repeated(traffic: Mapping[str, Traffic], count: float) -> dict[str, Traffic]:
    """The same, ``count`` times."""
    return {name: Traffic(item.bytes_sent * count, item.calls * count, item.span) for name, item in traffic.items()}


def added(*parts: Mapping[str, Traffic]) -> dict[str, Traffic]:
    """Kind by kind; the span is the widest."""
    found: dict[str, Traffic] = {}
    for part in parts:
        for name, item in part.items():
            old = found.get(name, Traffic(0.0, 0.0, 1))
            found[name] = Traffic(old.bytes_sent + item.bytes_sent, old.calls + item.calls, max(old.span, item.span))
    return found


@dataclasses.dataclass(frozen=True)
class ModelOnMachine:
    """A model at a layout on a machine."""

    spec: ModelSpec
    parallel: ParallelConfig
    build: Build
    machine: Machine

    @property
    def part(self) -> Part:
        """The stage with the most to compute: the last, which has the output layer."""
        return parts(self.spec, self.parallel)[-1]

    @property
    def replica_span(self) -> int:
        """Ranks over which the data ranks of one pipeline stage are spread (Megatron's order: data before pipeline)."""
        return self.world // self.parallel.pipeline_model_parallel_size

    @property
    def world(self) -> int:
        return self.parallel.world_size

    # ------------------------------------------------------------------------------ traffic

    def pass_traffic(self, work: Workload, *, trains: bool) -> dict[str, Traffic]:
        """Of one micro-batch through one stage: forward, and with ``trains`` backward (and recomputed) too."""
        part, size, parallel = self.part, self.build.bytes_per_value, self.parallel
        tokens, tensor, layers = work.batch.tokens, part.tensor, part.num_layers
        hidden = tokens * self.spec.hidden_size * size
        repeats = 2 if trains and self.build.recompute == "full" else 1
        found = {}
        if tensor > 1:
            pairs = 1 if self.spec.num_experts else 2  # a column-wise and a row-wise product; experts are kept whole
            forward, backward = (2, 3) if parallel.sequence_parallel else (1, 1)
            count = layers * pairs * (forward * repeats + backward * trains) + 1 + 2 * trains
            ring = (tensor - 1) / tensor * (1 if parallel.sequence_parallel else 2)
            found["tensor"] = Traffic(count * hidden * ring, count, tensor)
        if parallel.pipeline_model_parallel_size > 1:
            calls = 1 + trains
            found["pipeline"] = Traffic(calls * hidden / part.sequence_shards, calls, self.world)
        expert = parallel.expert_model_parallel_size
        if expert > 1:
            calls = layers * 2 * (repeats + trains)
            sent = hidden / part.sequence_shards * self.spec.num_experts_per_tok * (expert - 1) / expert
            found["expert"] = Traffic(calls * sent, calls, expert)
        return found

    def update_traffic(self) -> dict[str, Traffic]:
        """Of one update: gradients reduced in float32, weights gathered, a tied embedding's copies added."""
        part, size = self.part, self.build.bytes_per_value
        gradients = weights = 0.0
        for count, ranks in part.buffers():
            gradients += 4 * count * (ranks - 1) / ranks
            weights += size * count * (ranks - 1) / ranks
        found = {}
        if gradients:
            found["gradients"] = Traffic(gradients, len(part.buffers()), self.replica_span)
            found["weights"] = Traffic(weights, len(part.buffers()), self.replica_span)
        if self.spec.tie_word_embeddings and self.parallel.pipeline_model_parallel_size > 1:
            found["tied embedding"] = Traffic(4 * part.vocabulary * self.spec.hidden_size, 1, self.world)
        return found

    def train_traffic(self, work: Workload) -> dict[str, Traffic]:
        """Of one whole update."""
        return repeated(self.pass_traffic(work, trains=True), work.num_micro_batches) | self.update_traffic()

    def decode_traffic(self, rows: float, tokens: float) -> dict[str, Traffic]:
        """Of ``tokens`` steps of decoding ``rows`` responses on one stage: two all-reduces a layer, hidden states."""
        part, size = self.part, self.build.bytes_per_value
        hidden = rows * self.spec.hidden_size * size
        found = {}
        if part.tensor > 1:
            calls = tokens * (2 * part.num_layers + 1)
            found["tensor"] = Traffic(calls * hidden * 2 * (part.tensor - 1) / part.tensor, calls, part.tensor)
        if self.parallel.pipeline_model_parallel_size > 1:
            found["pipeline"] = Traffic(tokens * hidden, tokens, self.world)
        return found

    # ------------------------------------------------------------------------------ seconds

    def _layers_seconds(self, tokens: float, context: float, passes: float) -> float:
        return passes * self.part.num_layers * self.part.layer_flops(tokens, context) / self.machine.flops

    def train_seconds(self, work: Workload, teacher: ModelSpec | None = None) -> dict[str, float]:
        """One update: passes (with the pipeline's idle time and communication), loss, gradients, optimizer.

        ``teacher``: its output layer's products are part of the loss.
        """
        batch, stages = work.batch, self.parallel.pipeline_model_parallel_size
        passes = 4 if self.build.recompute == "full" else 3
        layers = self._layers_seconds(batch.tokens, batch.length / 2, passes)
        loss = 3 * self.part.output_flops(batch.responses)
        if teacher is not None:
            loss += 2 * batch.responses * teacher.hidden_size * self.part.vocabulary
        loss /= self.machine.flops
        communication = total_seconds(self.pass_traffic(work, trains=True), self.machine)
        count, idle = work.num_micro_batches, stages - 1
        return {
            "layers": count * layers,
            "loss": count * loss,
            "tensor, pipeline, expert traffic": count * communication,
            "pipeline idle": idle * (layers + loss + communication),
            "gradients and weights": total_seconds(self.update_traffic(), self.machine),
            "optimizer": self.optimizer_seconds(),
        }

    def optimizer_seconds(self) -> float:
        """Adam's reads and writes of this rank's share."""
        share = sum(count / ranks for count, ranks in self.part.buffers())
        return share * _ADAM_BYTES / self.machine.memory_rate

    def score_seconds(self, work: Workload, *, outputs: bool) -> float:
        """Forward passes alone; ``outputs``: with the output layer (log-probabilities rather than hidden states)."""
        batch, stages = work.batch, self.parallel.pipeline_model_parallel_size
        each = self._layers_seconds(batch.tokens, batch.length / 2, 1)
        if outputs:
            each += self.part.output_flops(batch.responses) / self.machine.flops
        each += total_seconds(self.pass_traffic(work, trains=False), self.machine)
        return (work.num_micro_batches + stages - 1) * each

    def prefill_seconds(self, prompts: float, length: float) -> float:
        """Prompts of one data rank, stage after stage (the in-process engine pipelines nothing)."""
        stages = self.parallel.pipeline_model_parallel_size
        return stages * self._layers_seconds(prompts * length, length / 2, 1)

    def decode_seconds(self, rows: float, prompt: float, response: float) -> float:
        """A batch of ``rows`` on one data rank, ``response`` tokens each, all rows to the end.

        Per token the larger of products and reading of weights; keys and values are read beside them.
        """
        part, spec, size = self.part, self.spec, self.build.bytes_per_value
        weights = part.parameters - (part.vocabulary * spec.hidden_size if part.is_first and not part.ties_here else 0)
        if spec.num_experts:  # experts that no row chose are not read
            reached = 1 - (1 - spec.num_experts_per_tok / spec.num_experts) ** max(rows, 1)
            experts = sum(count for count, expert in part.tensors() if expert)
            weights -= experts * (1 - reached)
        products = part.num_layers * part.layer_flops(rows, 0) + part.output_flops(rows)
        base = max(weights * size / self.machine.memory_rate, products / self.machine.flops)
        cached = 2 * rows * (prompt + response / 2) * part.kv * size * part.num_layers
        each = base + cached / self.machine.memory_rate
        each += total_seconds(self.decode_traffic(rows, 1), self.machine)
        stages = self.parallel.pipeline_model_parallel_size
        return response * stages * each
