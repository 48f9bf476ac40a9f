"""Conversations between fixed texts are those that the chat template renders, whatever their message is."""

import datetime

import pytest

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("transformers")

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megatron_s2d.config.data import FileSource
from megatron_s2d.data import rendering
from megatron_s2d.data.chat_frames import frame_of
from megatron_s2d.data.columns_of_rows import ProblemColumns, text_array
from megatron_s2d.data.rendering import PromptRenderer
from megatron_s2d.data.tokenizer import render
from megatron_s2d.errors import UserError

DATE = datetime.date(2026, 1, 1)
MESSAGES = [
    "What is 3 + 4?", " blanks ", "\u2003wide", "é", "e\u0301", "{{ x }}{% if %}", "<tool_response>x</tool_response>",
    "<tool_response>", "a</think>b", "x" * 5000, "0", "False", "'\"\\\n", "<b>&amp;</b>", "tab\t", "UPPER", "system",
    "none", "[1]",
]  # fmt: skip
PLAIN = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '</>' }}{% endfor %}"
FRAMED = {
    "plain": PLAIN,
    "attribute": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    ),
    "twice": "{{ messages[-1].content }} - again - {{ messages[-1]['content'] }}",
    "trim": "{% for m in messages %}[{{ m['content'] | trim }}]{% endfor %}",
    "strip": "{% for m in messages %}[{{ m['content'].strip() + '!' }}]{% endfor %}",
    "questions": (
        "{% set ns = namespace(tool=false) %}{% for m in messages %}{% if m.content is string and "
        "m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>') %}{% set ns.tool = true %}"
        "{% endif %}{% if '</think>' in m.content %}T{% elif m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
        "{{ ns.tool }}{{ loop is defined }}{{ enable_thinking }}{{ strftime_now('%Y') }}"
    ),
    "truth": "{% for m in messages %}{% if m.content %}{{ m.content }}{% else %}nothing{% endif %}{% endfor %}",
    "tools": "{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[-1].content }}{{ messages | length }}",
}
READ = {
    "upper": "{{ messages[-1].content | upper }}", "length": "{{ messages[-1].content | length }}",
    "json": "{{ messages[-1].content | tojson }}", "slice": "{{ messages[-1].content[1:] }}",
    "equal": "{% if messages[-1].content == 'system' %}x{% endif %}{{ messages[-1].content }}",
    "in": "{% if messages[-1].content in 'some system text' %}x{% endif %}{{ messages[-1].content }}",
    "of a list": "{% if messages[-1].content in ['system'] %}x{% endif %}{{ messages[-1].content }}",
    "argument": "{% if 'a system'.endswith(messages[-1].content) %}x{% endif %}{{ messages[-1].content }}",
    "joined": "{% set t = messages[-1].content ~ '' %}{% if t == 'system' %}x{% endif %}{{ t }}",
    "added": "{% set t = messages[-1].content + '' %}{% if t == 'system' %}x{% endif %}{{ t }}",
    "block": "{% set t %}{{ messages[-1].content }}{% endset %}{% if t == 'system' %}x{% endif %}{{ t }}",
    "macro": "{% macro f(t) %}{% if t == 'system' %}x{% endif %}{{ t }}{% endmacro %}{{ f(messages[-1].content) }}",
    "number": "{% if messages[-1].content | int == 0 %}x{% endif %}{{ messages[-1].content }}",
    "format": "{% set t = '%s' % messages[-1].content %}{% if t == 'system' %}x{% endif %}{{ t }}",
    "key": "{% set d = {'system': 'x'} %}{{ d[messages[-1].content] }}{{ messages[-1].content }}",
    "loop": "{% for c in messages[-1].content %}{{ c }}{% endfor %}",
    "replace": "{{ messages[-1].content.replace('a', 'b') }}", "split": "{{ messages[-1].content.split('a')[0] }}",
    "strip of some": "{{ messages[-1].content.strip('x') }}", "compared": "{{ messages[-1].content < 'b' }}",
    "sorted": "{{ messages | map(attribute='content') | join }}", "refused": "{{ raise_exception('no') }}",
    "is in": "{% if messages[-1].content is in 'some system text' %}x{% endif %}{{ messages[-1].content }}",
    "keyword": "{{ '{x}'.format(x=messages[-1].content) }}{{ messages[-1].content }}",
    "nowhere": "always the same", "starts with its own": "{{ messages[-1].content.startswith(messages[-1].content) }}",
}  # fmt: skip


def tokenizer_of(template):
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), eos_token="a", chat_template=template
    )


def conversation(text):
    return [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}]


def frame(template, tools=None):
    return frame_of(tokenizer_of(template), DATE, conversation, enable_thinking=False, tools=tools)


@pytest.mark.parametrize("name", FRAMED)
def test_framed_messages_are_rendered_ones(name):
    tools = [{"type": "function", "function": {"name": "f"}}] if name == "tools" else None
    tokenizer, found = tokenizer_of(FRAMED[name]), frame(FRAMED[name], tools)
    column = pyarrow.array(["before", *MESSAGES])[1:]
    framed, others = found.texts(column).to_pylist(), found.others(column).tolist()
    for message, text, other in zip(MESSAGES, framed, others, strict=True):
        if not other:
            assert text == render(conversation(message), tokenizer, DATE, tools=tools)
    assert not others[0] and sum(others) < 11
    assert sum(others) > (0 if name in ("trim", "strip", "questions") else -1)


@pytest.mark.parametrize("name", READ)
def test_a_template_that_reads_its_message_has_no_frame(name):
    assert frame(READ[name]) is None


@pytest.mark.parametrize("template", [*FRAMED.values(), READ["upper"], READ["in"]])
@pytest.mark.parametrize("first", [0, 1, 6])
def test_prompts_in_frames_are_those_rendered_one_by_one(template, first, monkeypatch):
    source = FileSource.model_validate({"path": "a.jsonl", "template": "Q: {question}", "system_prompt": "Be kind."})
    messages = MESSAGES[first:]
    column = text_array(messages)
    problems = ProblemColumns(column, column, column, pyarrow.nulls(len(column), pyarrow.string()), {})
    expected = [render(conversation(f"Q: {text}"), tokenizer_of(template), DATE) for text in messages]
    renderer = PromptRenderer(source, tokenizer_of(template), DATE)
    assert renderer(problems).column("text").to_pylist() == expected
    rendered, own = [], rendering.render_all
    monkeypatch.setattr(
        rendering, "render_all", lambda *args, **kwargs: rendered.extend(args[0]) or own(*args, **kwargs)
    )
    assert renderer(problems).column("text").to_pylist() == expected
    assert len(rendered) < len(messages) or template in READ.values()


def test_a_message_that_a_template_refuses_is_named():
    template = "{% if '</think>' in messages[-1].content %}{{ raise_exception('no thoughts') }}{% endif %}" + PLAIN
    source = FileSource.model_validate({"path": "a.jsonl", "template": "plain"})
    column = text_array(["a", "b</think>"])
    problems = ProblemColumns(column, column, column, pyarrow.nulls(2, pyarrow.string()), {})
    with pytest.raises(UserError, match="rejects a conversation of user: no thoughts"):
        PromptRenderer(source, tokenizer_of(template), DATE)(problems)
    assert len(PromptRenderer(source, tokenizer_of(template), DATE)(problems[:1])) == 1
