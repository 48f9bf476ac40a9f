"""Prompts from files: schemas, templates, filters, and the messages for bad input."""

import datetime
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_s2d.config.base import parse
from megatron_s2d.config.data import FileSource
from megatron_s2d.data.prompts import load_prompts
from megatron_s2d.errors import UserError

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no benchmark files in shared/data beside the repository")

# Like that of Qwen3: an empty thought if thinking is off.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

DATE = datetime.date(2026, 1, 1)


def _tokenizer(template=TEMPLATE):
    special = ["<|im_start|>", "<|im_end|>", "<bos>"]
    words = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<bos>", chat_template=template
    )


@pytest.fixture(scope="module")
def tokenizer():
    return _tokenizer()


def _source(path, **settings):
    return parse(FileSource, {"type": "file", "path": path, **settings}, "test")


def _write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _load(path, tokenizer, max_tokens=None, **settings):
    return load_prompts(_source(path, **settings), tokenizer, max_prompt_length=max_tokens, date=DATE)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_named_columns(tmp_path, tokenizer, suffix):
    rows = [{"key": "a", "q": "What is {1}?", "a": 1, "s": "It is 1."}, {"key": "b", "q": "2?", "a": 2, "s": "2."}]
    path = _write(tmp_path / f"sums{suffix}", rows)
    columns = {"id": "key", "question": "q", "answer": "a", "solution": "s"}
    prompts = _load(path, tokenizer, columns=columns, domain="sums").prompts
    assert [(p.id, p.answer, p.domain, p.verifier) for p in prompts] == [
        ("sums/a", "1", "sums", "math"),
        ("sums/b", "2", "sums", "math"),
    ]
    assert prompts[0].text == (
        "<|im_start|>user\nWhat is {1}?\nPlease reason step by step, and put your final answer within \\boxed{}."
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert tokenizer.decode(prompts[0].token_ids) == prompts[0].text  # no second start token
    assert tokenizer.decode(prompts[0].solution_token_ids) == "It is 1.<|im_end|>"


def test_prompts_without_labels(tmp_path, tokenizer):
    path = _write(tmp_path / "a.jsonl", [{"question": "Why?"}])
    prompt = _load(path, tokenizer, verifier=None, columns={"answer": None}, template="plain").prompts[0]
    assert (prompt.verifier, prompt.answer, prompt.solution_token_ids) == (None, None, None)
    assert "user\nWhy?<|im_end|>" in prompt.text


def test_without_a_chat_template_the_tokenizer_adds_its_start_token(tmp_path):
    path = _write(tmp_path / "a.jsonl", [{"question": "Why?", "answer": "4"}])
    plain = _tokenizer(template=None)
    prompt = _load(path, plain, template="plain").prompts[0]
    assert prompt.text == "Why?" and plain.decode(prompt.token_ids) == "<bos>Why?"


def test_system_prompt_and_a_template_without_one(tmp_path, tokenizer):
    path = _write(tmp_path / "a.jsonl", [{"question": "Why?", "answer": "4"}])
    text = _load(path, tokenizer, system_prompt="Be brief.").prompts[0].text
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?")
    strict = _tokenizer("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x")
    with pytest.raises(UserError, match="rejects a conversation of system, user: no system"):
        _load(path, strict, system_prompt="Be brief.")


DAPO_QUESTION = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "{form} where $Answer is the answer to the problem.\n\nFind $x$.\n\nIt is small.\n\nRemember to put your answer on "
    'its own line after "Answer:".'
)


