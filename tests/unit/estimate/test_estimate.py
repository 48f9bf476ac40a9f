"""Memory estimates against torch: parameters and saved tensors of models that are built, and numbers worked by hand."""

import numpy as np
import pytest
import torch

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import OptimizerConfig, RolloutConfig, SamplingConfig
from megatron_s2d.estimate.layers import Build, MicroBatch, Part, parts
from megatron_s2d.estimate.memory import (
    StageMemory,
    TeacherInputs,
    Workload,
    frozen,
    generate_phases,
    output_workspace,
    train_phase,
    trained,
    workload,
)
from megatron_s2d.objectives.distill import sft_objective
from megatron_s2d.parallel.layout import build_layout, initialize_distributed
from megatron_s2d.records import Sample
from megatron_s2d.train.megatron_model import MegatronModel

# Every width differs from every other, so a term that is left out or counted twice shows.
SIZES = {
    "hidden_size": 64, "ffn_hidden_size": 208, "num_attention_heads": 6, "num_query_groups": 2, "head_dim": 20,
    "vocab_size": 40, "max_position_embeddings": 64, "rope_theta": 1e4,
}  # fmt: skip
ROWS, LENGTH = 4, 32
FAMILIES = {
    "qwen3": {},
    "llama": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_ffn_hidden_size": 88},
}


def model(family: str, num_layers: int, **fields) -> ModelConfig:
    return ModelConfig(family=family, num_layers=num_layers, **(SIZES | FAMILIES[family] | fields))


@pytest.fixture(scope="module")
def layout():
    initialize_distributed()
    return build_layout(ParallelConfig())


def policy(layout, family: str, precision: str, num_layers: int) -> MegatronModel:
    spec = model(family, num_layers).resolve()
    return MegatronModel(spec, layout, precision=precision, max_tokens=10**6, seed=1)


