"""Tokenizers and chat templates of single models: one vocabulary for all, a template for each."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_s2d.config.hf_config import hf_config_from_spec
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.conversion.convert import ASSETS
from megatron_s2d.data.model_tokenizers import ModelTokenizers, vocabulary_difference, write_assets
from megatron_s2d.data.tokenizer import end_of_message, stop_token_ids
from megatron_s2d.errors import UserError
from megatron_s2d.models.families import hf_tensor_shapes
from megatron_s2d.stages.inputs import StageInputs
from megatron_s2d.workflow.plan import make_plan
from megatron_s2d.workflow.preflight import check_workflow

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = TEMPLATE.replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)


def make_tokenizer(
    directory, *, eos="<|im_end|>", template=TEMPLATE, swap=(), merges=("a b",), normaliser=None, more=()
):
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "ac"]
    for one, other in swap:
        i, j = words.index(one), words.index(other)
        words[i], words[j] = words[j], words[i]
    backend = Tokenizer(
        models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[tuple(pair.split()) for pair in merges])
    )
    backend.normalizer = normaliser
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken(token) for token in more])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, chat_template=template)
    tokenizer.save_pretrained(directory)
    return directory


def make_model(directory, **settings):
    """A checkpoint with a tokenizer in its folder."""
    make_tokenizer(directory, **settings)
    sizes = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    spec = ModelConfig(preset="tiny-llama", head_dim=8, vocab_size=272, **sizes).resolve()
    save_file({name: torch.zeros(shape) for name, shape in hf_tensor_shapes(spec)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(hf_config_from_spec(spec, "float32")))
    return directory


@pytest.fixture
def workflow(tmp_path):
    """Write a workflow: a teacher's GRPO stage, its cache, forward KL, and OPD of a student."""
    make_tokenizer(tmp_path / "common")
    rows = [
        {"question": f"{'a' * (n - n // 9 * 8)} + {n} ?", "answer": str(n), "feedback": f"not {n + 1}"}
        for n in range(1, 13)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[8:]))
    small = {"preset": "tiny-llama", "num_layers": 1, "vocab_size": 272}
    sampling = {"max_response_length": 8}
    grpo = {"type": "grpo", "model": "teacher", "prompts": "train/1H", "steps": 1, "train_batch_size": 2}
    distill = {"steps": 1, "train_batch_size": 2, "num_generations": 2, "sampling": sampling}
    document = {
        "name": "w",
        "tokenizer": str(tmp_path / "common"),
        "precision": "float32",
        "lengths": {"max_prompt_length": 60},
        "models": {"student": small, "teacher": small},
        "data": {
            name: {"type": "file", "path": str(tmp_path / f"{name}.jsonl"), "template": "plain"}
            for name in ("train", "test")
        },
        "stages": {
            "rl": {**grpo, "num_generations": 2, "sampling": sampling},
            "cache": {"type": "teacher_cache", "teacher": "rl", "prompts": "train/1H", "sampling": sampling},
            "kl": {"type": "forward_kl", "model": "student", "cache": "cache", "steps": 1, "global_batch_size": 2},
            "opd": {"type": "opd", "init": "kl", "teacher": "rl", "prompts": "train/2H", **distill},
        },
        "arms": {"a": "opd"},
        "also_evaluate": ["rl"],
        "evaluation": {"prompts": "test", "samples_per_prompt": 2, "sampling": sampling},
    }
    path = tmp_path / "w.yaml"
    path.write_text(json.dumps(document))

    def load(*overrides):
        return load_workflow(path, list(overrides))

    return load