@pytest.mark.parametrize("form", ["$Answer (without quotes)", "\\boxed{$Answer}"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_dapo_in_both_published_forms(tmp_path, tokenizer, form, suffix):
    messages = [{"role": "user", "content": DAPO_QUESTION.replace("{form}", form)}]
    if suffix == ".parquet":
        row = {
            "data_source": "math_dapo",
            "prompt": messages,
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule"},
            "extra_info": {"index": "9a9b"},
        }
    else:
        row = {"prompt": messages, "label": "34"}
    path = _write(tmp_path / f"dapo{suffix}", [row])
    prompt = _load(path, tokenizer, schema="dapo").prompts[0]
    assert prompt.answer == "34"
    assert prompt.id == ("dapo/9a9b" if suffix == ".parquet" else "dapo/0")
    assert "user\nFind $x$.\n\nIt is small.\nPlease reason step by step" in prompt.text
    assert "Remember" not in prompt.text and "Solve the following" not in prompt.text
    plain = _load(path, tokenizer, schema="dapo", template="plain").prompts[0]
    assert messages[0]["content"] in plain.text and "Please reason" not in plain.text


def test_rows_with_a_repeated_id(tmp_path, tokenizer):
    rows = [
        {"prompt": [{"role": "user", "content": q}], "reward_model": {"ground_truth": "1"}, "extra_info": {"index": i}}
        for q, i in [("a", "x"), ("b", "y"), ("a", "x"), ("c", "z"), ("b", "y")]
    ]
    path = _write(tmp_path / "dapo.parquet", rows)
    with pytest.raises(UserError, match="row 3: duplicate id 'dapo/x'.*on_duplicate_id: drop"):
        _load(path, tokenizer, schema="dapo")
    result = _load(path, tokenizer, schema="dapo", on_duplicate_id="drop")
    assert [p.id for p in result.prompts] == ["dapo/x", "dapo/y", "dapo/z"] and result.dropped_duplicates == 2
    assert len(_load(path, tokenizer, schema="dapo", on_duplicate_id="drop", limit=2).prompts) == 2


def test_deepmath(tmp_path, tokenizer):
    row = {"question": "Limit?", "final_answer": "0", "difficulty": 6.0, "topic": "t", "r1_solution_1": "So \\boxed{0}"}
    prompt = _load(_write(tmp_path / "d.parquet", [row]), tokenizer, schema="deepmath").prompts[0]
    assert prompt.answer == "0" and tokenizer.decode(prompt.solution_token_ids) == "So \\boxed{0}<|im_end|>"


def test_gsm8k_labels(tmp_path, tokenizer):
    path = _write(tmp_path / "g.jsonl", [{"question": "How many?", "answer": "2 * 600 = 1200\n#### 1,200"}])
    assert _load(path, tokenizer, schema="gsm8k").prompts[0].answer == "1200"
    path = _write(tmp_path / "h.jsonl", [{"question": "How many?", "answer": "1,200"}])
    with pytest.raises(UserError, match="row 1: 'answer' has no '####'"):
        _load(path, tokenizer, schema="gsm8k")


@needs_data
@pytest.mark.parametrize(
    ("name", "schema", "count", "answer"),
    [
        ("math500", "math500", 500, "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("gsm8k_test", "gsm8k", 1319, "18"),
        ("aime24", "competition", 30, "204"),
        ("aime25", "competition", 30, "70"),
        ("hmmt25_feb", "competition", 30, "103"),
        ("hmmt25_nov", "competition", 30, "3"),
    ],
)
def test_benchmark_files(name, schema, count, answer, tokenizer):
    prompts = _load(DATA / f"{name}.jsonl", tokenizer, schema=schema).prompts
    assert len(prompts) == count == len({p.id for p in prompts}) and prompts[0].answer == answer
    assert all(p.answer for p in prompts)
    assert all((p.solution_token_ids is not None) == (schema != "competition") for p in prompts)


@needs_data
@pytest.mark.parametrize(("name", "count"), [("humaneval", 164), ("mbpp_plus", 378)])
def test_code_files(name, count, tokenizer):
    settings = {"schema": name, "verifier": "code", "domain": "code", "template": "code"}
    prompts = _load(DATA / f"{name}.jsonl", tokenizer, **settings).prompts
    assert len(prompts) == count
    labels = [json.loads(p.answer) for p in prompts]
    assert all(label["entry_point"] in p.text for p, label in zip(prompts, labels, strict=True) if name == "humaneval")
    assert "Present the code in\n```python\nYour code\n```\nat the end." in prompts[0].text
    if name == "mbpp_plus":
        by_name = {label["entry_point"]: label for label in labels}
        assert by_name["similar_elements"]["compare"] == "set"
        assert by_name["similar_elements"]["example"] == "((3, 4, 5, 6), (5, 7, 4, 10))"
        assert by_name["text_match_three"]["compare"] == "truth" and by_name["is_not_prime"]["compare"] == "equal"
        assert by_name["volume_sphere"]["tolerance"] == 1e-4


def test_length_filter(tmp_path, tokenizer):
    rows = [{"question": "x" * length, "answer": "1"} for length in (1, 50, 2)]
    path = _write(tmp_path / "a.jsonl", rows)
    lengths = [len(p.token_ids) for p in _load(path, tokenizer).prompts]
    assert lengths[1] == lengths[0] + 49
    result = _load(path, tokenizer, max_tokens=lengths[1] - 1)
    assert [p.id for p in result.prompts] == ["a/0", "a/2"] and result.dropped_too_long == 1
    assert _load(path, tokenizer, max_tokens=lengths[1]).dropped_too_long == 0
    with pytest.raises(UserError, match=f"a/1 has {lengths[1]} tokens, max_prompt_length is 40"):
        _load(path, tokenizer, max_tokens=40, on_long_prompt="error")
    with pytest.raises(UserError, match="all prompts of .* are longer than max_prompt_length 3"):
        _load(path, tokenizer, max_tokens=3)


CODE = {"schema": "mbpp_plus", "verifier": "code"}


def _mbpp(**changed):
    row = {
        "task_id": "Mbpp/1", "entry_point": "f", "prompt": '"""Double. assert f(1) == 2\nassert f(1) == 2"""',
        "assertion": "assert f(1) == 2", "canonical_solution": "def f(x):\n    return 2 * x", "base_input": [[1]],
        "plus_input": [[2]], "atol": 0,
    }  # fmt: skip
    return json.dumps(row | changed)


def test_mbpp_row(tmp_path, tokenizer):
    (tmp_path / "m.jsonl").write_text(_mbpp())
    label = json.loads(_load(tmp_path / "m.jsonl", tokenizer, **CODE).prompts[0].answer)
    assert label["inputs"] == [[1], [2]] and label["example"] == "(1,)" and label["compare"] == "equal"


def test_no_file_gives_a_one_line_error(tokenizer):
    with pytest.raises(UserError, match="path") as caught:
        _load([], tokenizer)
    assert "\n" not in str(caught.value)


def test_json_numbers_are_read_exactly(tmp_path, tokenizer):
    answers = [1, 1.5, "one", 10**30, 1e22, True, "007", -2.5e-7]
    rows = [{"question": "q", "answer": answer} for answer in answers]
    expected = ["1", "1.5", "one", "1" + "0" * 30, "1" + "0" * 22, "True", "007", "-0.00000025"]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + _write(tmp_path / "a.jsonl", rows).read_bytes())
    for name in ("a.jsonl", "list.json", "marked.jsonl"):
        assert [prompt.answer for prompt in _load(tmp_path / name, tokenizer).prompts] == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_nested_columns(tmp_path, tokenizer, suffix):
    path = _write(tmp_path / f"a{suffix}", [{"q": {"text": "Why?"}, "reward_model": {"ground_truth": 3}}])
    columns = {"question": "q.text", "answer": "reward_model.ground_truth"}
    prompt = _load(path, tokenizer, columns=columns).prompts[0]
    assert prompt.answer == "3" and "user\nWhy?\n" in prompt.text
    with pytest.raises(UserError, match=r"row 1: no column 'r.x' .*\(columns: q, reward_model\)"):
        _load(path, tokenizer, columns=columns | {"answer": "r.x"})


def test_files_of_the_same_name_in_two_folders(tmp_path, tokenizer):
    paths = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        paths.append(_write(tmp_path / folder / "train.jsonl", [{"question": folder, "answer": "1"}] * 2))
    ids = ["one/train/0", "one/train/1", "two/train/0", "two/train/1"]
    assert [p.id for p in _load(paths, tokenizer).prompts] == ids
    assert [p.id for p in _load(paths, tokenizer, limit=3).prompts] == ids[:3]
    other = _write(tmp_path / "one" / "train.parquet", [{"question": "q", "answer": "1"}])
    assert [p.id for p in _load([paths[0], other], tokenizer, limit=3).prompts][::2] == [
        "train.jsonl/0",
        "train.parquet/0",
    ]
    with pytest.raises(UserError, match="train.jsonl: the file appears twice"):
        _load([paths[0], paths[0]], tokenizer)


def test_min_values_filter_rows(tokenizer, tmp_path):
    rows = [{"question": f"q{n}", "answer": "1", "difficulty": n / 2} for n in range(6)]
    path = _write(tmp_path / "train.jsonl", rows)
    assert [p.id for p in _load(path, tokenizer, min_values={"difficulty": 1.5}).prompts] == [
        "train/3",
        "train/4",
        "train/5",
    ]
    assert [p.id for p in _load(path, tokenizer, min_values={"difficulty": 1}, limit=2).prompts] == [
        "train/2",
        "train/3",
    ]
    with pytest.raises(UserError, match="row 1: 'question' must be a number, not str"):
        _load(path, tokenizer, min_values={"question": 1})
    with pytest.raises(UserError, match="no column 'hardness'"):
        _load(path, tokenizer, min_values={"hardness": 1})


@pytest.mark.parametrize(
    ("schema", "row"),
    [
        ("columns", {"question": "Why?"}),
        ("dapo", {"prompt": [{"role": "user", "content": "Why?"}]}),
        ("deepmath", {"question": "Why?"}),
    ],
)
def test_no_label_is_needed_without_a_verifier(tmp_path, tokenizer, schema, row):
    path = _write(tmp_path / "a.jsonl", [row])
    prompt = _load(path, tokenizer, schema=schema, verifier=None).prompts[0]
    assert (prompt.verifier, prompt.answer) == (None, None) and "user\nWhy?\n" in prompt.text
    with pytest.raises(UserError, match="no column"):
        _load(path, tokenizer, schema=schema)


def test_earlier_messages_of_a_conversation_are_preserved(tmp_path, tokenizer):
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
    question = [{"role": "user", "content": "Why?"}]
    path = _write(tmp_path / "a.jsonl", [{"prompt": history + question, "label": "1"}])
    text = _load(path, tokenizer, schema="dapo", system_prompt="Be brief.").prompts[0].text
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>")
    assert "assistant\nYes?<|im_end|>\n<|im_start|>user\nWhy?\nPlease reason" in text
    with pytest.raises(UserError, match="no chat template"):
        _load(path, _tokenizer(template=None), schema="dapo")
    with_system = _write(
        tmp_path / "b.jsonl", [{"prompt": [{"role": "system", "content": "s"}, *question], "label": "1"}]
    )
    with pytest.raises(UserError, match="b/0 already has a system message"):
        _load(with_system, tokenizer, schema="dapo", system_prompt="Be brief.")


@pytest.mark.parametrize(
    ("name", "text", "settings", "message"),
    [
        ("none.jsonl", None, {}, "no such file"),
        ("a.csv", "x", {}, "not a .jsonl, .json, .parquet or .arrow file"),
        ("a.jsonl", "", {}, "the file is empty"),
        ("a.jsonl", "\n", {}, "no rows"),
        ("a.json", "[]", {}, "no rows"),
        ("a.json", "[1]", {}, "row 1: expected an object, got int"),
        ("a.json", "[{]", {}, "not valid JSON"),
        ("a.jsonl", '{"question": "q"', {}, "line 1: not valid JSON"),
        ("a.jsonl", b'{"question": "q", "answer": "1"}\n{"question": "\xff"}', {}, "line 2: not valid JSON .*utf-8"),
        ("a.jsonl", "[" * 100_000, {}, "line 1: not valid JSON"),
        ("a.parquet", "not parquet", {}, "cannot be read as parquet"),
        ("a.jsonl", '{"problem": "q", "level": 1}', {}, r"no column 'question' .*\(columns: problem, level\)"),
        ("a.jsonl", '{"question": "q"}', {"schema": "gsm8k"}, "no column 'answer' for schema gsm8k"),
        ("a.jsonl", '{"question": "q", "answer": "1"}\n{"question": "q"}', {}, "row 2: no column 'answer'"),
        ("a.jsonl", '{"question": "q", "answer": " "}', {}, "row 1: 'answer' is empty"),
        ("a.jsonl", '{"question": null, "answer": "1"}', {}, "row 1: 'question' is empty"),
        ("a.jsonl", '{"question": "q", "answer": NaN}', {}, "row 1: 'answer' is empty"),
        (
            "a.jsonl",
            '{"question": [{"role": "user"}], "answer": "1"}',
            {},
            "'question' must be text or a number, not list",
        ),
        ("a.jsonl", '{"question": "\\ud800", "answer": "1"}', {}, "'question' is not valid Unicode"),
        ("a.jsonl", '{"prompt": "q", "label": "1"}', {"schema": "dapo"}, "'prompt' is not a list of messages"),
        (
            "a.jsonl",
            '{"prompt": [{"role": "user"}], "label": "1"}',
            {"schema": "dapo"},
            "lacks text for role or content",
        ),
        (
            "a.jsonl",
            '{"prompt": [{"role": "assistant", "content": "q"}], "label": "1"}',
            {"schema": "dapo"},
            "last message of 'prompt' is from the assistant",
        ),
        (
            "a.jsonl",
            '{"prompt": [{"role": "user", "content": "q"}], "reward_model": "1"}',
            {"schema": "dapo"},
            "'reward_model.ground_truth' is empty",
        ),
        ("a.jsonl", "[1]", {"schema": "mbpp_plus", "verifier": "code"}, "line 1: expected an object, got list"),
        ("a.jsonl", _mbpp(prompt="not a literal"), CODE, "row 1: 'prompt', .* does not follow MBPP"),
        ("a.jsonl", _mbpp(assertion="pass"), CODE, "no assert"),
        ("a.jsonl", _mbpp(assertion="assert g(1) == 1"), CODE, "assert without a call of f"),
        ("a.jsonl", _mbpp(base_input="[[1]]"), CODE, "'base_input' is not a list of arguments"),
        ("a.jsonl", _mbpp(atol="small"), CODE, "does not follow MBPP"),
        ("a.jsonl", "{}", {"schema": "humaneval"}, "set verifier: code"),
        ("a.jsonl", "{}", {"schema": "gsm9k"}, "schema"),
    ],
)
def test_bad_input_gives_a_one_line_error(tmp_path, tokenizer, name, text, settings, message):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as caught:
        _load(tmp_path / name, tokenizer, **settings)
    assert "\n" not in str(caught.value)


def test_a_template_of_ones_own_has_the_question_and_columns(tmp_path, tokenizer):
    rows = [{"question": "How many {x}?", "answer": "2", "meta": {"topic": "sets"}, "year": 2020}]
    path = _write(tmp_path / "rows.jsonl", rows)
    template = "On {meta.topic} ({year}): {question}\nWrite {{answer}}."
    (prompt,) = _load(path, tokenizer, template=template).prompts
    assert "On sets (2020): How many {x}?\nWrite {answer}.<|im_end|>" in prompt.text
    with pytest.raises(UserError, match="no column 'passage'"):
        _load(path, tokenizer, template="{passage} {question}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("mth", "is none of math, code, plain, and has no place"),
        ("{question", "expected '}'"),
        ("{question.__class__!r}", "a place is {column}"),
        ("{question:>9}", "a place is {column}"),
    ],
)
def test_templates_that_are_none(tmp_path, template, message):
    with pytest.raises(UserError, match=message):
        _source(tmp_path / "rows.jsonl", template=template)


@pytest.mark.parametrize("form", ["stream", "file"])
def test_folders_of_arrow_files(tmp_path, tokenizer, form):
    """As ``datasets`` saves them: shards beside two JSON files of its own."""
    folder = tmp_path / "saved"
    folder.mkdir()
    for name in ("dataset_info.json", "state.json"):
        (folder / name).write_text("{}")
    for shard in range(2):
        table = pa.Table.from_pylist([{"question": f"{shard} + {n} =", "answer": str(shard + n)} for n in range(3)])
        new = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
        with new(str(folder / f"data-0000{shard}-of-00002.arrow"), table.schema) as writer:
            writer.write_table(table)
    prompts = _load(folder, tokenizer).prompts
    assert len(prompts) == 6 and [prompt.answer for prompt in prompts] == ["0", "1", "2", "1", "2", "3"]
    assert prompts[3].id == "data-00001-of-00002/0"
    (folder / "data-00000-of-00002.arrow").write_bytes(b"not arrow, but longer than a header")
    with pytest.raises(UserError, match="cannot be read as Arrow"):
        _load(folder, tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no such file"):
        _load(tmp_path / "empty", tokenizer)


def test_datasets_own_folders_are_read(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    rows = [{"question": "1 + 1 =", "answer": "2"}, {"question": "2 + 2 =", "answer": "4"}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    assert [prompt.answer for prompt in _load(tmp_path / "saved", tokenizer).prompts] == ["2", "4"]


def test_skipped_rows_are_left_out_before_the_limit(tmp_path, tokenizer):
    path = _write(tmp_path / "rows.jsonl", [{"question": f"{n} =", "answer": str(n)} for n in range(6)])
    answers = [prompt.answer for prompt in _load(path, tokenizer, skip=2, limit=3).prompts]
    assert answers == ["2", "3", "4"] and _load(path, tokenizer, skip=2).prompts[0].id == "rows/2"
