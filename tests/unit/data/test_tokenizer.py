"""Chat templates and tokenizers are untrusted programs: no code, no questions, a time limit, a fixed date."""

import datetime
import json
import subprocess
import sys

import pytest

from megatron_s2d.data import tokenizer as module
from megatron_s2d.data.tokenizer import load_tokenizer, render, template_fingerprint, tokenizer_fingerprint
from megatron_s2d.errors import UserError

DATE = datetime.date(2026, 1, 1)
QUESTION = [{"role": "user", "content": "1 + 1 ="}]


@pytest.fixture
def tokenizer(tmp_path):
    return load_tokenizer("task:modular_arithmetic", tmp_path)


def test_templates_that_write_the_date_get_the_configured_one(tokenizer):
    tokenizer.chat_template = "Today is {{ strftime_now('%d %b %Y') }}. {{ messages[0]['content'] }}"
    assert render(QUESTION, tokenizer, DATE) == "Today is 01 Jan 2026. 1 + 1 ="
    assert template_fingerprint(tokenizer, DATE) == template_fingerprint(tokenizer, DATE)
    assert template_fingerprint(tokenizer, DATE) != template_fingerprint(tokenizer, datetime.date(2026, 1, 2))


def test_the_template_fingerprint_sees_tokens_that_the_template_names(tokenizer):
    tokenizer.chat_template = "{{ eos_token }}{{ messages[0]['content'] }}"
    before = template_fingerprint(tokenizer, DATE)
    tokenizer.eos_token = "="
    assert template_fingerprint(tokenizer, DATE) != before


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 // messages|length - 1 }}{{ 1 / (messages|length - 1) }}", "ZeroDivisionError: division by zero"),
        ("{{ messages[7].content.missing }}", "rejects a conversation of user"),
        ("{{ messages[0]['content'] + 1 }}", "fails on a conversation of user .TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on a conversation of user .RecursionError"),
        ("{{ raise_exception('no') }}", "rejects a conversation of user: no"),
    ],
)
def test_a_template_that_fails_is_one_line(tokenizer, template, message):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message) as caught:
        render(QUESTION, tokenizer, DATE)
    assert "\n" not in str(caught.value)


def test_a_template_that_never_ends_is_stopped(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_TEMPLATE_SECONDS", 0.2)
    loops = "".join(f"{{% for x{i} in range(90000) %}}" for i in range(4)) + "{% endfor %}" * 4
    tokenizer.chat_template = loops
    with pytest.raises(UserError, match="did not end within 0.2 s"):
        render(QUESTION, tokenizer, DATE)


def test_code_of_a_tokenizer_is_neither_run_nor_asked_about(tmp_path):
    """Standard input stays open and silent: a question on it would wait for ever."""
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil"}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    code = (
        "import sys\nfrom pathlib import Path\nfrom megatron_s2d.data.tokenizer import load_tokenizer\n"
        "from megatron_s2d.errors import UserError\n"
        "try: load_tokenizer(sys.argv[1], Path(sys.argv[1]))\nexcept UserError as error: print(error)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    output = process.stdout.read()  # the write end of its standard input is still open here
    process.stdin.close()
    assert process.wait() == 0 and "cannot be loaded" in output and output.count("\n") == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "["),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "[[[["),
        ("tokenizer_config.json", ""),
    ],
)
def test_a_damaged_tokenizer_is_one_line(tokenizer, tmp_path, name, content):
    (tmp_path / "modular_arithmetic" / name).write_text(content)
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_tokenizer(str(tmp_path / "modular_arithmetic"), tmp_path)
    assert "\n" not in str(caught.value)


def test_fingerprints_are_of_the_content(tokenizer, tmp_path):
    again = load_tokenizer(str(tmp_path / "modular_arithmetic"), tmp_path)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)


@pytest.mark.parametrize(
    "modulus", ["0", "2", "03", "998", "\u00b2", "\u0661\u0667", "99999", "17/../x", "-3", "1e3", " 17"]
)
def test_modulus_of_the_task_is_a_number_that_can_be_tokenized(tmp_path, modulus):
    with pytest.raises(UserError, match="with a modulus of 3 to 997"):
        load_tokenizer(f"task:modular_arithmetic/{modulus}", tmp_path)
    assert not list(tmp_path.iterdir())
