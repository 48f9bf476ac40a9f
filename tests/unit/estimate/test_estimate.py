"""Memory estimates against torch: parameters and saved tensors of models that are built, and numbers worked by hand."""

import numpy as np
import pytest
import torch

from megatron_s2d.config.base import parse
from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.recompute import Recompute
from megatron_s2d.config.training import CheckpointConfig, OptimizerConfig, RolloutConfig, SamplingConfig
from megatron_s2d.estimate.host_copies import packed_weight_bytes, save_phase
from megatron_s2d.estimate.layers import Build, MicroBatchShape, ModelShard, pipeline_shards
from megatron_s2d.estimate.memory import (
    StageMemory,
    TeacherInputs,
    Workload,
    export_phase,
    frozen_memory,
    generate_phases,
    output_workspace,
    train_phase,
    trained_memory,
    update_phase,
    workload,
)
from megatron_s2d.estimate.optimizer_peak import prepare_training_peak
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
    saved = []

    def record(tensor):
        saved.append(tensor)
        return tensor

    batches = trained_policy.pack(samples, {"supervised_weight": [0.01] * ROWS})
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        trained_policy.forward_backward(batches, sft_objective(), num_tokens=ROWS * LENGTH)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in trained_policy.chunks[0].parameters()}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_activation_bytes_equal_what_autograd_saves(layout, family, precision):
    saved = []
    for num_layers in (1, 2):
        built = policy(layout, family, precision, num_layers)
        built.prepare_training(OptimizerConfig(), 1)
        saved.append(saved_bytes(built))
    shard = ModelShard(model(family, 2).resolve(), ParallelConfig(), 0)
    build = Build(4 if precision == "float32" else 2, fused=False)
    batch = MicroBatchShape(ROWS * LENGTH, LENGTH, ROWS * 24)
    assert shard.layer_activation_bytes(build, batch) == pytest.approx(saved[1] - saved[0], rel=1e-3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_sizes_equal_those_of_the_built_model(layout, family, tied):
    spec = model(family, 2, tie_word_embeddings=tied).resolve()
    built = MegatronModel(spec, layout, precision="float32", max_tokens=64, seed=1)
    counts = sorted(parameter.numel() for parameter in built.chunks[0].parameters())
    shard = ModelShard(spec, ParallelConfig(), 0)
    assert sorted(count for count, _ in shard.parameter_sizes()) == counts
    assert shard.num_parameters == sum(counts)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradient_and_optimizer_bytes_equal_megatrons(layout, precision):
    built = policy(layout, "qwen3_moe", precision, 2)
    built.prepare_training(OptimizerConfig(), 1)
    buffers = built.trainable.chunks[0].buffers
    memory = trained_memory(
        ModelShard(built.spec, ParallelConfig(), 0), Build(4 if precision == "float32" else 2, fused=False)
    )
    assert memory.gradients == sum(buffer.grad_data.nbytes for buffer in buffers)
    assert memory.weights == sum(buffer.param_data.nbytes for buffer in buffers)
    count = sum(parameter.numel() for parameter in built.chunks[0].parameters())
    per_parameter = 8 if precision == "float32" else 12  # two moments, and a float32 master of bfloat16
    assert memory.optimizer == pytest.approx(per_parameter * count, rel=0.02)


def test_parameters_of_all_ranks_add_up_to_the_published_size():
    """Over all ranks of a layout without replicas: every parameter once, norms and routers on each tensor rank."""
    spec = ModelConfig(preset="llama-3.3-70b").resolve()
    cut = ParallelConfig(tensor_model_parallel_size=8, pipeline_model_parallel_size=4, sequence_parallel=True)
    norms = spec.hidden_size * (2 * spec.num_layers + 1)
    assert 8 * sum(shard.num_parameters for shard in pipeline_shards(spec, cut)) == spec.num_parameters + 7 * norms
    moe = ModelConfig(preset="qwen3-30b-a3b").resolve()
    spread = ParallelConfig(expert_model_parallel_size=8, data_parallel_size=8)
    shard = ModelShard(moe, spread, 0)
    experts = 3 * 2048 * 768 * 128 * 48
    assert sum(count for count, expert in shard.parameter_sizes() if expert) == experts // 8
    assert shard.num_parameters == moe.num_parameters - experts + experts // 8
    # Dense parameters are shared by all eight data ranks, each expert has one rank: its state is not cut.
    assert [ranks for _, ranks in shard.gradient_buffers()] == [8, 1]


def test_fused_layer_activations_by_hand():
    """Llama 3.1 8B in bfloat16, one token of one layer, in values: 4 of the hidden size (two norms, in and out), 4 of
    the queries' with 4 of the keys' less the normalised ones a Llama has not, 3 of the MLP's."""
    spec = ModelConfig(preset="llama-3.1-8b").resolve()
    shard = ModelShard(spec, ParallelConfig(), 0)
    values = 4 * 4096 + (4096 + 2 * 1024) + (4096 + 1024 + 4096) + 3 * 14336
    saved = shard.layer_activation_bytes(Build(2, fused=True), MicroBatchShape(1000, 1000, 1000))
    assert saved == 1000 * (2 * values + 4 * 2 + 4 * 32)


def test_activations_on_a_gpu_without_transformer_engine_by_hand():
    """Qwen3 0.6B, one packed token of one layer, in values: norms and residuals 4 of the hidden size; queries, keys and
    values, the normalised queries, rotated queries and keys, the attention's output; 5 of the MLP's; four rows of sine
    and cosine. In float32: a number for each norm's row (two, and one a head), and one a head of the softmax."""
    spec = ModelConfig(preset="qwen3-0.6b").resolve()
    values = 4 * 1024 + (2048 + 2 * 1024) + 2048 + (2048 + 1024) + 2048 + 5 * 3072
    saved = 1000 * (2 * values + 4 * (2 + 16 + 8 + 16))
    table = 4 * 128 * 2
    build, shard = Build(2, fused=False, on_gpu=True), ModelShard(spec, ParallelConfig(), 0)
    assert shard.layer_activation_bytes(build, MicroBatchShape(1000, 500, 1000)) == saved + 500 * table
    packed = MicroBatchShape(1000, 500, 1000, packed=True)
    assert shard.layer_activation_bytes(build, packed) == saved + 1000 * table
    # Two context ranks: keys and values of both, repeated for the queries' heads, and a mask of 500 keys; the output
    # of all sequences, joined, instead of this rank's rotated keys.
    across = ModelShard(spec, ParallelConfig(context_parallel_size=2), 0)
    added = 2 * (2 * 2 * 2048) + 2 * 500 + 2 * (2048 - 1024)
    assert across.layer_activation_bytes(build, packed) == saved + 1000 * (table + added)


def test_activations_of_attention_with_a_mask_by_hand():
    """On a GPU, in values of one token: what recomputing the attention leaves out."""

    def saved(preset: str, packed: bool) -> int:
        shard = ModelShard(ModelConfig(preset=preset, vocab_size=64).resolve(), ParallelConfig(), 0)
        builds = [Build(2, fused=False, on_gpu=True, recompute=Recompute(kind)) for kind in ("none", "selective")]
        kept, recomputed = (
            shard.layer_activation_bytes(build, MicroBatchShape(1000, 500, 1000, packed)) for build in builds
        )
        return kept - recomputed - 1000 * 4 * 4  # a number for each of four heads

    # Sinks: four tensors of all heads with 8 more channels instead of the product, keys, queries and output, which are
    # 64 + 2 * 32, 32, 64 and 64, beside an output without these channels; a mask of 500 keys.
    assert saved("tiny-gpt-oss", packed=True) == 2 * 1000 * (4 * (64 + 4 * 8) + 64 - (128 + 32 + 64 + 64) + 500)
    # A window in one of two layers: keys and values for each of the queries' heads, instead of keys; two sequences
    # share a mask. The product is kept for the norm of queries and keys.
    assert saved("tiny-gemma3", packed=False) == 2 * 1000 * (2 * 96 - 48 + 500 // 2) // 2
    assert saved("tiny-gemma3", packed=True) == 0


def test_making_the_optimizer_holds_the_weights_twice():
    spec = ModelConfig(preset="llama-3.1-8b").resolve()
    spread, build = ParallelConfig(data_parallel_size=8), Build(2, fused=True)
    assert prepare_training_peak(ModelShard(spec, spread, 0), build) == pytest.approx(8 * spec.num_parameters, rel=1e-3)
    # One data rank: masters of all parameters, beside a copy of the largest one.
    alone = 10 * spec.num_parameters + 2 * 128256 * 4096
    assert prepare_training_peak(ModelShard(spec, ParallelConfig(), 0), build) == pytest.approx(alone, rel=1e-3)
    in_fp8 = prepare_training_peak(ModelShard(spec, ParallelConfig(), 0), build, fp8_parameters=True)
    assert in_fp8 == pytest.approx(10 * spec.num_parameters, rel=5e-3)
    # The last stage makes the master of the output layer first, and of every layer a smaller one.
    last = ModelShard(spec, ParallelConfig(pipeline_model_parallel_size=2), 1)
    assert prepare_training_peak(last, build) == pytest.approx(10 * last.num_parameters, rel=5e-3)


def test_making_the_optimizer_follows_the_buckets_of_the_gradient_buffer():
    """Two data ranks: without overlapped reductions the second one has the embedding, with them each has half of it."""
    spec = ModelConfig(preset="qwen3-0.6b", tie_word_embeddings=True).resolve()
    build, embedding = Build(2, fused=True), 151936 * 1024
    whole = ParallelConfig(data_parallel_size=2, overlap_grad_reduce=False)
    peaks = [prepare_training_peak(ModelShard(spec, whole, 0), build, stage_rank=rank) for rank in (0, 1)]
    halves = 6 * spec.num_parameters + 2 * spec.num_parameters
    assert peaks[0] == pytest.approx(halves, rel=1e-2)
    assert peaks[1] == pytest.approx(halves + 2 * embedding, rel=1e-2)
    cut = ModelShard(spec, ParallelConfig(data_parallel_size=2), 0)
    assert prepare_training_peak(cut, build) == pytest.approx(halves + embedding, rel=1e-2)


def test_an_update_without_transformer_engine_holds_one_more_float32_copy():
    shard = ModelShard(ModelConfig(preset="llama-3.1-8b").resolve(), ParallelConfig(data_parallel_size=8), 0)
    assert update_phase(shard, Build(2, fused=True, on_gpu=True), on_gpu=True) == {}
    (added,) = update_phase(shard, Build(2, fused=False, on_gpu=True), on_gpu=True).values()
    assert added == pytest.approx(4 * shard.num_parameters / 8, rel=1e-3)


def test_an_export_holds_gathered_and_joined_tensors_beside_the_bucket_before():
    spec = ModelConfig(preset="llama-3.1-8b").resolve()
    shard = ModelShard(spec, ParallelConfig(tensor_model_parallel_size=4, data_parallel_size=2), 0)
    embedding, norm = 2 * 128256 * 4096, 2 * 4096
    assert sum(export_phase(shard, Build(2, fused=True), 1 << 20).values()) == norm + 2 * embedding
    # One tensor rank: the embedding is not joined, and is held beside the norms of the first layer.
    alone = ModelShard(spec, ParallelConfig(), 0)
    assert sum(export_phase(alone, Build(2, fused=True), 1 << 20).values()) == embedding + 2 * 2 * norm


def test_tensor_and_sequence_parallelism_divide_all_activations():
    spec = ModelConfig(preset="llama-3.1-8b").resolve()
    batch, build = MicroBatchShape(4096, 4096, 4096), Build(2, fused=True)
    unsharded = ModelShard(spec, ParallelConfig(), 0).layer_activation_bytes(build, batch)
    cut = ParallelConfig(tensor_model_parallel_size=8, sequence_parallel=True)
    assert ModelShard(spec, cut, 0).layer_activation_bytes(build, batch) == pytest.approx(unsharded / 8)


def test_full_recompute_saves_layer_inputs_only():
    spec = ModelConfig(preset="llama-3.1-8b").resolve()
    shard, batch = ModelShard(spec, ParallelConfig(), 0), MicroBatchShape(4096, 4096, 4096)
    ids = 8 * batch.tokens
    assert (
        shard.activation_bytes(Build(2, fused=True, recompute=Recompute("full")), batch)
        == ids + 32 * batch.tokens * 4096 * 2
    )
    work = Workload(batch, 1)
    full = train_phase(shard, Build(2, True, Recompute("full")), work, on_gpu=True)["activations"]
    none = train_phase(shard, Build(2, True), work, on_gpu=True)["activations"]
    assert full < none / 5


def test_recomputed_units_blocks_and_modules_save_less():
    spec = ModelConfig(preset="llama-3.1-8b").resolve()
    shard, batch = ModelShard(spec, ParallelConfig(), 0), MicroBatchShape(4096, 4096, 4096)
    layer, inputs, ids = shard.layer_activation_bytes(Build(2, True), batch), 2 * 4096 * 4096, 8 * 4096

    def saved(recompute: Recompute) -> tuple[int, int]:
        build = Build(2, True, recompute)
        return shard.activation_bytes(build, batch) - ids, shard.recomputed_bytes(build, batch)

    assert saved(Recompute("full", num_layers=4)) == (8 * inputs, 4 * layer)
    assert saved(Recompute("full", method="block", num_layers=10)) == (10 * inputs + 22 * layer, 0)
    assert saved(Recompute("full", method="block", num_layers=32)) == (32 * inputs, layer)
    feed_forward = 4096 * 2 * 3 * spec.ffn_hidden_size
    assert saved(Recompute("selective", ("mlp",))) == (32 * (layer - feed_forward), feed_forward)
    shares = [shard.recomputed_share(Build(2, True, Recompute("full", method="block", num_layers=8)))]
    shares += [shard.recomputed_share(Build(2, True, Recompute(name))) for name in ("none", "selective", "full")]
    assert shares == [0.25, 0, 0, 1]


def test_earlier_pipeline_ranks_save_more_micro_batches():
    spec = ModelConfig(preset="llama-3.1-8b").resolve()
    cut = ParallelConfig(pipeline_model_parallel_size=4)
    work = Workload(MicroBatchShape(4096, 4096, 4096), 8)
    first, second, *_ = pipeline_shards(spec, cut)
    build = Build(2, fused=True)
    difference = train_phase(first, build, work, on_gpu=True)["activations"]
    difference -= train_phase(second, build, work, on_gpu=True)["activations"]
    ids = 4 * 8 * 4096  # of the first stage's four micro-batches
    assert difference == second.activation_bytes(build, work.batch) + ids
    few = Workload(work.batch, 2)
    assert train_phase(first, build, few, on_gpu=True)["activations"] < first.activation_bytes(build, work.batch) * 3


def test_loss_workspace_by_hand():
    """128,256 columns in bfloat16 on a GPU, 1,024 tokens with a dense teacher: one chunk of both sides' logits."""
    spec = ModelConfig(preset="llama-3.1-8b").resolve()
    shard, batch = ModelShard(spec, ParallelConfig(), 0), MicroBatchShape(2048, 2048, 1024)
    teacher = TeacherInputs("hidden", ModelConfig(preset="llama-3.3-70b").resolve())
    rows = 1024 * 2**20 // (4 * 128256 * 2) // 128 * 128  # of a chunk
    expected = 2 * rows * 128256 * 4 + 2 * 1024 * (4096 + 8192)  # logits, operands
    expected += 2 * 4096 * (1024 + 2048) + 4 * 128256 * 4096  # gradients of hidden states and weight
    expected += 2 * 1024 * 128256  # gradients by logits
    assert output_workspace(shard, Build(2, fused=True), batch, on_gpu=True, teacher=teacher) == expected


def test_equal_lengths_leave_the_rest_of_a_micro_batch_empty():
    sizes = {"max_tokens": 8192, "parallel": ParallelConfig(data_parallel_size=2)}
    assert workload(64, 5000, 4000, **sizes) == Workload(MicroBatchShape(8192, 5000, 6554), 20)
    assert workload(64, 5000, 4000, **sizes, equal_lengths=True) == Workload(MicroBatchShape(5000, 5000, 4000), 32)
    split = {"max_tokens": 4096, "parallel": ParallelConfig(context_parallel_size=2), "equal_lengths": True}
    assert workload(64, 2000, 1000, **split) == Workload(MicroBatchShape(4000, 2000, 2000), 16)
    assert workload(3, 1000, 500, **split) == Workload(MicroBatchShape(1500, 1000, 750), 1)


def test_teacher_states_are_offloaded_to_host_memory():
    spec = ModelConfig(preset="llama-3.1-8b").resolve()
    large = ModelConfig(preset="llama-3.3-70b").resolve()
    shard, build = ModelShard(spec, ParallelConfig(), 0), Build(2, fused=True)
    work = workload(64, 4096, 3072, max_tokens=8192, parallel=ParallelConfig(data_parallel_size=2))
    assert work == Workload(MicroBatchShape(8192, 4096, 6144), 16)
    teacher = TeacherInputs("hidden", large)
    assert train_phase(shard, build, work, on_gpu=True, teacher=teacher)["teacher states"] == 0
    # A CPU computes in host memory: the responses of the full update, split over tensor ranks.
    assert train_phase(shard, build, work, on_gpu=False, teacher=teacher)["teacher states"] == 32 * 3072 * 8192 * 2
    half = ModelShard(spec, ParallelConfig(tensor_model_parallel_size=2), 0)
    assert train_phase(half, build, work, on_gpu=False, teacher=teacher)["teacher states"] == 16 * 3072 * 8192 * 2


def test_kv_cache_by_hand():
    spec = ModelConfig(preset="llama-3.1-8b").resolve()
    shard = ModelShard(spec, ParallelConfig(tensor_model_parallel_size=2), 0)
    phases = generate_phases(
        shard, Build(2, fused=True), requests=512, prompts=64, prompt_length=1024,
        sampling=SamplingConfig(max_response_length=1024), rollout=RolloutConfig(max_batch_tokens=65536),
    )  # fmt: skip
    rows, column = 65536 // 2048, 2 * 4 * 128 * 2  # keys and values of four heads
    assert phases["decode"]["KV cache"] == rows * column * (32 * 2048 + 1024)
    assert phases["prefill"]["KV cache"] == rows * 1024 * column * 32
    episodes = generate_phases(
        shard, Build(2, fused=True), requests=512, prompts=8, prompt_length=1024, turns=3,
        sampling=SamplingConfig(max_response_length=1024), rollout=RolloutConfig(max_batch_tokens=65536),
    )  # fmt: skip
    assert episodes["prefill"]["KV cache"] == rows * 2048 * column * 32  # all rows, with all that they have
    assert episodes["decode"] == phases["decode"]


def test_packed_weights_by_hand():
    spec = ModelConfig(preset="qwen3-0.6b").resolve()  # tied
    shard, build = ModelShard(spec, ParallelConfig(), 0), Build(4, fused=False)
    layer = 1024 * (2048 + 2 * 1024) + 2048 * 1024 + 3 * 3072 * 1024
    whole = 28 * layer + 151936 * 1024
    assert packed_weight_bytes(shard, build, 64) == 4 * whole
    phases = generate_phases(
        shard, build, requests=4, prompts=4, prompt_length=8, sampling=SamplingConfig(max_response_length=64),
        rollout=RolloutConfig(),
    )  # fmt: skip
    assert phases["prefill"]["packed weights"] == phases["decode"]["packed weights"] == 4 * whole
    assert packed_weight_bytes(shard, build, 8) == packed_weight_bytes(shard, Build(2, fused=False), 64) == 0
    assert packed_weight_bytes(shard, Build(4, fused=False, on_gpu=True), 64) == 0
    first, last = (ModelShard(spec, ParallelConfig(pipeline_model_parallel_size=2), rank) for rank in (0, 1))
    assert packed_weight_bytes(first, build, 64) == 4 * 14 * layer  # the embedding is looked up, the output multiplied
    assert packed_weight_bytes(last, build, 64) == 4 * (14 * layer + 151936 * 1024)


def test_saving_by_hand():
    spec = ModelConfig(preset="qwen3-0.6b").resolve()
    one, two = (ModelShard(spec, ParallelConfig(data_parallel_size=size), 0) for size in (1, 2))
    stage = parse(GrpoConfig, {"type": "grpo", "role": "s", "init": "a", "prompts": "p", "steps": 100}, "stages.s")
    final = stage.model_copy(update={"steps": 50})  # as many as from one checkpoint to the next
    asynchronous = stage.model_copy(update={"checkpoint": CheckpointConfig(async_save=True)})
    offloaded = stage.model_copy(update={"offload_optimizer": True})
    half, full = Build(2, fused=True, on_gpu=True), Build(4, fused=False)
    ((count, _),) = one.gradient_buffers()
    assert save_phase(one, full, stage, 7) == {"copies for the writer": 8 * count}
    assert save_phase(one, full, final, 7) == {"copies for the writer": 4 * count}
    assert save_phase(one, full, asynchronous, 7) == {"copies for the writer": 16 * count}
    assert save_phase(one, half, stage, 7) == save_phase(one, half, final, 7) == {}
    assert save_phase(one, half, offloaded, 7) == {"optimizer": 7}
    ((count, _),) = two.gradient_buffers()
    assert save_phase(two, half, stage, 7) == {"gathered state": 4 * count + 2 * count}
    assert save_phase(two, full, stage, 7)["gathered state"] == 3 * 6 * count + 8 * count


def test_shared_key_heads_are_replicated():
    spec = ModelConfig(preset="qwen3-30b-a3b").resolve()  # four key heads
    cut = ParallelConfig(tensor_model_parallel_size=8, sequence_parallel=True)
    assert ModelShard(spec, cut, 0).local_kv_dim == 128


def test_peak_is_resident_models_plus_the_fullest_phase():
    teacher = frozen_memory(
        ModelShard(model("qwen3", 2).resolve(), ParallelConfig(), 0), Build(4, fused=False), "teacher"
    )
    memory = StageMemory(0, (teacher,), {"train": {"a": 5, "b": 6}, "decode": {"c": 10}})
    assert memory.peak_phase == "train" and memory.total == teacher.weights + 11


@pytest.mark.parametrize(
    ("family", "difference"),
    [
        # Two norms and the activation lose a byte; the attention's output is saved in bfloat16 and in FP8.
        ("qwen3", -2 * 64 - 208 + 120),
        # The router reads its norm in bfloat16; of two experts, the sorted tokens and the activation.
        ("qwen3_moe", -64 - 2 * (64 + 88) + 120),
    ],
)
def test_inputs_of_products_are_saved_in_fp8(family, difference):
    shard = ModelShard(model(family, 1).resolve(), ParallelConfig(), 0)
    batch = MicroBatchShape(tokens=1000, seq_length=100, response_tokens=500)
    plain, fp8 = Build(2, fused=True), Build(2, fused=True, fp8_operands=True)
    assert shard.layer_activation_bytes(fp8, batch) - shard.layer_activation_bytes(plain, batch) == 1000 * difference


def test_transformer_engine_keeps_a_gradient_of_each_shape():
    shard = ModelShard(model("qwen3", 3).resolve(), ParallelConfig(), 0)
    matrices = 64 * (120 + 2 * 40) + 64 * 120 + 3 * 208 * 64
    assert shard.placeholder_bytes(Build(2, fused=True)) == 2 * matrices
    assert shard.placeholder_bytes(Build(2, fused=False)) == 0