def saved_bytes(trained_policy: MegatronModel) -> int:
    """Bytes of the distinct storages that autograd saves in one forward pass, parameters left out."""
    rng = np.random.default_rng(0)
    samples = [
        Sample(
            id=str(i), prompt_id=str(i), group_id=str(i), domain="test", seed=i, token_ids=rng.integers(0, 40, LENGTH),
            response_mask=np.arange(LENGTH) >= 8, temperature=1.0, finish_reason="stop",
        )
        for i in range(ROWS)
    ]  # fmt: skip
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    batches = trained_policy.pack(samples, {"supervised_weight": [0.01] * ROWS})
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trained_policy.forward_backward(batches, sft_objective(), num_tokens=ROWS * LENGTH)
    own = {parameter.untyped_storage().data_ptr() for parameter in trained_policy.chunks[0].parameters()}
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for pointer, size in found.items() if pointer not in own)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_layer_keeps_is_what_autograd_saves(layout, family, precision):
    saved = []
    for num_layers in (1, 2):
        built = policy(layout, family, precision, num_layers)
        built.prepare_training(OptimizerConfig(), 1)
        saved.append(saved_bytes(built))
    part = Part(model(family, 2).resolve(), ParallelConfig(), 0)
    build = Build(4 if precision == "float32" else 2, fused=False)
    batch = MicroBatch(ROWS * LENGTH, LENGTH, ROWS * 24)
    assert part.kept_by_layer(build, batch) == pytest.approx(saved[1] - saved[0], rel=1e-3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model_that_is_built(layout, family, tied):
    spec = model(family, 2, tie_word_embeddings=tied).resolve()
    built = MegatronModel(spec, layout, precision="float32", max_tokens=64, seed=1)
    counts = sorted(parameter.numel() for parameter in built.chunks[0].parameters())
    part = Part(spec, ParallelConfig(), 0)
    assert sorted(count for count, _ in part.tensors()) == counts
    assert part.parameters == sum(counts)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradients_and_optimizer_are_megatrons(layout, precision):
    built = policy(layout, "qwen3_moe", precision, 2)
    built.prepare_training(OptimizerConfig(), 1)
    buffers = built.trainable.chunks[0].buffers
    held = trained(Part(built.spec, ParallelConfig(), 0), Build(4 if precision == "float32" else 2, fused=False))
    assert held.gradients == sum(buffer.grad_data.nbytes for buffer in buffers)
    assert held.weights == sum(buffer.param_data.nbytes for buffer in buffers)
    count = sum(parameter.numel() for parameter in built.chunks[0].parameters())
    per_parameter = 8 if precision == "float32" else 12  # two moments, and a float32 master of bfloat16
    assert held.optimizer == pytest.approx(per_parameter * count, rel=0.02)


def test_published_sizes_add_up_over_ranks():
    """Over all ranks of a layout without replicas: every parameter once, norms and routers on each tensor rank."""
    spec = ModelConfig(preset="llama-3.3-70b").resolve()
    cut = ParallelConfig(tensor_model_parallel_size=8, pipeline_model_parallel_size=4, sequence_parallel=True)
    norms = spec.hidden_size * (2 * spec.num_layers + 1)
    assert 8 * sum(part.parameters for part in parts(spec, cut)) == spec.num_parameters + 7 * norms
    moe = ModelConfig(preset="qwen3-30b-a3b").resolve()
    spread = ParallelConfig(expert_model_parallel_size=8, data_parallel_size=8)
    part = Part(moe, spread, 0)
    experts = 3 * 2048 * 768 * 128 * 48
    assert sum(count for count, expert in part.tensors() if expert) == experts // 8
    assert part.parameters == moe.num_parameters - experts + experts // 8
    # Dense parameters are shared by all eight data ranks, each expert has one rank: its state is not cut.
    assert [ranks for _, ranks in part.buffers()] == [8, 1]


def test_fused_layers_by_hand():
    """Llama 3.1 8B in bfloat16, one token of one layer, in values: 4 of the hidden size (two norms, in and out), 4 of
    the queries' with 4 of the keys' less the normalised ones a Llama has not, 3 of the MLP's."""
    spec = ModelConfig(preset="llama-3.1-8b").resolve()
    part = Part(spec, ParallelConfig(), 0)
    values = 4 * 4096 + (4096 + 2 * 1024) + (4096 + 1024 + 4096) + 3 * 14336
    found = part.kept_by_layer(Build(2, fused=True), MicroBatch(1000, 1000, 1000))
    assert found == 1000 * (2 * values + 4 * 2 + 4 * 32)


def test_sequence_parallelism_cuts_norms_and_tensor_parallelism_the_rest():
    spec = ModelConfig(preset="llama-3.1-8b").resolve()
    batch, build = MicroBatch(4096, 4096, 4096), Build(2, fused=True)
    whole = Part(spec, ParallelConfig(), 0).kept_by_layer(build, batch)
    cut = ParallelConfig(tensor_model_parallel_size=8, sequence_parallel=True)
    assert Part(spec, cut, 0).kept_by_layer(build, batch) == pytest.approx(whole / 8)


def test_recomputation_of_whole_layers_keeps_their_inputs():
    spec = ModelConfig(preset="llama-3.1-8b").resolve()
    part, batch = Part(spec, ParallelConfig(), 0), MicroBatch(4096, 4096, 4096)
    ids = 8 * batch.tokens
    assert part.kept(Build(2, fused=True, recompute="full"), batch) == ids + 32 * batch.tokens * 4096 * 2
    work = Workload(batch, 1)
    full = train_phase(part, Build(2, True, "full"), work, on_gpu=True)["activations"]
    none = train_phase(part, Build(2, True, "none"), work, on_gpu=True)["activations"]
    assert full < none / 5


def test_earlier_pipeline_stages_hold_more_micro_batches():
    spec = ModelConfig(preset="llama-3.1-8b").resolve()
    cut = ParallelConfig(pipeline_model_parallel_size=4)
    work = Workload(MicroBatch(4096, 4096, 4096), 8)
    first, second, *_ = parts(spec, cut)
    build = Build(2, fused=True)
    difference = train_phase(first, build, work, on_gpu=True)["activations"]
    difference -= train_phase(second, build, work, on_gpu=True)["activations"]
    ids = 4 * 8 * 4096  # of the first stage's four micro-batches
    assert difference == second.kept(build, work.batch) + ids
    few = Workload(work.batch, 2)
    assert train_phase(first, build, few, on_gpu=True)["activations"] < first.kept(build, work.batch) * 3


def test_the_loss_by_hand():
    """128,256 columns in bfloat16 on a GPU, 1,024 tokens with a dense teacher: one chunk of both sides' logits."""
    spec = ModelConfig(preset="llama-3.1-8b").resolve()
    part, batch = Part(spec, ParallelConfig(), 0), MicroBatch(2048, 2048, 1024)
    teacher = TeacherInputs("hidden", ModelConfig(preset="llama-3.3-70b").resolve())
    rows = 1024 * 2**20 // (4 * 128256 * 2) // 128 * 128  # of a chunk
    expected = 2 * rows * 128256 * 4 + 2 * 1024 * (4096 + 8192)  # logits, operands
    expected += 2 * 4096 * (1024 + 2048) + 4 * 128256 * 4096  # gradients of hidden states and weight
    expected += 2 * 1024 * 128256  # gradients by logits
    assert output_workspace(part, Build(2, fused=True), batch, on_gpu=True, teacher=teacher) == expected


def test_teacher_states_wait_in_host_memory():
    spec = ModelConfig(preset="llama-3.1-8b").resolve()
    large = ModelConfig(preset="llama-3.3-70b").resolve()
    part, build = Part(spec, ParallelConfig(), 0), Build(2, fused=True)
    work = workload(64, 4096, 3072, max_tokens=8192, parallel=ParallelConfig(data_parallel_size=2))
    assert work == Workload(MicroBatch(8192, 4096, 6144), 16)
    teacher = TeacherInputs("hidden", large)
    assert train_phase(part, build, work, on_gpu=True, teacher=teacher)["teacher states"] == 0
    # A CPU computes in that memory: the responses of the whole update, shared by tensor ranks.
    assert train_phase(part, build, work, on_gpu=False, teacher=teacher)["teacher states"] == 32 * 3072 * 8192 * 2
    half = Part(spec, ParallelConfig(tensor_model_parallel_size=2), 0)
    assert train_phase(half, build, work, on_gpu=False, teacher=teacher)["teacher states"] == 16 * 3072 * 8192 * 2


def test_keys_and_values_by_hand():
    spec = ModelConfig(preset="llama-3.1-8b").resolve()
    part = Part(spec, ParallelConfig(tensor_model_parallel_size=2), 0)
    found = generate_phases(
        part, Build(2, fused=True), requests=512, prompts=64, prompt_length=1024,
        sampling=SamplingConfig(max_response_length=1024), rollout=RolloutConfig(max_batch_tokens=65536),
    )  # fmt: skip
    rows, column = 65536 // 2048, 2 * 4 * 128 * 2  # keys and values of four heads
    assert found["decode"]["KV cache"] == rows * column * (32 * 2048 + 1024)
    assert found["prefill"]["KV cache"] == rows * 1024 * column * 32


def test_heads_that_ranks_share_are_held_by_each():
    spec = ModelConfig(preset="qwen3-30b-a3b").resolve()  # four key heads
    cut = ParallelConfig(tensor_model_parallel_size=8, sequence_parallel=True)
    assert Part(spec, cut, 0).kv == 128


def test_a_peak_is_what_is_held_and_the_fullest_phase():
    held = frozen(Part(model("qwen3", 2).resolve(), ParallelConfig(), 0), Build(4, fused=False), "teacher")
    memory = StageMemory(0, (held,), {"train": {"a": 5, "b": 6}, "decode": {"c": 10}})
    assert memory.peak_phase == "train" and memory.total == held.weights + 11
