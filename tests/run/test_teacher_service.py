"""Distillation from ``s2d serve-teacher``: the figures of a teacher in the trainer, and kills of either side."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
from s2d import ROOT, SMOKE, metrics, processes_of, s2d, s2d_here, start, wait_for

sys.path.insert(0, str(ROOT / "tests" / "dist"))
from teacher_server import running, start_server

CONFIG = ROOT / "configs" / "teacher_service.yaml"
SHORT = ("stages.teacher.steps=20", "stages.student.steps=10", "data.problems.num_prompts=16")


def overrides(*settings: str) -> list[str]:
    return [part for setting in (*SHORT, *settings) for part in ("--set", setting)]


def assert_agree(rows: list[dict], expected: list[dict]) -> None:
    """Compare metrics up to rounding; of the rollout's mismatch, which is rounding, not the histogram."""
    assert len(rows) == len(expected)
    for pair in zip(rows, expected, strict=True):
        mine, other = ({name: value for name, value in row.items() if "/hist/" not in name} for row in pair)
        assert mine == pytest.approx(other, rel=2e-5, abs=2e-5)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run with a teacher, a start of the student, and the arm that needs no server."""
    directory = tmp_path_factory.mktemp("service") / "run"
    finished = s2d("run", CONFIG, "--out", directory, *overrides("arms={opd_in_trainer: opd_in_trainer}"))
    assert finished.returncode == 0, finished.stderr
    return directory


@pytest.mark.parametrize(
    ("method", "key", "payload", "steps"),
    [
        ("opd", "teacher_service", "hidden 384 B", 6),
        pytest.param("grpo", "teacher_advantage.teacher_service", "sampled 4 B", 4, marks=pytest.mark.slow),
    ],
)
def test_a_served_teacher_gives_the_figures_of_one_in_the_trainer(run_dir, method, key, payload, steps):
    names = [f"{method}_{name}" for name in ("served", "in_trainer")]
    key = f"stages.{names[0]}.{key}"
    with running(run_dir / "stages/teacher/model") as server:
        settings = overrides(f"arms={{{', '.join(f'{name}: {name}' for name in names)}}}", f"{key}.url={server.url}")
        plan = s2d_here("run", CONFIG, "--out", run_dir, "--dry-run", *settings)
        line = next(line for line in plan.stdout.splitlines() if "none of them in the trainer" in line)
        assert line.startswith(f"{key}: ") and f"as this stage asks: {payload}" in line and "sampled 4 B" in line
        finished = s2d("run", CONFIG, "--out", run_dir, *settings)
        assert finished.returncode == 0, finished.stderr
        assert server.close() == 0
    served, expected = (metrics(run_dir, f"stages/{name}") for name in names)
    assert len(served) == steps and all("kl" in row for row in served)
    assert_agree(served, expected)
    rows = [run_dir / "evaluations" / name / "evaluation.jsonl" for name in names]
    assert rows[0].read_bytes() == rows[1].read_bytes()


@pytest.mark.slow
def test_a_teacher_by_spans_of_text_is_exact_where_tokenizers_agree(run_dir):
    """The same tokenizer as if it were another one: every span is one token, and the reward is that of the tokens."""
    exact = "extends: opd_served, kl_estimator: sampled_token, teacher_service: {url: URL}"
    spans = exact.replace("URL", "URL, cross_tokenizer: true, tokenizer: 'task:modular_arithmetic'")
    with running(run_dir / "stages/teacher/model") as server:
        stages = {"exact": exact, "spans": f"{spans}, teacher_view: {{chat_template: teacher}}"}
        settings = [f"stages.{name}={{{text.replace('URL', repr(server.url))}}}" for name, text in stages.items()]
        arms = "arms={exact: exact, spans: spans}"
        finished = s2d("run", CONFIG, "--out", run_dir, *overrides(arms, *settings))
    assert finished.returncode == 0, finished.stderr
    mine, expected = (metrics(run_dir, f"stages/{name}") for name in ("spans", "exact"))
    assert len(mine) == 6
    assert_agree(mine, expected)
    largest = max(abs(row["kl"] - other["kl"]) for row, other in zip(mine, expected, strict=True))
    print(f"largest difference of a step's kl: {largest:.1e} nats")


@pytest.mark.slow
def test_a_run_outlives_its_server_and_refuses_another_teacher(run_dir, tmp_path):
    steps = ("arms={served: opd_served}", "stages.opd_served.steps=60", "stages.opd_served.train_batch_size=4")
    path = run_dir / "stages/opd_served/metrics.jsonl"

    def num_rows() -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    first = start_server(run_dir / "stages/teacher/model")
    port = f"port={first.url.rpartition(':')[2]}"
    settings = overrides(*steps, f"stages.opd_served.teacher_service.url={first.url}")
    run = start("run", CONFIG, "--out", run_dir, *settings)
    wait_for(lambda: num_rows() >= 3, run)
    first.kill()
    rows = num_rows()
    second = start_server(run_dir / "stages/teacher/model", port)  # the same weights: the run goes on
    wait_for(lambda: num_rows() >= rows + 3, run)
    second.kill()
    third = start_server(run_dir / "stages/student/model", port)
    output, _ = run.communicate()
    assert run.returncode == 1 and "does not hold the teacher with which this stage began" in output
    third.kill()
    with running(run_dir / "stages/teacher/model", port):
        run = start("run", CONFIG, "--out", run_dir, *settings)
        rows = num_rows()
        wait_for(lambda: num_rows() >= rows + 3, run)
        run.send_signal(signal.SIGKILL)
        run.wait()
        wait_for(lambda: not processes_of(run_dir))
        finished = s2d("run", CONFIG, "--out", run_dir, *settings)
        assert finished.returncode == 0, finished.stderr
        broken = metrics(run_dir, "stages/opd_served")
        unbroken = tmp_path / "unbroken"
        (unbroken / "stages").mkdir(parents=True)
        finished = s2d("run", CONFIG, "--out", unbroken, *settings)
        assert finished.returncode == 0, finished.stderr
    assert broken == metrics(unbroken, "stages/opd_served") and len(broken) == 60


@pytest.mark.slow
def test_s2d_with_a_served_teacher_gives_the_figures_of_one_in_the_trainer(unbroken, tmp_path):
    """GRPO of the teacher, forward KL, OPD from its server, GRPO of the student, against a run without a server."""
    arm = ["--set", "arms={half_bridge_stage3: stage3}", "--set", "contrasts=[]"]
    for stage in ("teacher_base", "student_base", "rl_teacher", "cache", "forward_kl"):
        shutil.copytree(unbroken / "stages" / stage, tmp_path / "run/stages" / stage)
    with running(unbroken / "stages/rl_teacher/model") as server:
        settings = ["stages.opd.teacher=null", f"stages.opd.teacher_service={{url: '{server.url}'}}"]
        finished = s2d("run", SMOKE, "--out", tmp_path / "run", *arm, *(p for s in settings for p in ("--set", s)))
    assert finished.returncode == 0, finished.stderr
    for stage in ("opd", "stage3"):
        mine, expected = (metrics(run_dir, f"stages/{stage}") for run_dir in (tmp_path / "run", unbroken))
        assert mine and all("reverse_kl" in row for row in mine) == (stage == "opd")
        assert_agree(mine, expected)
    results = [
        json.loads((run_dir / "results.json").read_text())["arms"]["half_bridge_stage3"]
        for run_dir in (tmp_path / "run", unbroken)
    ]
    print("avg@k of the student after stage 3:", *(result["avg_at_k"] for result in results))
    assert results[0]["avg_at_k"] == results[1]["avg_at_k"] > 0
