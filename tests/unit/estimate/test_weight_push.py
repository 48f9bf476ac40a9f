"""Bytes and seconds of a push of weights: by one rank of every machine, and how long each transport takes."""

import pytest

from megatron_s2d.config.hardware import AssumptionsConfig, gpu_of
from megatron_s2d.config.lora import LoraConfig, num_adapter_values
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.estimate.roofline import Machine
from megatron_s2d.estimate.weight_push import weight_push

SPEC = ModelConfig(preset="llama-3.3-70b").resolve()
SIZE = 2 * SPEC.num_parameters
MACHINE = Machine(gpu_of("h200"), AssumptionsConfig(link_efficiency=1.0, network_bandwidth=50e9, file_bandwidth=2e9))
PARALLEL = ParallelConfig(
    tensor_model_parallel_size=8, pipeline_model_parallel_size=4, data_parallel_size=32, sequence_parallel=True
)


def push(transport: str, parallel: ParallelConfig = PARALLEL, **options):
    return weight_push(SPEC, parallel, transport, 2, 512 << 20, MACHINE, **options)


def test_files_are_written_in_parts_by_one_rank_of_each_of_128_machines():
    result = push("disk")
    assert result.num_senders == 128 and result.bytes_written == SIZE / 128 and result.sent.bytes_sent == 0
    files = (SIZE / 128 + SIZE) / 2e9
    assert result.seconds(MACHINE) == pytest.approx(files + result.gathered.seconds(MACHINE))


def test_each_sender_sends_all_weights_to_its_own_servers():
    result = push("distributed")
    assert result.num_senders == 128 and result.sent.bytes_sent == SIZE and result.bytes_written == 0
    assert result.sent.seconds(MACHINE) == pytest.approx(SIZE / 50e9, rel=0.01)
    assert result.gathered.bytes_sent == SIZE * (7 / 8 + 1)


def test_an_adapter_is_a_file_of_one_sender():
    lora = LoraConfig(rank=16)
    result = push("adapter", lora=lora)
    assert result.num_senders == 1 and result.sent.bytes_sent == 0
    assert result.bytes_written == result.bytes_read == 2 * num_adapter_values(SPEC, lora) < SIZE / 100
    assert push("disk", lora=lora) == push("disk")  # merged weights


def test_rank_0_alone_sends_to_servers_of_its_machine_over_its_faster_links():
    small = ParallelConfig(tensor_model_parallel_size=8, sequence_parallel=True)
    local = push("distributed", small, is_local=True)
    assert local.num_senders == 1 and local.seconds(MACHINE) < push("distributed").seconds(MACHINE) / 5
