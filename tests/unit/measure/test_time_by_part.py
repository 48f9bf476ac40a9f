"""Least times by hand: operations at the peak, bytes at the bandwidths, launches at their cost."""

import dataclasses

import pytest

from megatron_s2d.config.hardware import GPUS, AssumptionsConfig
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.estimate.layers import MicroBatchShape
from megatron_s2d.estimate.memory import Workload
from megatron_s2d.estimate.roofline import Machine
from megatron_s2d.measure.measurement import Measurement, PhaseCall
from megatron_s2d.measure.stub import Collective, Product
from megatron_s2d.measure.time_by_part import Model, phase_time

MACHINE = Machine(GPUS["h100"], AssumptionsConfig(network_bandwidth=50e9, launch_seconds=5e-6))
SPEC = ModelConfig(preset="llama-3.1-8b").resolve()
PARALLEL = ParallelConfig(tensor_model_parallel_size=8, data_parallel_size=8, sequence_parallel=True)
WORK = Workload(MicroBatchShape(16384, 8192, 16384), 8)
GATHER = Collective("AllGather", 8, "bf16", 10, 9 * 10**9)
REDUCE = Collective("ReduceScatter", 8, "f32", 2, 4 * 10**9)


def call(phase: str, **changes) -> PhaseCall:
    """Two of the update's eight micro-batches."""
    product = Product("GemmEx", 4096, 8192, 4096, "bf16", "bf16", "bf16", "f32", False, 1, 10)
    values = PhaseCall(
        phase, 1, 0, 0, 0, 0, 2, {"k": 1000}, {}, (product,), (GATHER, REDUCE), (REDUCE,), (), {"add": 67 * 10**9}
    )
    return dataclasses.replace(values, **changes)


def seconds(time) -> dict[str, float]:
    return {part.name: part.seconds for part in time.parts}


def test_parts_of_training_by_hand():
    time = phase_time(call("train"), [REDUCE], Model(SPEC, PARALLEL, 0, recomputed=1.0), WORK, MACHINE)
    parts = seconds(time)
    assert parts["matrix products"] == pytest.approx(4 * 10 * 2 * 4096 * 8192 * 4096 / 989e12)
    forward = 4 * 16384 * 4096 / 8 * 8192 / 2 * 32  # two products of queries, a half of the positions
    assert parts["attention"] == pytest.approx(8 * forward * (1 + 2.5 + 1) / 989e12)
    assert parts["other PyTorch kernels"] == pytest.approx(4 * 67 / 3350)
    assert parts["tensor traffic"] == pytest.approx(4 * 9e9 * 7 / 8 / 450e9)  # within a node
    # Over the network, once in an update, and hidden.
    assert parts["gradients traffic, overlapped"] == pytest.approx(4e9 * 7 / 8 / 50e9)
    assert time.host_seconds == pytest.approx(4 * 1000 * 5e-6)
    assert time.device_seconds == pytest.approx(sum(parts.values()) - parts["gradients traffic, overlapped"])
    assert time.seconds == max(time.device_seconds, time.host_seconds)


def test_logits_are_counted_where_a_chunk_has_as_many_tokens_as_hidden_states_have_channels():
    logits = Product("GemmEx", 16032, 4096, 4096, "bf16", "bf16", "f32", "f32", False, 1, 2)
    gradient = dataclasses.replace(logits, m=4096, n=16032)
    time = phase_time(call("train", products=(logits, gradient)), (), Model(SPEC, PARALLEL, 0), WORK, MACHINE)
    assert seconds(time)["divergence kernels"] == pytest.approx(4 * 2 * 16032 * 4096 * (2 * 4 + 2) / 3.35e12)


def test_slow_launches_a_pipeline_and_products_of_few_rows_take_longer():
    slow = phase_time(call("train", launches={"k": 10**6}), (), Model(SPEC, PARALLEL, 0), WORK, MACHINE)
    assert slow.seconds == slow.host_seconds == pytest.approx(20)
    sizes = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4, "data_parallel_size": 2}
    piped = phase_time(call("teacher"), (), Model(SPEC, ParallelConfig(**sizes), 3), WORK, MACHINE)
    virtual = ParallelConfig(**sizes, virtual_pipeline_model_parallel_size=2)
    half = phase_time(call("teacher"), (), Model(SPEC, virtual, 3), WORK, MACHINE)
    assert piped.idle_seconds == pytest.approx(3 / 8 * (piped.seconds - piped.idle_seconds))
    assert half.idle_seconds == pytest.approx(piped.idle_seconds / 2)
    row = Product("GemmEx", 4096, 1, 4096, "bf16", "bf16", "bf16", "f32", False, 1, 1)
    decoded = phase_time(call("score", products=(row,), micro_batches=8), (), Model(SPEC, PARALLEL, 0), WORK, MACHINE)
    assert seconds(decoded)["matrix products"] == pytest.approx(2 * (4096 * 4096 + 2 * 4096) / 3.35e12)


def test_gathers_of_weights_that_a_later_call_waits_for_belong_to_the_update():
    gather = dataclasses.replace(GATHER, begun_before=True)
    update = call("update", micro_batches=0, overlapped=(), collectives=(GATHER,))
    calls = (update, call("train", overlapped=(gather, REDUCE)), update)
    measured = Measurement("opd", 0, 64, {"pp": 0}, 5, 99, False, calls)
    assert measured.overlapped("train") == (REDUCE,) and measured.overlapped("update") == (gather,)
    hidden = seconds(phase_time(update, measured.overlapped("update"), Model(SPEC, PARALLEL, 0), WORK, MACHINE))
    assert hidden["weights traffic, overlapped"] == pytest.approx(9e9 * 7 / 8 / 50e9)
    assert "weights traffic" not in hidden
    assert "weights traffic" in seconds(phase_time(update, (), Model(SPEC, PARALLEL, 0), WORK, MACHINE))
