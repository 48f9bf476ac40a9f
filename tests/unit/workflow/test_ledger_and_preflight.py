"""What is refused before anything runs: reused labels, contaminated evaluation, sizes that do not fit, unknown keys."""

from pathlib import Path

import pytest

from megatron_s2d.config.base import UserError
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.workflow.preflight import check_workflow

SMOKE = Path(__file__).resolve().parents[3] / "configs" / "smoke.yaml"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


def check(cache, *overrides):
    return check_workflow(load_workflow(SMOKE, list(overrides)), cache)


def test_the_smoke_workflow_passes_and_its_ledger_names_the_labels(cache):
    checked = check(cache)
    used = {entry.stage: entry.labels_used for entry in checked.ledger.entries(checked.stages)}
    assert used["rl_teacher"] and used["stage3"] and not used["cache"] and not used["opd"]
    assert checked.totals["evaluations/stage3"] == 1
    halves = [{prompt.id for prompt in checked.prompts[name]} for name in ("pool/1H", "pool/2H")]
    assert not halves[0] & halves[1] and len(halves[0]) + len(halves[1]) == 256


def test_a_stage_3_on_used_labels_is_refused(cache):
    with pytest.raises(
        UserError, match="stages.stage3.prompts: the labels of 128 prompts .* used before, by stage 'rl_"
    ):
        check(cache, "stages.stage3.prompts=pool/1H")
    with pytest.raises(UserError, match="labels of 128 prompts of 'pool'"):
        check(cache, "stages.stage3.prompts=pool")


def test_a_replay_control_says_so(cache):
    checked = check(cache, "stages.stage3.prompts=pool/1H", "stages.stage3.label_reuse=allow")
    notes = {entry.stage: entry.note for entry in checked.ledger.entries(checked.stages)}
    assert "used before by rl_teacher" in notes["stage3"]


def test_the_same_problems_under_another_name_are_recognised(cache):
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
        ("lengths.max_prompt_tokens=3", "data.problems: no prompt .* at most max_prompt_tokens 3"),
        ("evaluation.sampling.max_response_tokens=600", "exceed the 512 positions of model 'student'"),
        ("parallel.data_parallel_size=1000", "smaller than data_parallel_size"),
        ("tokenizer=/nowhere", "tokenizer '/nowhere' cannot be loaded"),
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
        ("stages.opd.granularity=sampld", "stages.opd.granularity"),
        ("stages.forward_kl.cache=opd", "a teacher_cache stage is needed"),
        ("arms={a: nothing}", "there is no stage 'nothing'"),
        ("stages.rl_teacher.init=stage3", "in a circle"),
        ("stages.rl_teacher.prompts=problems", "evaluation set"),
        ("models.teacher.preset=tiny-teachr", "did you mean 'tiny-teacher'"),
        ("seed", "expected KEY=VALUE"),
    ],
)
def test_wrong_configurations_name_file_key_and_remedy(override, message):
    with pytest.raises(UserError, match=message) as error:
        load_workflow(SMOKE, [override])
    assert "\n" not in str(error.value)
