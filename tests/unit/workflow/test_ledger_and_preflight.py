"""Preflight refuses reused labels, contaminated evaluations, sizes that do not fit and unknown keys."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.errors import UserError
from megatron_s2d.stages.inputs import StageInputs
from megatron_s2d.workflow.plan import make_plan
from megatron_s2d.workflow.plan_estimate import machine_from_options, print_estimate
from megatron_s2d.workflow.plan_table import print_warnings
from megatron_s2d.workflow.preflight import check_workflow

SMOKE = Path(__file__).resolve().parents[3] / "configs" / "smoke.yaml"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


def check(cache, *overrides):
    return check_workflow(load_workflow(SMOKE, list(overrides)), cache)


def test_smoke_workflow_passes_and_its_ledger_names_the_labels(cache):
    preflight = check(cache)
    trained = [entry for entry in preflight.ledger.entries(preflight.stages) if "validation" not in entry.note]
    used = {entry.stage: entry.labels_used for entry in trained}
    assert used["rl_teacher"] and used["stage3"] and not used["cache"] and not used["opd"]
    assert preflight.totals["evaluations/stage3"] == 1
    halves = [{prompt.id for prompt in preflight.prompts[name]} for name in ("pool/1H", "pool/2H")]
    assert not halves[0] & halves[1] and len(halves[0]) + len(halves[1]) == 256


def test_stage_3_on_used_labels_is_refused(cache):
    with pytest.raises(
        UserError,
        match=r"stages\.stage3\.prompts: stage 'rl_teacher' already used the labels of 128 prompts of 'pool/1H'",
    ):
        check(cache, "stages.stage3.prompts=pool/1H")
    with pytest.raises(UserError, match="labels of 128 prompts of 'pool'"):
        check(cache, "stages.stage3.prompts=pool")


def test_servers_on_other_machines_without_a_key_are_a_warning(cache, tmp_path):
    served = ["rollout.engine=sglang", "max_parallel_stages=1"]
    urls = "{student: ['http://10.0.0.7:30000'], teacher: ['http://127.0.0.1:30000']}"
    served += ["rollout.max_mismatch_kl=null", f"rollout.sglang.urls={urls}"]
    preflight = check(cache, *served)
    (warning,) = preflight.server_warnings
    assert warning.startswith("http://10.0.0.7:30000: whoever reaches these servers") and "api_key_file" in warning
    assert warning in preflight.warnings
    console = Console(file=io.StringIO(), width=200)
    print_warnings(preflight, console)
    assert console.file.getvalue() == f"warning: {warning}\n"
    with pytest.raises(UserError, match="api_key_file: .*no key: cannot be read"):
        check(cache, *served, f"rollout.sglang.api_key_file={tmp_path}/no key")
    (tmp_path / "key").write_text("abc")
    assert not check(cache, *served, f"rollout.sglang.api_key_file={tmp_path}/key").server_warnings


def test_labels_that_cannot_be_graded_are_refused_and_those_compared_as_text_are_a_warning(cache, tmp_path):
    def entry(*answers):
        rows = [{"id": str(n), "question": f"{n} * 7 =", "answer": answer} for n, answer in enumerate(answers)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = "type: file, schema: columns, columns: {id: id, question: question, answer: answer}, verifier: math"
        return f"data.problems={{{keys}, path: {tmp_path}/rows.jsonl, template: plain}}"

    with pytest.raises(
        UserError, match=r"evaluation\.prompts: 'problems': 1 of 3 labels are no answers \(rows/2: .*boxed"
    ):
        check(cache, entry("7", "\\sum_{k=1}^n k", "\\boxed{}"))
    preflight = check(cache, entry("7", "\\sum_{k=1}^n k", "\\frac{1}{2}"))
    (warning,) = preflight.label_warnings
    assert warning.startswith("data 'problems': 1 of 3 labels cannot be read as mathematics") and "rows/1" in warning
    assert warning in preflight.warnings
    assert not check(cache, entry("7", "\\text{no solution}", "\\frac{1}{2}")).label_warnings


def test_labels_of_the_stage_right_before_are_used_too(cache):
    with pytest.raises(UserError, match=r"stages\.student_grpo\.prompts: stage 'rl_teacher' already used the labels"):
        check(cache, "stages.student_grpo.init=rl_teacher")


def test_replay_control_is_noted_in_the_ledger(cache):
    preflight = check(cache, "stages.stage3.prompts=pool/1H", "stages.stage3.label_reuse=allow")
    notes = {entry.prompts: entry.note for entry in preflight.ledger.entries(["stage3"])}
    assert "used before by rl_teacher" in notes["pool/1H"]


def test_same_problems_under_another_name_are_recognised(cache):
    with pytest.raises(UserError, match="evaluation problems"):
        check(cache, "data.problems={type: task, split: pool, num_operations: 2, num_prompts: 64}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "parallel.tensor_model_parallel_size=3",
            "models.teacher: .*num_attention_heads 4 .*tensor_model_parallel_size 3",
        ),
        ("parallel.pipeline_model_parallel_size=4", "num_layers 2 .*pipeline_model_parallel_size 4"),
        ("lengths.max_prompt_length=3", r"data\.problems: all prompts .* are longer than max_prompt_length 3"),
        ("evaluation.sampling.max_response_length=600", "exceed the 512 positions of model 'student'"),
        ("parallel.data_parallel_size=1000", r"stages\.teacher_base: .* smaller than data_parallel_size"),
        ("stages.opd.max_prompt_length=2", r"stages\.opd\.max_prompt_length: 2: all prompts of 'pool/1H' are longer"),
        ("tokenizer=/nowhere", "tokenizer '/nowhere' cannot be loaded"),
        ("stages.opd.train_batch_size=200", r"stages\.opd\.train_batch_size: 200 prompts a step, but its data has 128"),
        (
            "stages.teacher_base.loss_agg_mode=seq_mean_token_sum_norm",
            r"stages\.teacher_base\.norm_length: .* has no end",
        ),
        ("data.pool={type: file, path: /nowhere/x.jsonl}", "/nowhere/x.jsonl: no such file"),
    ],
)
def test_bad_input_is_one_clear_line(cache, override, message):
    with pytest.raises(UserError, match=message) as error:
        check(cache, override)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.opd.optimiser={lr: 1}", "smoke.yaml: stages.opd.optimiser: .*did you mean 'optimizer'"),
        ("stages.opd.optimizer.learning_rate=1", r"stages.opd.optimizer.learning_rate: unknown key"),
        ("stagse={}", "did you mean 'stages'"),
        ("stages.opd.teacher=rl_techer", "there is no stage 'rl_techer'"),
        ("stages.opd.steps=0", "stages.opd.steps: .*greater than or equal to 1"),
        ("stages.opd.kl_estimator=sampld", "stages.opd.kl_estimator"),
        ("stages.forward_kl.cache=opd", "but a teacher_cache stage is needed"),
        ("arms={a: nothing}", "there is no stage 'nothing'"),
        ("stages.rl_teacher.init=stage3", "form a cycle .*: .*stage3 -> rl_teacher"),
        ("stages.rl_teacher.prompts=problems", "evaluation set"),
        ("stages.opd.max_prompt_length=17", "stages.opd.max_prompt_length: 17 is above lengths.max_prompt_length 16"),
        ("stages.teacher_base.max_prompt_length=8", "'corpus' is a generated corpus, without prompts"),
        ("models.teacher.preset=tiny-teachr", "did you mean 'tiny-teacher'"),
        ("seed", "expected KEY=VALUE"),
    ],
)
def test_wrong_configurations_name_file_key_and_remedy(override, message):
    with pytest.raises(UserError, match=message) as error:
        load_workflow(SMOKE, [override])
    assert "\n" not in str(error.value)


def test_a_stage_with_a_lower_prompt_limit_reads_a_part_of_the_same_half(cache, tmp_path):
    """Halves are those of all prompts, so that a stage with a lower limit sees none of the other half."""
    rows = [
        {"id": index, "question": f"{index % 17} + {index // 17}" + " + 1" * 2 * (index % 2) + " =", "answer": "1"}
        for index in range(200)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = "{id: id, question: question, answer: answer}"
    pool = f"{{type: file, path: {tmp_path / 'sums.jsonl'}, template: plain, columns: {columns}}}"
    lower = [f"stages.{name}.max_prompt_length=4" for name in ("cache", "opd", "stage3")]
    whole, partial = check(cache, f"data.pool={pool}"), check(cache, f"data.pool={pool}", *lower)
    assert whole.prompts.keys() == partial.prompts.keys()
    for entry, prompts in whole.prompts.items():
        assert [prompt.id for prompt in prompts] == [prompt.id for prompt in partial.prompts[entry]]

    def short(entry):
        return [prompt.id for prompt in whole.prompts[entry] if len(prompt.token_ids) == 4]

    inputs = StageInputs(partial.config, {}, cache)
    for stage, entry in (("cache", "pool/1H"), ("opd", "pool/1H"), ("stage3", "pool/2H")):
        assert 0 < len(short(entry)) < 100
        assert [prompt.id for prompt in inputs.stage_prompts(stage)] == short(entry)
        assert partial.dropped[f"{entry} in stages.{stage}"] == 100 - len(short(entry))
        assert partial.shapes[stage].prompt_length == 4 and whole.shapes[stage].prompt_length == 8
    assert len(inputs.stage_prompts("rl_teacher")) == 100
    trained = [entry for entry in partial.ledger.entries(partial.stages) if "validation" not in entry.note]
    sizes = {entry.stage: entry.num_prompts for entry in trained}
    assert sizes["stage3"] == len(short("pool/2H")) and sizes["rl_teacher"] == 100
    rows = json.loads(partial.ledger.to_json(["stage3"]))
    assert {row["prompts"]: row.get("prompt_ids") for row in rows}["pool/2H"] == short("pool/2H")
    too_many = f"stages.opd.train_batch_size={len(short('pool/1H')) + 1}"
    check(cache, f"data.pool={pool}", too_many)
    with pytest.raises(UserError, match=f"but its data has {len(short('pool/1H'))}"):
        check(cache, f"data.pool={pool}", *lower, too_many)
    with pytest.raises(UserError, match=r"stages\.cache\.max_prompt_length: 4: prompt .* has 8 tokens"):
        check(cache, f"data.pool={pool[:-1]}, on_long_prompt: error}}", *lower)


def test_fp8_is_checked_without_a_gpu(cache):
    bf16 = "precision=bfloat16"
    with pytest.raises(UserError, match="fp8 needs precision bfloat16, not float32"):
        check(cache, "fp8={recipe: tensorwise}")
    with pytest.raises(UserError, match="fp8.recipe: Input should be 'delayed', 'tensorwise', 'blockwise' or 'mxfp8'"):
        check(cache, bf16, "fp8={recipe: int4}")
    with pytest.raises(UserError, match="models.*blockwise needs widths that are multiples of 128"):
        check(cache, bf16, "fp8={recipe: blockwise}")
    preflight = check(cache, bf16, "fp8={recipe: tensorwise}")
    plain, fp8 = check(cache, bf16).memory(on_gpu=True)["opd"], preflight.memory(on_gpu=True)["opd"]
    copies = {
        with_fp8.role: with_fp8.total - without.total
        for with_fp8, without in zip(fp8.models, plain.models, strict=True)
    }
    assert copies["student"] > 0 and copies["teacher"] == 0
    both = check(cache, bf16, "fp8={recipe: tensorwise, frozen: true}").memory(on_gpu=True)["opd"]
    assert all(with_fp8.total > without.total for with_fp8, without in zip(both.models, plain.models, strict=True))


def test_plan_for_a_chip_without_fp8_is_refused(cache):
    preflight = check(cache, "precision=bfloat16", "fp8={recipe: tensorwise}")
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(UserError, match="A100 SXM 80 GB has 8.0: leave fp8 out"):
        print_estimate(preflight, machine_from_options("a100-80", None, ()), None, console)
    print_estimate(preflight, machine_from_options("h100", None, ()), None, console)
    assert "fp8: times of products and bytes between ranks are those of bf16" in console.file.getvalue()


def test_fp8_changes_job_keys_and_offloading_does_not(tmp_path):
    def keys(*overrides):
        return [job.key for job in make_plan(load_workflow(SMOKE, ["precision=bfloat16", *overrides]), tmp_path)]

    plain = keys()
    assert set(keys("fp8={recipe: tensorwise}")).isdisjoint(plain)
    assert keys("stages.opd.offload_optimizer=true", "stages.opd.micro_batch={sequence_packing: true}") == plain


def test_offloaded_optimizer_is_counted_in_the_update_phase(cache):
    plain = check(cache).memory(on_gpu=True)["opd"]
    offloaded = check(cache, "stages.opd.offload_optimizer=true").memory(on_gpu=True)["opd"]
    student = plain.models[0]
    assert plain.models_total - offloaded.models_total == student.gradients + student.optimizer > 0
    assert sum(offloaded.phases["train"].values()) - sum(plain.phases["train"].values()) == student.gradients
    assert sum(offloaded.phases["update"].values()) == student.gradients + student.optimizer


def test_overlapped_communication_needs_packed_sequences_and_a_recipe_that_supports_it(cache):
    settings = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    settings += ["parallel.tp_comm_overlap=true", "precision=bfloat16"]
    with pytest.raises(UserError, match=r"tp_comm_overlap needs packed sequences: set micro_batch.sequence_packing"):
        check(cache, *settings)
    with pytest.raises(UserError, match="cannot exchange operands of fp8.recipe blockwise.* choose another recipe"):
        check(cache, *settings, "fp8.recipe=blockwise")


def test_virtual_pipeline_stages_need_servers(cache):
    sizes = ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]
    with pytest.raises(UserError, match="in-process engine does not generate with virtual pipeline stages: set roll"):
        check_workflow(load_workflow(SMOKE, sizes), cache)


def test_context_parallel_needs_packed_sequences_and_servers(cache):
    two = "parallel.context_parallel_size=2"
    with pytest.raises(
        UserError, match=r"stages.teacher_base: context_parallel_size 2 .* micro_batch.sequence_packing to true"
    ):
        check(cache, two)
    with pytest.raises(UserError, match="in-process engine does not support context parallelism: set rollout.engine"):
        packed = [f"stages.{name}.micro_batch.sequence_packing=true" for name in load_workflow(SMOKE).stages]
        check(cache, two, *packed)
