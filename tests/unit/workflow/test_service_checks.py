"""What plans say of served teachers, and what their servers are refused for before they load anything."""

from __future__ import annotations

import json

import pytest

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.needed_stages import stage_views
from megatron_s2d.config.teacher_service import service_key
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.errors import UserError
from megatron_s2d.teachers.service.info import TeacherInfo
from megatron_s2d.workflow.plan import make_plan
from megatron_s2d.workflow.serve_teacher import load_serve_config
from megatron_s2d.workflow.service_checks import service_lines, service_warnings

CONFIG = "configs/teacher_service.yaml"


def workflow(*overrides: str):
    return load_workflow(CONFIG, list(overrides))


def info(preset: str = "tiny-teacher", dtype: str = "bfloat16") -> TeacherInfo:
    spec = ModelConfig(preset=preset, vocab_size=25).resolve().to_dict()
    return TeacherInfo(1, "i", "w", ["d"], 8192, spec, dtype, "t", 100)


@pytest.mark.parametrize(
    ("setting", "first"),
    [
        ("kl_estimator=full_vocab", "hidden 192 B; "),
        ("kl_estimator=top_k", "top_k of the student 308 B; "),
        ("top_k_source=teacher", "top_k of the teacher 204 B; "),
    ],
)
def test_the_plan_says_what_a_token_costs(setting, first):
    kind = ["stages.opd_served.kl_estimator=top_k"] if "source" in setting else []
    config = workflow(f"stages.opd_served.{setting}", *kind)
    key = "stages.opd_served.teacher_service"
    (line,) = service_lines(config, {key: info()})
    assert f"as this stage asks: {first}" in line and "none of them in the trainer" in line and "sampled 4 B" in line
    assert ("but its output layer (4.7 KiB" in line) == ("full_vocab" in setting)
    (line,) = service_lines(config, {key: "http://127.0.0.1:8400 does not answer now (refused)"})
    assert "does not answer now" in line


def test_the_plan_says_what_a_token_of_grpo_costs():
    key = "stages.grpo_served.teacher_advantage.teacher_service"
    assert key == service_key("grpo_served", workflow().stages["grpo_served"], None)
    (line,) = service_lines(workflow(), {key: info()})
    assert line.endswith("as this stage asks: sampled 4 B") and "output layer" not in line


def test_servers_of_other_machines_without_a_key_are_named(tmp_path):
    assert list(service_warnings(workflow(), ["opd_served"])) == []
    far = "stages.opd_served.teacher_service.url=http://10.0.0.5:1"
    (line,) = service_warnings(workflow(far), ["opd_served"])
    assert "http://10.0.0.5:1 without an API key" in line
    key = f"stages.opd_served.teacher_service.api_key_file={tmp_path}"
    assert list(service_warnings(workflow(far, key), ["opd_served"])) == []
    of_grpo = "stages.grpo_served.teacher_advantage.teacher_service"
    (line,) = service_warnings(workflow(f"{of_grpo}.url=http://10.0.0.5:1"), ["grpo_served"])
    assert line.startswith(f"{of_grpo}: responses go to http://10.0.0.5:1 without")


@pytest.mark.parametrize(
    ("stage", "owner"), [("opd_served", "teacher_service"), ("grpo_served", "teacher_advantage.teacher_service")]
)
def test_a_teacher_may_move_and_other_weights_run_the_stage_again(tmp_path, stage, owner):
    def key(*overrides: str) -> str:
        jobs = make_plan(workflow(*overrides), tmp_path)
        return next(job.key for job in jobs if job.id == f"stages/{stage}")

    service = f"stages.{stage}.{owner}"
    assert key() == key(f"{service}.url=http://10.0.0.5:1", f"{service}.overlap=false")
    assert key() != key(f"{service}.weights_digest=abc")


def test_stages_of_grpo_from_before_it_could_have_a_service_are_reused(tmp_path):
    jobs = {job.id: job for job in make_plan(workflow(), tmp_path)}
    settings = jobs["stages/grpo_in_trainer"].resolved["stage"]["teacher_advantage"]
    assert settings.keys() == {"teacher", "weight", "final_weight"}


def test_views_of_served_teachers_are_rendered_with_their_own_template(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[-1]['content'] }}")
    service = "stages.opd_served.teacher_service"
    config = workflow(f"{service}.chat_template={template}", "stages.opd_served.teacher_view={chat_template: teacher}")
    (view,) = stage_views(config, "opd_served")
    assert view.relation == "teacher" and view.model is None and view.renderer.chat_template == template
    (view,) = stage_views(workflow("stages.opd_served.teacher_view={enable_thinking: true}"), "opd_served")
    assert view.renderer.chat_template is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=DIR", "parallel.data_parallel_size=2"], "a server is one replica"),
        (["model.path=/nowhere"], "no such directory"),
        (["model.path=DIR"], "has no tokenizer"),
        (["model.path=DIR", "tokenizer=task:modular_arithmetic", "host=0.0.0.0"], "name a file with a key"),
        (["model.preset=tiny-teacher"], "has a `path`"),
    ],
)
def test_servers_are_refused_in_one_line(overrides, message, tmp_path):
    spec = ModelConfig(preset="tiny-teacher", vocab_size=25).resolve()
    from megatron_s2d.config.hf_config import hf_config_from_spec

    (tmp_path / "config.json").write_text(json.dumps(hf_config_from_spec(spec, "float32")))
    file = tmp_path / "teacher.yaml"
    file.write_text("port: 8400\n")
    with pytest.raises(UserError, match=message):
        load_serve_config(file, None, [text.replace("DIR", str(tmp_path)) for text in overrides])