def check(config, tmp_path):
    return check_workflow(config, tmp_path / "cache")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"swap": [("a", "b")], "merges": ()}, r"id \d+ is 'b' and 'a', \d+ is 'a' and 'b'"),
        ({"merges": ("a c",)}, r"merges differ \(\[\"a\", \"c\"\] and \[\"a\", \"b\"\]\)"),
        ({"merges": ("a b", "a c")}, r"merges differ \(\[\"a\", \"c\"\] and none\)"),
        ({"normaliser": normalizers.NFC()}, r"the normaliser differs \({\"type\": \"NFC\"} and none\)"),
    ],
)
def test_a_tokenizer_with_other_ids_is_refused(workflow, tmp_path, settings, words):
    """In the folder of a model it would train silently, with a plausible loss."""
    folder = make_model(tmp_path / "hf", **settings)
    with pytest.raises(UserError, match=rf"models\.teacher\.path: the tokenizer in {folder} .*{words}.*one vocabulary"):
        check(workflow(f"models.teacher={{path: {folder}}}"), tmp_path)
    with pytest.raises(UserError, match=rf"models\.student\.tokenizer: {folder} has other token ids .*{words}"):
        check(workflow(f"models.student.tokenizer={folder}"), tmp_path)


def test_a_wrong_tokenizer_in_a_folder_can_be_replaced(workflow, tmp_path):
    folder = make_model(tmp_path / "hf", swap=[("a", "b")], merges=())
    config = workflow(f"models.teacher={{path: {folder}, tokenizer: {tmp_path}/common}}")
    (notice,) = check(config, tmp_path).notices
    assert notice.startswith("models.teacher: the tokenizer in its folder has other token ids than the one used: id ")


def test_further_tokens_are_named(workflow, tmp_path):
    folder = make_model(tmp_path / "hf", more=["<tool>"])
    (notice,) = check(workflow(f"models.teacher={{path: {folder}}}"), tmp_path).notices
    assert "1 of them (from 261) are in one of the two only" in notice


def test_the_tokenizer_in_a_folder_that_cannot_be_read_is_named(workflow, tmp_path):
    folder = make_model(tmp_path / "hf")
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"models\.teacher\.path: tokenizer .* cannot be loaded"):
        check(workflow(f"models.teacher={{path: {folder}}}"), tmp_path)


def test_equal_tokenizers_say_nothing(workflow, tmp_path):
    folder = make_model(tmp_path / "hf")
    assert check(workflow(f"models.teacher={{path: {folder}}}"), tmp_path).notices == []
    left, right = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("hf", "common"))
    right("a text", truncation=True, max_length=1)  # leaves state in the backend
    assert vocabulary_difference(left, right) is None


def test_a_template_in_a_folder_that_is_not_used_is_said(workflow, tmp_path):
    folder = make_model(tmp_path / "hf", template=THINKING)
    (notice,) = check(workflow(f"models.teacher={{path: {folder}}}"), tmp_path).notices
    assert (
        f"its folder {folder} has another chat template" in notice
        and f"set models.teacher.tokenizer: {folder}" in notice
    )


@pytest.mark.parametrize("by", ["tokenizer", "chat_template"])
def test_every_model_is_prompted_in_its_own_template(workflow, tmp_path, by):
    (tmp_path / "own.jinja").write_text(THINKING)
    value = make_tokenizer(tmp_path / "own", template=THINKING) if by == "tokenizer" else tmp_path / "own.jinja"
    config = workflow(f"models.teacher.{by}={value}")
    preflight = check(config, tmp_path)
    texts = {
        name: StageInputs(config, {}, tmp_path / "cache", name).prompts("train/1H")[0].text.partition("assistant\n")[2]
        for name in ("rl", "cache", "opd")
    }
    # The cache's prompts are those that the student trains on, and in OPD the teacher scores the student's prompts.
    assert texts == {"rl": "<think>\n\n</think>\n\n", "cache": "", "opd": ""}
    assert preflight.shapes["rl"].prompt_length > preflight.shapes["cache"].prompt_length
    assert [notice.partition(":")[0] for notice in preflight.notices] == ["stages.cache.teacher", "stages.opd.teacher"]
    assert "'teacher' has another chat template than 'student'" in preflight.notices[0]


