"""A configuration with a previous name is refused with the new name."""

import pytest
import yaml

from megatron_s2d.config.migration import SIMULATION_KEYS, SWEEP_KEYS, WORKFLOW_KEYS, WORKFLOW_VALUES, refuse_renamed
from megatron_s2d.config.sweep import load_sweep
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.errors import UserError


def nested(pattern, value):
    """Return the document with ``value`` at the path ``pattern``."""
    for part in reversed(pattern.split(".")):
        value = {"x" if part == "*" else part: value}
    return value


@pytest.mark.parametrize("table", [WORKFLOW_KEYS, SWEEP_KEYS, SIMULATION_KEYS])
def test_previous_keys_are_refused_with_the_new_name(table):
    for pattern, new in table.items():
        with pytest.raises(UserError) as error:
            refuse_renamed(nested(pattern, 1), "run.yaml", table)
        assert str(error.value).startswith("run.yaml: ") and "was renamed: write " in str(error.value)
        assert "\n" not in str(error.value) and len(new) > 0


@pytest.mark.parametrize(("pattern", "old"), WORKFLOW_VALUES)
def test_previous_values_are_refused_with_the_new_name(pattern, old):
    with pytest.raises(UserError, match=f"the value {old} was renamed: write {WORKFLOW_VALUES[pattern, old]}"):
        refuse_renamed(nested(pattern, old), "run.yaml", {}, WORKFLOW_VALUES)


def test_files_and_overrides_are_checked(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"stages": {"a": {"type": "grpo", "clip_low": 0.2}}}))
    with pytest.raises(UserError, match="run.yaml: stages.a.clip_low: this key was renamed: write clip_ratio_low"):
        load_workflow(path)
    path.write_text(yaml.safe_dump({"stages": {}}))
    with pytest.raises(UserError, match="rollout.sglang.ahead: this key was renamed: write rollout.async_mode"):
        load_workflow(path, ["rollout.sglang.ahead=wait"])
    path.write_text(yaml.safe_dump({"base": "other.yaml"}))
    with pytest.raises(UserError, match="base: this key was renamed: write workflow"):
        load_sweep(path)
