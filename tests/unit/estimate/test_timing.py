"""Times and traffic by hand, and proposals that fit: no number here comes from the code under test."""

import dataclasses
from pathlib import Path

import pytest

from megatron_s2d.cli import main
from megatron_s2d.config.hardware import GPUS, AssumptionsConfig, gpu_of
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.recompute import Recompute
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.errors import UserError
from megatron_s2d.estimate.layers import Build, MicroBatchShape
from megatron_s2d.estimate.memory import Workload, micro_batches_in_flight, workload
from megatron_s2d.estimate.roofline import Machine, ModelOnMachine, hidden_state_traffic
from megatron_s2d.estimate.stage_time import stage_time
from megatron_s2d.workflow.layout_search import layouts, propose
from megatron_s2d.workflow.preflight import check_workflow

SMOKE = Path(__file__).resolve().parents[3] / "configs" / "smoke.yaml"
LLAMA_8B = ModelConfig(preset="llama-3.1-8b").resolve()
PERFECT = AssumptionsConfig(
    matmul_efficiency=1, memory_efficiency=1, link_efficiency=1, latency=0, reserved_memory=0, network_bandwidth=50e9
)
H200 = Machine(GPUS["h200"], PERFECT)


def on_h200(recompute: str = "none", **sizes) -> ModelOnMachine:
    return ModelOnMachine(LLAMA_8B, ParallelConfig(**sizes), Build(2, True, Recompute(recompute)), H200)


def test_matrix_product_time_by_hand():
    """Six operations a parameter and token, the embedding left out, and 6 x context x queries in attention."""
    tokens, length = 8192, 4096
    work = Workload(MicroBatchShape(tokens, length, tokens), 3)
    layers = 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096
    attention = 32 * 2 * 2 * 4096 * length / 2
    seconds = on_h200().train_seconds(work)
    assert seconds["layers"] == pytest.approx(3 * tokens * (6 * layers + 3 * attention) / 989e12)
    assert seconds["loss"] == pytest.approx(3 * tokens * 6 * 128256 * 4096 / 989e12)
    assert on_h200("full").train_seconds(work)["layers"] == pytest.approx(seconds["layers"] * 4 / 3)


def test_update_traffic_is_gradient_reduction_and_weight_gathering():
    traffic = on_h200(data_parallel_size=16).update_traffic()
    count = 8_030_261_248
    assert traffic["gradients"].bytes_sent == pytest.approx(4 * count * 15 / 16, rel=1e-5)
    assert traffic["weights"].bytes_sent == pytest.approx(2 * count * 15 / 16, rel=1e-5)
    assert traffic["gradients"].span == 16
    expected = 6 * count * 15 / 16 / 50e9  # sixteen ranks are two nodes
    assert on_h200(data_parallel_size=16).train_seconds(Workload(MicroBatchShape(64, 64, 64), 1))[
        "gradients and weights"
    ] == pytest.approx(expected, rel=1e-4)
    near = on_h200(data_parallel_size=8).train_seconds(Workload(MicroBatchShape(64, 64, 64), 1))[
        "gradients and weights"
    ]
    assert near == pytest.approx(6 * count * 7 / 8 / 450e9, rel=1e-4)


def test_teacher_states_are_sent_once():
    """A million response tokens of 16 KiB: 128 MiB for each of the fewer ranks, at the network's rate between nodes."""
    teacher = ModelConfig(preset="llama-3.3-70b").resolve()
    scorer = ParallelConfig(tensor_model_parallel_size=8, pipeline_model_parallel_size=2, data_parallel_size=16)
    trainer = ParallelConfig(tensor_model_parallel_size=2, data_parallel_size=128)
    traffic = hidden_state_traffic(teacher, 2**20, 2, scorer, trainer)
    assert traffic.bytes_sent == 2**27 and traffic.span == 256
    assert traffic.seconds(H200) == pytest.approx(2**27 / 50e9)


def test_tensor_parallel_traffic_by_hand():
    """All-reduces: two a layer each way, the embedding's, two of the loss; a ring sends 2 (T - 1) / T of each."""
    work = Workload(MicroBatchShape(1024, 1024, 1024), 1)
    traffic = on_h200(tensor_model_parallel_size=4).pass_traffic(work, trains=True)["tensor"]
    assert traffic.calls == 32 * 4 + 3
    assert traffic.bytes_sent == pytest.approx((32 * 4 + 3) * 1024 * 4096 * 2 * 2 * 3 / 4)
    shared = on_h200(tensor_model_parallel_size=4, sequence_parallel=True).pass_traffic(work, trains=True)["tensor"]
    # Gathers and scatters: four a layer forward, six backward (the input is gathered again for the weight's gradient),
    # the embedding's each way, and three of the loss.
    assert shared.bytes_sent == pytest.approx((32 * 10 + 5) * 1024 * 4096 * 2 * 3 / 4)