def test_stages_with_different_templates_have_the_same_prompts(workflow, tmp_path):
    """A prompt that is too long in one rendering is left out of all, or the halves of two stages would overlap."""
    (tmp_path / "own.jinja").write_text(THINKING)
    limits = ["lengths.max_prompt_length=48", "stages.rl.train_batch_size=1", "stages.opd.train_batch_size=1"]
    config, common = workflow(f"models.teacher.chat_template={tmp_path}/own.jinja", *limits), workflow(*limits)
    ids = {}
    for name in ("rl", "opd"):
        for half in ("1H", "2H"):
            ids[name, half] = [p.id for p in StageInputs(config, {}, tmp_path / "c", name).prompts(f"train/{half}")]
    assert ids["rl", "1H"] == ids["opd", "1H"] and ids["rl", "2H"] == ids["opd", "2H"]
    kept = sum(len(ids["rl", half]) for half in ("1H", "2H"))
    assert kept < len(StageInputs(common, {}, tmp_path / "c", "rl").prompts("train"))
    assert check(config, tmp_path).dropped["train/1H"] == 8 - kept


def test_a_cache_is_rendered_for_one_template(workflow, tmp_path):
    (tmp_path / "own.jinja").write_text(THINKING)
    second = "{type: forward_kl, model: other, cache: cache, steps: 1, global_batch_size: 2}"
    model = f"{{preset: tiny-llama, num_layers: 1, vocab_size: 272, chat_template: {tmp_path}/own.jinja}}"
    config = workflow(f"stages.kl2={second}", f"models.other={model}", "arms.b=kl2")
    with pytest.raises(UserError, match=r"stages\.cache: .*'kl' and 'kl2' train models with different chat templates"):
        check(config, tmp_path)


def test_keys_follow_templates_by_content(workflow, tmp_path):
    def keys(*overrides):
        return {job.id: job.key for job in make_plan(workflow(*overrides), tmp_path / "run")}

    before = keys()
    own = tmp_path / "own.jinja"
    own.write_text(TEMPLATE)
    after = keys(f"models.teacher.chat_template={own}")
    assert after["stages/rl"] != before["stages/rl"]
    own.write_text(THINKING)
    assert keys(f"models.teacher.chat_template={own}")["stages/rl"] != after["stages/rl"]
    (tmp_path / "common" / "chat_template.jinja").write_text(THINKING)
    assert all(key != before[name] for name, key in keys().items())
    (tmp_path / "common" / "chat_template.jinja").write_text(TEMPLATE)
    assert keys() == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"\xff", "not UTF-8"),
        (b"x" * 2**21, "too many"),
        (b"{% if %}", "chat template rejects"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(workflow, tmp_path, content, words):
    path = tmp_path / "own.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        check(workflow(f"models.teacher.chat_template={path}"), tmp_path)
    assert "\n" not in str(caught.value)


def test_the_end_of_a_template_that_ends_no_response_is_said(workflow, tmp_path):
    """A base model: its end of sequence is <|endoftext|>, but the template ends messages with <|im_end|>."""
    make_tokenizer(tmp_path / "common", eos="<|endoftext|>")
    notices = check(workflow(), tmp_path).notices
    assert [notice.partition(",")[0] for notice in notices] == [
        f"models.{name}: the chat template ends messages with <|im_end|>" for name in ("teacher", "student")
    ]
    stop = "['<|im_end|>']"
    silent = [f"stages.{name}.sampling.stop_strings={stop}" for name in ("rl", "cache", "opd")]
    assert check(workflow(*silent, f"evaluation.sampling.stop_strings={stop}"), tmp_path).notices == []


def test_a_teacher_whose_responses_end_otherwise_is_said(workflow, tmp_path):
    own = make_tokenizer(tmp_path / "own", eos="<|im_end|>")
    make_tokenizer(tmp_path / "common", eos="<|endoftext|>")
    notices = check(workflow(f"models.teacher.tokenizer={own}"), tmp_path).notices
    assert any(
        "stages.cache: responses of 'teacher' may end with <|im_end|> (260), which does not end" in text
        for text in notices
    )


def test_no_end_of_a_message():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    assert end_of_message(tokenizer, None) is None


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        (None, {"eos_token_id": [257, 260]}, (257, 260, 261)),
        (None, {"eos_token_id": 257.0}, (257, 261)),
        ({"eos_token_id": [257.0]}, {"eos_token_id": 3}, (257, 261)),
        ({"eos_token_id": None}, {"eos_token_id": 3}, (261,)),
        ({"top_p": 0.9}, {"eos_token_id": 3}, (3, 261)),
        ({}, {}, (261,)),
        (None, {"eos_token_id": "257"}, None),
        ({"eos_token_id": [[257]]}, {}, None),
        ({"eos_token_id": True}, {}, None),
        ({"eos_token_id": 2.5}, {}, None),
        ({"eos_token_id": -1}, {}, None),
        ({"eos_token_id": float("inf")}, {}, None),
        ([], {}, None),
    ],
)
def test_end_ids_of_a_published_model(tmp_path, generation, config, ids):
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    tokenizer = type("Tokenizer", (), {"eos_token_id": 261})
    if ids is None:
        with pytest.raises(UserError, match=r"config\.json"):
            stop_token_ids(tokenizer, tmp_path)
    else:
        assert stop_token_ids(tokenizer, tmp_path) == ids


