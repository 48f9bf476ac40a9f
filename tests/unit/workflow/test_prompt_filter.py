"""Prompts that a model solved too often or too seldom in an earlier evaluation are left out, of ledger and key too."""

import json
from pathlib import Path

import pytest

from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.data.label_ledger import LabelLedger
from megatron_s2d.data.prompts import fitting_prompts
from megatron_s2d.errors import UserError
from megatron_s2d.workflow.plan import make_plan
from megatron_s2d.workflow.preflight import check_workflow

SMOKE = Path(__file__).resolve().parents[3] / "configs" / "smoke.yaml"


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    return check_workflow(load_workflow(SMOKE), tmp_path_factory.mktemp("tokenizer"))


def write(path: Path, ids, **field) -> None:
    """Pass rates 0, 1/4, 2/4, 3/4, 1 in turn."""
    rows = [
        {"problem_id": id_, "rewards": [0.5] * 4, "correct": [index < number % 5 for index in range(4)]} | field
        for number, id_ in enumerate(ids)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def filtered(path: Path, **limits) -> list[str]:
    """Overrides for stage 3."""
    return [
        "stages.stage3.validation=null",
        f"stages.stage3.prompt_filter={json.dumps({'evaluation': str(path)} | limits)}",
    ]


def test_prompts_outside_the_range_are_left_out(checked, tmp_path):
    ids, path = [prompt.id for prompt in checked.prompts["pool/2H"]], tmp_path / "evaluation.jsonl"
    write(path, ids)
    config = load_workflow(SMOKE, filtered(path, min_pass_rate=0.25, max_pass_rate=0.5))
    read = [prompt.id for prompt in fitting_prompts(config, "stage3", "pool/2H", checked.prompts["pool/2H"])]
    assert read == [id_ for number, id_ in enumerate(ids) if number % 5 in (1, 2)]
    assert len(fitting_prompts(config, "rl_teacher", "pool/1H", checked.prompts["pool/1H"])) == 128
    ledger = LabelLedger(config, checked.prompts)
    assert ledger.num_labels_used(["stage3"]) == len(read) and ledger.num_labels_used(["rl_teacher"]) == 128


def test_stages_that_read_the_same_prompts_with_and_without_a_filter_use_their_own_labels(checked, tmp_path):
    """In either order: their keys are kept apart."""
    path = tmp_path / "evaluation.jsonl"
    write(path, [prompt.id for prompt in checked.prompts["pool/1H"]])
    config = load_workflow(SMOKE, [*filtered(path, max_pass_rate=0.5), "stages.stage3.prompts=pool/1H"])
    for names in (["stage3", "rl_teacher"], ["rl_teacher", "stage3"]):
        ledger = LabelLedger(config, checked.prompts)
        used = {name: ledger.num_labels_used([name]) for name in names}
        assert used == {"rl_teacher": 128, "stage3": 78}
        assert ledger.num_labels_used(names) == 128


def test_the_content_of_the_evaluation_is_part_of_the_key(checked, tmp_path):
    ids, path = [prompt.id for prompt in checked.prompts["pool/2H"]], tmp_path / "evaluation.jsonl"

    def keys(overrides):
        return {job.id: job.key for job in make_plan(load_workflow(SMOKE, overrides), tmp_path / "run")}

    write(path, ids)
    first = keys(filtered(path))
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    assert keys(filtered(copy)) == first
    write(path, ids[::-1])
    plain, second = keys([]), keys(filtered(path))
    assert len({k["stages/stage3"] for k in (plain, first, second)}) == 3
    assert plain["stages/opd"] == first["stages/opd"] == second["stages/opd"]


def test_wrong_evaluations_are_one_line(checked, tmp_path):
    prompts, path = checked.prompts["pool/2H"], tmp_path / "evaluation.jsonl"
    ids = [prompt.id for prompt in prompts]

    def error(**limits):
        config = load_workflow(SMOKE, filtered(path, **limits))
        with pytest.raises(UserError) as caught:
            fitting_prompts(config, "stage3", "pool/2H", prompts)
        return str(caught.value)

    assert error().endswith("evaluation.jsonl: no such file")
    write(path, ids[:-2])
    assert "has no row for 2 prompts of 'pool/2H'" in error()
    write(path, ids, correct="x")
    assert "not an evaluation.jsonl" in error()
    write(path, [ids[0], *ids])
    assert "no prompt of 'pool/2H' has a pass rate in this range" in error(min_pass_rate=0.3, max_pass_rate=0.4)
    with pytest.raises(UserError, match="min_pass_rate is above max_pass_rate"):
        load_workflow(SMOKE, filtered(path, min_pass_rate=0.5, max_pass_rate=0.4))
