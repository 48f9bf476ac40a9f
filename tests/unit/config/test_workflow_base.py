"""Configuration files with `defaults`: inherited, merged and removed keys."""

from pathlib import Path

import pytest
import yaml

from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.errors import UserError

SMOKE = Path(__file__).resolve().parents[3] / "configs" / "smoke.yaml"


def write(folder, name, document):
    path = folder / name
    path.write_text(yaml.safe_dump(document))
    return path


def test_merged_and_replaced_keys(tmp_path):
    write(tmp_path, "small.yaml", {"models": {"student": {"preset": "tiny-llama"}}, "stages": {"opd": {"steps": 3}}})
    stages = {"opd": {"optimizer": {"lr": 0.5}}, "student_base": {"seed": 7}}
    path = write(
        tmp_path,
        "child.yaml",
        {"defaults": [str(SMOKE), "small.yaml"], "arms": {"only": "opd"}, "contrasts": [], "stages": stages},
    )
    before, after = load_workflow(SMOKE), load_workflow(path)
    assert after.models["student"].num_layers is None and after.models["teacher"] == before.models["teacher"]
    assert (after.stages["opd"].steps, after.stages["opd"].optimizer.lr) == (3, 0.5)
    assert after.stages["opd"].train_batch_size == before.stages["opd"].train_batch_size
    assert after.stages["student_base"].seed == 7 and after.arms == {"only": "opd"} and after.seed == before.seed


def test_null_removes_a_key_of_the_base(tmp_path):
    write(tmp_path, "part.yaml", {"parallel": {"tensor_model_parallel_size": 2}})
    path = write(tmp_path, "child.yaml", {"defaults": [str(SMOKE), "part.yaml"], "parallel": None})
    assert load_workflow(path).parallel.world_size == 1


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"defaults": "gone.yaml"}, "gone.yaml: no such file"),
        ({"defaults": 3}, "defaults: expected the name"),
        ({"defaults": "child.yaml"}, "includes itself"),
    ],
)
def test_invalid_base_is_named(tmp_path, document, message):
    with pytest.raises(UserError, match=message):
        load_workflow(write(tmp_path, "child.yaml", document))


def test_samples_by_domain(tmp_path):
    document = {"defaults": str(SMOKE), "evaluation": {"samples_per_prompt": {"arithmetic": 3}}}
    assert load_workflow(write(tmp_path, "a.yaml", document)).evaluation.samples_of("arithmetic") == 3
    document["evaluation"] = {"samples_per_prompt": {"code": 3}}
    with pytest.raises(UserError, match="no number for the domain 'arithmetic' of 'problems'"):
        load_workflow(write(tmp_path, "b.yaml", document))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stages.teacher_base.type=distill",
            r"stages\.teacher_base: unknown type 'distill' \(did you mean 'opd'\?\)",
        ),
        ("stages.teacher_base.type=sfft", r"did you mean 'sft'"),
        ("precision=bf16", r"precision: .* \(got 'bf16'\) \(did you mean 'bfloat16'\?\)"),
        ("tokeniser=x", r"tokeniser: unknown key \(did you mean 'tokenizer'\?\)"),
    ],
)
def test_wrong_values_and_keys_name_the_right_ones(override, message):
    with pytest.raises(UserError, match=message):
        load_workflow(SMOKE, [override])


def test_an_unknown_key_is_named_before_the_missing_one_that_it_stands_for(tmp_path):
    document = yaml.safe_load(SMOKE.read_text())
    document["tokeniser"] = document.pop("tokenizer")
    (tmp_path / "w.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(UserError, match=r"tokeniser: unknown key \(did you mean 'tokenizer'\?\) \(and 1 more\)"):
        load_workflow(tmp_path / "w.yaml")
