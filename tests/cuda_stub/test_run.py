"""``s2d run`` on a machine with GPUs: every stage of the smoke workflow, in processes that the runner starts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ARM = "half_bridge_stage3"


# New processes, as on a machine with GPUs, import everything, which takes longer than the stages.
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_every_stage_of_the_smoke_workflow_runs(stub, tmp_path, start):
    document = yaml.safe_load((ROOT / "configs/smoke.yaml").read_text())
    document |= {"precision": "bfloat16", "arms": {ARM: document["arms"][ARM]}, "contrasts": []}
    for stage in document["stages"].values():
        if "steps" in stage:
            stage["steps"] = 2
    config = tmp_path / "smoke.yaml"
    config.write_text(yaml.safe_dump(document))
    program = [sys.executable, str(Path(__file__).with_name("s2d_on_stub.py")), start, "run", str(config)]
    result = subprocess.run(
        ["env", f"LD_PRELOAD={stub}", f"TRITON_LIBCUDA_PATH={stub.parent}", *program, "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
    )
    logs = "\n".join(path.read_text()[-1500:] for path in (tmp_path / "run").glob("*/*/log.txt"))
    assert result.returncode == 0, result.stderr + logs
    finished = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("run/stages/*/finished.json")}
    assert set(finished) == {"teacher_base", "student_base", "rl_teacher", "cache", "forward_kl", "opd", "stage3"}
    # Bytes of the GPU, not of the process, whose libraries alone are larger.
    assert all(0 < summary["peak_memory"] < 200 << 20 for summary in finished.values())
