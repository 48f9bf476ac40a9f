"""End tokens of solutions and prompts: one after a solution, none after a prompt."""

import datetime
import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_s2d.config.base import parse
from megatron_s2d.config.data import FileSource
from megatron_s2d.data.prompts import load_prompts
from megatron_s2d.errors import UserError


def make_tokenizer(single="$A", eos="<end>"):
    backend = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>", "<bos>"])
    tokens = [(token, backend.token_to_id(token)) for token in ("<end>", "<bos>")]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)


def load(directory, row, tokenizer):
    path = directory / "x.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "1", **row}) + "\n")
    columns = {"solution": "solution"} if "solution" in row else {}
    source = parse(FileSource, {"type": "file", "path": path, "template": "plain", "columns": columns}, "test")
    return load_prompts(source, tokenizer, max_prompt_length=None, date=datetime.date(2026, 1, 1)).prompts[0]


@pytest.mark.parametrize(
    ("solution", "text"),
    [
        ("It is 4.", "It is 4."),
        ("It is 4.\n", "It is 4.\n"),
        ("It is 4.<end>", "It is 4."),
        ("It is 4.<end>\n", "It is 4."),
        ("It is 4.<end><end> <end>\n", "It is 4."),
        ("It is 4.\n<end>", "It is 4.\n"),
        ("<end> is a token.", "<end> is a token."),
    ],
)
def test_a_solution_has_one_end_token(tmp_path, solution, text):
    tokenizer = make_tokenizer()
    ids = load(tmp_path, {"solution": solution}, tokenizer).solution_token_ids
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids[:-1]) == text


def test_a_solution_needs_an_end_token(tmp_path):
    with pytest.raises(UserError, match="no end-of-sequence token to end solutions with"):
        load(tmp_path, {"solution": "4"}, make_tokenizer(eos=None))


@pytest.mark.parametrize(("single", "start"), [("$A", []), ("<bos> $A", ["<bos>"]), ("<bos> $A <end>", ["<bos>"])])
def test_a_prompt_does_not_end(tmp_path, single, start):
    """Some tokenizers (``add_eos_token``) end every text."""
    tokenizer = make_tokenizer(single)
    prompt = load(tmp_path, {"question": "ab"}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(prompt.token_ids.tolist()) == [*start, "a", "b"]
    written = load(tmp_path, {"question": "ab<end>"}, tokenizer).token_ids.tolist()
    assert tokenizer.convert_ids_to_tokens(written)[-1] == "<end>"
