"""What is run of a stage, what is proposed when it does not fit, and the records of a measurement; no stub here."""

import itertools
import json
from pathlib import Path

import pytest

from megatron_s2d.cli import main
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.estimate.stage_memory import rank_memory
from megatron_s2d.measure.comparison import bytes_sent
from megatron_s2d.measure.limits import Limits, shortened
from megatron_s2d.measure.measurement import Measurement, OutOfMemory, PhaseCall
from megatron_s2d.measure.stub import Collective, Copies, Product
from megatron_s2d.workflow.nearest_fit import nearest_fit
from megatron_s2d.workflow.preflight import check_workflow

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def preflight(tmp_path_factory):
    return check_workflow(load_workflow(ROOT / "configs/smoke.yaml", []), tmp_path_factory.mktemp("tokenizer"))


def call(phase: str, peak: int) -> PhaseCall:
    product = Product("GemmEx", 4, 8, 16, "bf16", "bf16", "f32", "f32", False, 2, 3)
    collectives = (Collective("AllGather", 8, "bf16", 1, 1024),)
    return PhaseCall(
        phase,
        1,
        1,
        peak,
        peak,
        0,
        2,
        {"k": 3},
        {"a.py:1 f": 2},
        (product,),
        collectives,
        collectives,
        (Copies("x", 1, 2),),
    )


def test_a_measurement_survives_json_and_reports_the_largest_peak():
    calls = (call("train", 10), call("train", 30), call("update", 20))
    error = OutOfMemory("train", "logits of a chunk", "a.py:1 f", "tried 1 GiB")
    measurement = Measurement("opd", 3, 8, {"tp": 3}, 5, 99, False, calls, error)
    assert Measurement.from_json(json.loads(json.dumps(measurement.to_json()))) == measurement
    assert measurement.peaks == {"train": 30, "update": 20} and measurement.peak_bytes == 30
    assert measurement.call("train").flops == 2 * 4 * 8 * 16 * 2 * 3
    with pytest.raises(KeyError, match="no phase score"):
        measurement.call("score")


def test_keys_that_context_ranks_pass_on_are_not_counted_as_tokens_of_experts():
    parallel = ParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        context_parallel_size=2,
        expert_model_parallel_size=4,
        data_parallel_size=2,
    )
    sends = [Collective("Send", ranks, "bf16", 1, 1000) for ranks in (2, 4)]  # Transformer Engine's ring; all-to-all
    assert bytes_sent(sends, parallel) == {"context": 1000, "expert": 750}


def test_a_stage_is_cut_to_the_responses_that_fill_its_micro_batches(preflight):
    config, shape = preflight.config, preflight.shapes["opd"]
    tokens = {
        "micro_batch": config.stages["opd"].micro_batch.model_copy(update={"max_tokens_per_gpu": 2 * shape.length})
    }
    stages = dict(config.stages) | {"opd": config.stages["opd"].model_copy(update=tokens)}
    parallel = ParallelConfig(data_parallel_size=2)
    config = config.model_copy(update={"stages": stages, "parallel": parallel})
    cut, cut_shape = shortened(config, "opd", shape, Limits(micro_batches=3))
    stage = cut.stages["opd"]
    # Two responses in each of three micro-batches on two ranks, in whole groups.
    assert stage.train_batch_size * stage.num_generations == cut_shape.responses == 12
    assert stage.num_generations == 3, "six responses of a rank in groups of at most four"
    assert stage.steps == 2 and cut_shape.requests == shape.requests
    assert config.stages["opd"].steps == preflight.config.stages["opd"].steps, "the argument is unchanged"


def test_the_proposed_settings_are_estimated_to_fit_and_change_little(preflight):
    shape = preflight.shapes["student_grpo"]
    config = preflight.config
    memory = rank_memory(config, "student_grpo", preflight.specs, shape, 0, on_gpu=True)
    allowed = memory.workspaces + (memory.total - memory.workspaces) / 1.2
    proposed = nearest_fit(config, "student_grpo", preflight.specs, shape, int(allowed / 0.9), pp_rank=0)
    assert proposed is not None and "max_tokens_per_gpu" in proposed
    changed = load_workflow(ROOT / "configs/smoke.yaml", [item for item in proposed.split() if item != "--set"])
    assert rank_memory(changed, "student_grpo", preflight.specs, shape, 0, on_gpu=True).total <= allowed
    assert nearest_fit(config, "student_grpo", preflight.specs, shape, 1000) is None


def test_buffers_of_tp_comm_overlap_are_in_the_peak_and_in_no_phase(preflight):
    """13 buffers of a micro-batch's hidden states in bfloat16, which PyTorch's allocator does not have."""
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    overlapped = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, tp_comm_overlap=True)
    estimates = []
    for layout in (parallel, overlapped):
        config = preflight.config.model_copy(update={"parallel": layout, "precision": "bfloat16"})
        estimates.append(rank_memory(config, "opd", preflight.specs, preflight.shapes["opd"], 0, on_gpu=True))
    plain, with_buffers = estimates
    tokens, spec = preflight.config.stages["opd"].micro_batch.max_tokens_per_gpu, preflight.specs["student"]
    assert with_buffers.total - plain.total == 13 * tokens * spec.hidden_size * 2
    assert with_buffers.peaks == plain.peaks


@pytest.mark.parametrize("sizes", [{"tp": 2, "cp": 1, "dp": 2, "pp": 2}, {"tp": 2, "cp": 2, "dp": 3, "pp": 2}])
def test_ranks_are_ordered_as_megatron_orders_them(sizes):
    from megatron.core.parallel_state import RankGenerator

    from megatron_s2d.parallel.layout import global_rank

    config = ParallelConfig(
        tensor_model_parallel_size=sizes["tp"],
        context_parallel_size=sizes["cp"],
        data_parallel_size=sizes["dp"],
        pipeline_model_parallel_size=sizes["pp"],
    )
    generator = RankGenerator(ep=1, order="tp-cp-ep-dp-pp", **sizes)
    for name, size in sizes.items():
        others = {other: range(count) for other, count in sizes.items() if other != name}
        groups = {
            tuple(
                global_rank(config, **dict(zip(others, place, strict=True)), **{name: index}) for index in range(size)
            )
            for place in itertools.product(*others.values())
        }
        assert groups == set(map(tuple, generator.get_ranks(name)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "1"], "--rank needs --measure"),
        (["--measure", "--rank", "1"], "--rank 1: the layout has 1 ranks, 0 to 0"),
        (["--measure", "--stage", "nothing"], "--stage nothing: no arm needs a stage of this name"),
    ],
)
def test_mistakes_in_arguments_are_one_line(arguments, message, capsys):
    assert main(["plan", str(ROOT / "configs/smoke.yaml"), *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