def test_context_ranks_send_keys_and_values_to_all_others():
    """Every layer gathers those of the other three ranks, and in the backward pass their gradients go back."""
    work = Workload(MicroBatchShape(1024, 4096, 1024), 1)
    context = on_h200(context_parallel_size=4, tensor_model_parallel_size=2).pass_traffic(work, trains=False)["context"]
    assert context.bytes_sent == 32 * 2 * 1024 * (8 // 2 * 128) * 2 * 3 and context.span == 8
    trained = on_h200(context_parallel_size=4).pass_traffic(work, trains=True)["context"]
    assert trained.bytes_sent == 3 * 2 * context.bytes_sent  # Transformer Engine: the ring runs twice backwards
    assert "context" not in on_h200().pass_traffic(work, trains=True)


def test_pipeline_bubble():
    work = Workload(MicroBatchShape(1024, 1024, 1024), 8)
    seconds = on_h200(pipeline_model_parallel_size=4).train_seconds(work)
    busy = seconds["layers"] + seconds["loss"] + seconds["tensor, pipeline, context, expert traffic"]
    assert seconds["pipeline idle"] == pytest.approx(busy * 3 / 8)


def test_decoding_reads_weights_and_kv_cache():
    """One row: every weight but the embedding in bfloat16, and keys and values of half the response on average."""
    weights = 2 * (8_030_261_248 - 128256 * 4096)
    cached = 2 * (100 + 512) * 1024 * 2 * 32
    expected = 1024 * (weights + cached) / 4.8e12
    assert on_h200().decode_seconds(1, 100, 1024) == pytest.approx(expected)
    many = on_h200().decode_seconds(4096, 0, 2)
    assert many > 2 * 2 * 4096 * 7.5e9 / 989e12  # products take longer than reading then


def test_unused_experts_are_not_read():
    moe = ModelConfig(preset="qwen3-30b-a3b").resolve()
    site = ModelOnMachine(moe, ParallelConfig(), Build(2, True), H200)
    experts = 3 * 2048 * 768 * 128 * 48
    weights = moe.num_parameters - 151936 * 2048 - experts * (1 - 8 / 128)
    assert site.decode_seconds(1, 0, 1) == pytest.approx(2 * weights / 4.8e12, rel=1e-3)


def test_unknown_gpu_is_an_error_with_a_suggestion():
    with pytest.raises(UserError, match="did you mean 'h200'"):
        gpu_of("h20")
    assert gpu_of("A100-80").fp8_flops is None


def test_layouts_divide_every_model():
    moe = ModelConfig(preset="qwen3-30b-a3b").resolve()
    candidates = list(layouts({"moe": moe}, 16, 8))
    assert all(item.world_size == 16 for item in candidates)
    sizes = {(item.tensor_model_parallel_size, item.pipeline_model_parallel_size) for item in candidates}
    assert sizes == {(1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (2, 1), (2, 2), (2, 4), (2, 8), (4, 1), (4, 2), (4, 4),
                     (8, 1), (8, 2)}  # fmt: skip
    assert max(item.expert_model_parallel_size for item in candidates) == 16
    # With a dense model beside it there are no expert ranks.
    both = list(layouts({"moe": moe, "dense": LLAMA_8B}, 16, 8))
    assert {item.expert_model_parallel_size for item in both} == {1}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The smoke workflow with a published teacher and student and long responses."""
    overrides = [
        "precision=bfloat16", "models={teacher: {preset: llama-3.3-70b}, student: {preset: llama-3.1-8b}}",
        *(f"stages.{name}.sampling.max_response_length=4096" for name in ("rl_teacher", "cache", "opd")),
    ]  # fmt: skip
    return check_workflow(load_workflow(SMOKE, overrides), tmp_path_factory.mktemp("tokenizer"))


def test_every_turn_of_an_episode_computes_the_ones_before_again(tmp_path):
    """Three turns at most, as 5 tokens allow: two more prefills of the prompt and half of the response."""

    def seconds(*settings):
        overrides = [
            "stages.rl_teacher.sampling.max_response_length=5",
            "data.pool.environment={type: calculator, max_turns: 8}",
            *settings,
        ]
        checked = check_workflow(load_workflow(SMOKE, overrides), tmp_path)
        shape = checked.shapes["rl_teacher"]
        assert shape.turns == 3 and shape.requests == 16 * 8
        return stage_time(checked.config, "rl_teacher", checked.specs, shape, H200).seconds, shape, checked

    with_turns, shape, checked = seconds()
    one_turn = dataclasses.replace(shape, turns=1)
    plain = stage_time(checked.config, "rl_teacher", checked.specs, one_turn, H200).seconds
    added = with_turns.pop("prefill of turns")
    assert with_turns == plain
    positions = 2 * (shape.prompt_length + 2.5) * shape.requests
    assert added / plain["prefill"] == pytest.approx(positions / (16 * shape.prompt_length), rel=0.2)


def test_proposed_layouts_fit_and_the_fastest_comes_first(large):
    machine = Machine(GPUS["h200"])
    proposals = propose(large, machine, 16)
    assert all(item.memory <= machine.usable_memory for item in proposals)
    assert proposals[0].seconds == min(item.seconds for item in proposals)
    # 70 billion parameters at 18 bytes each do not fit below eight ranks a replica.
    assert all(
        item.parallel.tensor_model_parallel_size * item.parallel.pipeline_model_parallel_size >= 8 for item in proposals
    )
    config = load_workflow(SMOKE, [proposals[0].as_yaml().partition(";")[0].replace(": {", "={", 1)])
    assert config.parallel == proposals[0].parallel


def test_no_fitting_layout_is_an_error_with_the_smallest_peak(large):
    with pytest.raises(UserError, match=r"no layout fits 4 x NVIDIA L40S: the smallest peak is [0-9.]+ GiB, in stage"):
        propose(large, Machine(GPUS["l40s"]), 4)
    with pytest.raises(UserError, match="no layout of 7919 GPUs"):
        propose(large, Machine(GPUS["h200"]), 7919)


def test_plan_prints_cost_labels_and_fingerprints(capsys, tmp_path):
    assert main(["plan", str(SMOKE), "--gpu", "h100", "--num-gpus", "2", "--out", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    for expected in ("Labels: 272 distinct", "tokenizer fingerprint", "template fingerprint", "KV cache", "fastest: ",
                     "assumed: 50 % of peak", "NVIDIA H100 SXM", "MFU"):  # fmt: skip
        assert expected in text, expected
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h2000"], "unknown GPU 'h2000' (did you mean 'h200'?"),
        (["--num-gpus", "8"], "--num-gpus needs --gpu"),
        (["--gpu", "h200", "--num-gpus", "0"], "--num-gpus 0: must be at least 1"),
        (["--gpu", "h200", "--assume", "matmul_eficiency=0.6"], "did you mean 'matmul_efficiency'"),
        (["--gpu", "h200", "--assume", "matmul_efficiency=1.6"], "less than or equal to 1"),
    ],
)
def test_wrong_options_of_plan_are_one_line_errors(capsys, arguments, message):
    assert main(["plan", str(SMOKE), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_further_passes_repeat_updates_and_reuse_scores(tmp_path):
    """GRPO scores with the reference and the old weights once; exact distillation needs the teacher in every update."""
    times = []
    for epochs in (1, 3):
        settings = [f"stages.{name}.ppo_epochs={epochs}" for name in ("rl_teacher", "opd")]
        settings.append("stages.rl_teacher.kl_loss_coef=0.001")
        minis = [f"stages.{name}.num_mini_batches=2" for name in ("rl_teacher", "opd")]
        preflight = check_workflow(load_workflow(SMOKE, [*settings, *minis]), tmp_path)
        shapes = preflight.shapes
        times.append(
            {
                name: stage_time(preflight.config, name, preflight.specs, shapes[name], H200)
                for name in ("rl_teacher", "opd")
            }
        )
    once, thrice = times
    for name in ("rl_teacher", "opd"):
        assert thrice[name].seconds["layers"] == pytest.approx(3 * once[name].seconds["layers"])
        for phase in ("decode", "old log-probabilities"):
            assert thrice[name].seconds[phase] == pytest.approx(once[name].seconds[phase])
    assert thrice["rl_teacher"].seconds["reference forward"] == once["rl_teacher"].seconds["reference forward"]
    assert thrice["opd"].seconds["teacher forward"] == pytest.approx(3 * once["opd"].seconds["teacher forward"])


def test_virtual_stages_idle_less_send_more_and_hold_parts_of_micro_batches():
    sizes = {"pipeline_model_parallel_size": 4, "tensor_model_parallel_size": 2}
    work = workload(8, 4096, 2048, max_tokens=4096, parallel=ParallelConfig(**sizes))
    plain, virtual = (on_h200(**sizes, virtual_pipeline_model_parallel_size=count) for count in (1, 4))
    ratio = plain.train_seconds(work)["pipeline idle"] / virtual.train_seconds(work)["pipeline idle"]
    assert 3.5 < ratio < 4  # the idle steps also send more
    sent = [site.pass_traffic(work, trains=True)["pipeline"].bytes_sent for site in (plain, virtual)]
    assert sent[1] == 4 * sent[0]
    in_flight = [micro_batches_in_flight(site.shard, 8) for site in (plain, virtual)]
    last = virtual.shard.pp_rank == 3
    assert in_flight == [1, 13 / 4] if last else [4 - plain.shard.pp_rank, in_flight[1]]
    assert micro_batches_in_flight(dataclasses.replace(virtual.shard, pp_rank=0), 8) == (2 * 3 + 3 * 4 + 1) / 4
