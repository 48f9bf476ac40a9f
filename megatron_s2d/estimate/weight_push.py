"""Bytes and seconds of a push of weights to servers, by transport. No torch here.

One rank of every machine sends (``rollout/served/senders.py``), and rank 0 alone to servers of its own machine. Full
tensors are gathered over tensor- and pipeline-parallel ranks first, bucket by bucket. A server's ranks all receive full
tensors, each of which keeps its shard.
"""

from __future__ import annotations

import dataclasses

from megatron_s2d.arithmetic import ceil_div
from megatron_s2d.config.lora import LoraConfig, num_adapter_values
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import is_loopback
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.estimate.roofline import Machine, Traffic
from megatron_s2d.estimate.stage_memory import BYTES_PER_VALUE


@dataclasses.dataclass(frozen=True)
class WeightPush:
    """One push of the weights of a model."""

    num_senders: int
    gathered: Traffic  # to a rank, from the others of its replica
    sent: Traffic  # by one sender: over its link, or through memory
    bytes_written: float  # by one sender, to files
    bytes_read: float  # of files, by each machine with servers
    file_bandwidth: float

    def seconds(self, machine: Machine) -> float:
        """Return the time; gathering, sending and files do not overlap."""
        files = (self.bytes_written + self.bytes_read) / self.file_bandwidth
        return self.gathered.seconds(machine) + self.sent.seconds(machine) + files


def weight_push(
    spec: ModelSpec,
    parallel: ParallelConfig,
    transport: str,
    bytes_per_value: int,
    bucket_bytes: int,
    machine: Machine,
    *,
    is_local: bool = False,
    lora: LoraConfig | None = None,
) -> WeightPush:
    """Return the push of ``spec`` from ranks at ``parallel``.

    transport: ``rollout.sglang.weight_sync``, or adapter, as files that one sender writes. is_local: to servers of rank
    0's machine. lora: of the adapter, for transport adapter.
    """
    tp_size, pp_size = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    adapter = lora if transport == "adapter" else None
    size = bytes_per_value * (spec.num_parameters if adapter is None else num_adapter_values(spec, adapter))
    machines = ceil_div(parallel.world_size, machine.assumptions.gpus_per_node)
    senders = 1 if is_local or adapter else machines
    buckets = ceil_div(size, bucket_bytes)
    span = parallel.world_size if pp_size > 1 else tp_size
    gathered = Traffic(
        size * ((tp_size - 1) / tp_size + (pp_size > 1)), buckets * ((tp_size > 1) + (pp_size > 1)), span
    )
    uses_files = transport in ("disk", "adapter")
    return WeightPush(
        senders,
        gathered,
        Traffic(0.0 if uses_files else size, 0 if uses_files else buckets, 1 if is_local else parallel.world_size),
        size / senders if uses_files else 0.0,
        size if uses_files else 0.0,
        machine.assumptions.file_bandwidth,
    )


def stage_push(config: WorkflowConfig, name: str, spec: ModelSpec, machine: Machine) -> WeightPush:
    """Return the push of the model of stage ``name`` after every step."""
    sglang, model, lora = config.rollout.sglang, config.model_of(name), getattr(config.stages[name], "lora", None)
    urls = sglang.urls.get(model, ())
    return weight_push(
        spec,
        config.parallel,
        sglang.transport_of(lora is not None),
        BYTES_PER_VALUE[config.precision],
        sglang.bucket_bytes,
        machine,
        is_local=not urls or any(map(is_loopback, urls)),
        lora=lora,
    )
