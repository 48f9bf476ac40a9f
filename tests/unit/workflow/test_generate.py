"""Prompts of ``s2d generate``: through the chat template, or raw."""

import types
from pathlib import Path

import pytest

from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.data.tokenizer import load_tokenizer
from megatron_s2d.workflow.generate import GenerateRequest, _prompts

SMOKE = Path(__file__).resolve().parents[3] / "configs" / "smoke.yaml"


@pytest.fixture
def tokenizer(tmp_path):
    tokenizer = load_tokenizer("task:modular_arithmetic", tmp_path)
    tokenizer.chat_template = "[ {{ messages[0]['content'] }} ] {% if add_generation_prompt %}={% endif %}"
    return tokenizer


@pytest.mark.parametrize(("raw", "text"), [(False, "[ 1 + 2 ] ="), (True, "1 + 2")])
def test_prompts_go_through_the_chat_template_unless_they_are_raw(tokenizer, raw, text):
    request = GenerateRequest(Path("run"), "opd", ("1 + 2",), None, 4, 1, 1.0, None, 0, raw=raw)
    (prompt,) = _prompts(request, load_workflow(SMOKE), types.SimpleNamespace(tokenizer=tokenizer))
    assert prompt.text == text and tokenizer.decode(prompt.token_ids) == text