def test_a_stage_leaves_the_tokenizer_of_its_model_for_exports(workflow, tmp_path):
    (tmp_path / "own.jinja").write_text(THINKING)
    source = make_model(tmp_path / "hf")
    (source / "generation_config.json").write_text('{"eos_token_id": [258, 260]}')
    config = workflow(f"models.teacher={{path: {source}, chat_template: {tmp_path}/own.jinja}}")
    tokenizers = ModelTokenizers(config, tmp_path / "cache")
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    for _ in range(2):  # a resumed stage finds them
        write_assets(tokenizers.of_model("teacher"), source, checkpoint)
    exported = tmp_path / "exported"
    exported.mkdir()
    for path in (checkpoint / "hf").iterdir():
        assert path.name in ASSETS
        shutil.copy(path, exported / path.name)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.chat_template == THINKING
    assert stop_token_ids(tokenizer, Path(exported)) == (258, 260)


SYSTEM = TEMPLATE.replace("{% if add", "{% if enable_thinking %}<think>{% endif %}{% if add")


@pytest.mark.parametrize(
    ("view", "prompt"),
    [
        ({"chat_template": "teacher"}, "user\na + 1 ?|assistant\n<think>\n\n</think>\n\n"),
        ({"chat_template": "own.jinja", "enable_thinking": True}, "user\na + 1 ?|<think>assistant\n"),
        ({"system_prompt": "Be brief."}, "system\nBe brief.|user\na + 1 ?|assistant\n"),
        ({"context": "{prompt} = {answer} {{x}}"}, "user\na + 1 ? = 1 {x}|assistant\n"),
        ({"context": "{prompt} {feedback}: {answer}"}, "user\na + 1 ? not 2: 1|assistant\n"),
        ({"context": "{prompt} {feedback}"}, "user\na + 1 ? not 2|assistant\n"),  # which a verifier said
    ],
)
def test_a_teacher_reads_the_prompt_in_its_view(workflow, tmp_path, view, prompt):
    (tmp_path / "own.jinja").write_text(SYSTEM)
    (tmp_path / "thinking.jinja").write_text(THINKING)
    if view.get("chat_template") == "own.jinja":
        view = view | {"chat_template": str(tmp_path / "own.jinja")}
    config = workflow(
        f"models.teacher.chat_template={tmp_path}/thinking.jinja",
        "models.teacher.vocab_size=272",
        "stages.opd.prompts=train",
        f"stages.opd.teacher_view={json.dumps(view)}",
    )
    preflight = check(config, tmp_path)
    assert not any("opd.teacher: 'teacher' has another" in notice for notice in preflight.notices)  # it is meant
    views = StageInputs(config, {}, tmp_path / "c", "opd").prompt_views("opd", "teacher")
    texts = [p.text.replace("<|im_start|>", "").replace("<|im_end|>\n", "|") for p in views.tables[None]]
    assert prompt in texts
    labels = {entry.stage: entry.labels_used for entry in preflight.ledger.entries(["opd"])}
    assert labels["opd"] == ("{answer}" in view.get("context", "") or "{feedback}" in view.get("context", ""))


