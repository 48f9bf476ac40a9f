"""`prompt_order: continue` needs an earlier stage with the same order of prompts."""

from pathlib import Path

import pytest
import yaml

from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.errors import UserError

SMOKE = Path(__file__).resolve().parents[3] / "configs" / "smoke.yaml"
FILTER = {"evaluation": "a.jsonl", "max_pass_rate": 0.5}


def load(folder, first, second):
    stages = {
        "base": {"type": "sft", "model": "student", "data": "corpus", "steps": 1, "global_batch_size": 8},
        "first": {"type": "grpo", "init": "base", "prompts": "pool", "steps": 3} | first,
        "second": {"type": "grpo", "init": "first", "prompts": "pool", "steps": 2, "prompt_order": "continue"} | second,
    }
    data = {name: {"type": "task", "split": "pool", "num_prompts": 50} for name in ("pool", "other")}
    document = {"defaults": str(SMOKE), "data": data, "stages": stages, "arms": {"a": "second"}, "contrasts": []}
    (folder / "a.yaml").write_text(yaml.safe_dump(document))
    return load_workflow(folder / "a.yaml")


def test_positions_follow_steps_and_batch_sizes(tmp_path):
    config = load(tmp_path, {"train_batch_size": 10}, {"train_batch_size": 7})
    assert [config.num_prompts_before(name) for name in ("base", "first", "second")] == [0, 0, 30]
    assert load(tmp_path, {"steps": 5}, {}).num_prompts_before("second") == 5 * 64
    assert load(tmp_path, {}, {"prompt_order": "restart"}).num_prompts_before("second") == 0
    shared = {"prompt_filter": FILTER}
    assert load(tmp_path, shared, shared).num_prompts_before("second") == 3 * 64


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"init": "base"}, r"second.prompt_order: .*prompts of 'base', which samples none \(type sft\)"),
        ({}, {"init": None, "model": "student"}, "second.prompt_order: continue needs `init`"),
        ({}, {"prompts": "other"}, "needs the `prompts` of 'first', .*pool.*; it is .*other"),
        ({"prompts": "pool/1H"}, {}, "needs the `prompts` of 'first', .*pool/1H.*; it is .*pool'"),
        ({}, {"seed": 3}, "needs the `seed` of 'first', 0, .*; it is 3"),
        ({}, {"max_prompt_length": 9}, "needs the `max_prompt_length` of 'first', None, .*; it is 9"),
        ({}, {"prompt_filter": FILTER}, "needs the `prompt_filter` of 'first', None, .*; it is .*a.jsonl.*0.5"),
        ({"prompt_filter": FILTER}, {}, "needs the `prompt_filter` of 'first', .*a.jsonl.*0.5.*; it is None"),
        ({}, {"prompt_order": "next"}, "second.*prompt_order: Input should be 'restart' or 'continue'"),
    ],
)
def test_stages_that_have_no_common_order(tmp_path, first, second, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, first, second)


def test_a_cycle_of_continued_stages_is_refused(tmp_path):
    with pytest.raises(UserError, match="stages form a cycle"):
        load(tmp_path, {"init": "second", "prompt_order": "continue"}, {})