def test_views_that_cannot_work_are_one_line(workflow, tmp_path):
    def refused(words, *overrides):
        with pytest.raises(UserError, match=words):
            check(workflow(*overrides), tmp_path)

    refused(r"context: \{a.b\} is not a field", "stages.opd.teacher_view={context: '{a.b}'}")
    refused(r"no column 'solucion' for .*columns: question, answer", "stages.opd.teacher_view={context: '{solucion}'}")
    refused("has no solution; name its column", "stages.opd.teacher_view={context: '{solution} {prompt}'}")
    refused(
        r"opd.teacher_view: 'code' is neither .* nor a domain .*\(math\)",
        "stages.opd.teacher_view={code: {enable_thinking: true}}",
    )
    long = "x" * 3000
    refused(r"teacher_view: prompt .* exceeds the \d+ positions", f"stages.opd.teacher_view={{system_prompt: {long}}}")
    refused("reference_view is how `reference` reads", "stages.opd.reference_view={enable_thinking: true}")
    refused(
        "'test' is the evaluation set: training must not use its labels",
        "stages.opd.prompts=test",
        "stages.opd.teacher_view={context: '{prompt} {answer}'}",
    )
    (notice,) = check(workflow("stages.opd.teacher_view={enable_thinking: true}"), tmp_path).notices
    assert "opd.teacher_view: renders all prompts of 'train/2H' as the student reads them: no effect" in notice


def test_keys_follow_views_by_content(workflow, tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text(THINKING)

    def keys(*overrides):
        return {job.id: job.key for job in make_plan(workflow(*overrides), tmp_path / "run")}

    before = keys()
    viewed = keys(f"stages.opd.teacher_view={{chat_template: {own}}}")
    assert viewed["stages/opd"] != before["stages/opd"] and viewed["stages/kl"] == before["stages/kl"]
    own.write_text(SYSTEM)
    assert keys(f"stages.opd.teacher_view={{chat_template: {own}}}")["stages/opd"] != viewed["stages/opd"]
    cached = keys("stages.cache.teacher_view={context: '{prompt} !'}")
    assert cached["stages/cache"] != before["stages/cache"] and cached["stages/rl"] == before["stages/rl"]


def test_what_follows_from_other_ends_and_thoughts_is_said_before_the_run(workflow, tmp_path):
    make_tokenizer(tmp_path / "base", eos="<|endoftext|>")
    (tmp_path / "own.jinja").write_text(THINKING)
    base = f"models.teacher.tokenizer={tmp_path}/base"
    notices = check(workflow(base), tmp_path).notices
    assert any("stages.opd.teacher: 'teacher' ends responses with <|endoftext|>" in text for text in notices)
    notices = check(workflow(f"stages.opd.teacher_view={{chat_template: {tmp_path}/own.jinja}}"), tmp_path).notices
    (notice,) = [text for text in notices if "first response token" in text]
    assert "begins as it likes, behind the teacher's it begins after </think>" in notice


def test_a_student_that_reads_the_same_as_its_own_teacher_is_refused(workflow, tmp_path):
    with pytest.raises(UserError, match="no effect, and the student would agree with itself"):
        check(workflow("stages.opd.teacher=self", "stages.opd.teacher_view={enable_thinking: true}"), tmp_path)
    notices = check(workflow("stages.opd.teacher=self", "stages.opd.teacher_view={system_prompt: x}"), tmp_path).notices
    assert not any("opd" in text for text in notices)
    with pytest.raises(UserError, match="domain_weights: it names code, and the domains of its prompts are math"):
        check(workflow("stages.opd.domain_weights={code: 1}"), tmp_path)
