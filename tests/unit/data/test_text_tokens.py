"""Tokens of columns of texts are those of each text, and what is claimed of them without tokenizing is true."""

import pytest

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_s2d.data import text_tokens
from megatron_s2d.data.text_tokens import TextTokens

WORDS = {"<pad>": 0, "a": 1, "b": 2, "<end>": 3, "é": 4}


def words_tokenizer(single="$A", unknown="<pad>", **settings):
    backend = Tokenizer(models.WordLevel(WORDS, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<pad>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"eos_token": "<end>", "pad_token": "<pad>"} | settings)


TEXTS = ["a b a", " b\t\x0ba\n", "a<end>b", "c", "a\u2003b", "é a", "b <pad>", "a\x1cb", "a\xa0b", "b"]


@pytest.mark.parametrize("single", ["$A", "<pad> $A"])
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:2], ["a", " \t ", "b"], [""], ["\u2003", "b"], []])
def test_words_are_those_of_the_tokenizer(texts, single):
    tokenizer = words_tokenizer(single)
    tokens = TextTokens(tokenizer)
    column = pyarrow.array(["before", *texts], pyarrow.string())[1:]
    assert tokens.prompts(column).to_pylist() == tokens.prompt_ids(texts) == [tokenizer(t)["input_ids"] for t in texts]
    expected = [[*tokenizer(t, add_special_tokens=False)["input_ids"], 3] for t in texts]
    if single == "$A":
        assert tokens.solutions(column).to_pylist() == tokens.solution_ids(texts) == expected
    assert tokens.solutions(pyarrow.array([None, *texts[:1]], pyarrow.string())).to_pylist() == [None, *expected[:1]]
    keys = tokens.keys(column)
    assert keys.tolist() == tokens.keys(column, tokens.prompts(column)).tolist() and len(keys) == len(texts)


def test_words_are_looked_up_without_the_tokenizer(monkeypatch):
    tokens, asked = TextTokens(words_tokenizer()), []
    own = text_tokens.encode
    monkeypatch.setattr(text_tokens, "encode", lambda *args, **kwargs: asked.extend(args[1]) or own(*args, **kwargs))
    column = pyarrow.array(["a b", "b a", "a", "a<end>", "c"])
    assert tokens.prompts(column).to_pylist() == [[1, 2], [2, 1], [1], [1, 3], [0]]
    assert tokens.solutions(column).to_pylist() == [[1, 2, 3], [2, 1, 3], [1, 3], [1, 3], [0, 3]]
    assert "b a" not in asked and "c" not in asked and "a<end>" in asked  # the first is asked for comparison


def test_ids_of_columns_end_as_those_of_texts():
    tokens = TextTokens(words_tokenizer())
    texts = ["a<end>", "a", "b <end> \n", "<end>", "<end> a"]
    assert tokens.solutions(pyarrow.array(texts)).to_pylist() == [[1, 3], [1, 3], [2, 3], [3], [3, 1, 3]]


def test_texts_are_tokenized_some_at_once(monkeypatch):
    """So many that their tokens fit, and at least one, in the order of the texts."""
    texts, parts = ["a " * n for n in (1, 2, 3, 50, 1, 1)], []
    column = pyarrow.array([None, *texts])
    expected = text_tokens._in_parts(lambda part: [[len(text)] for text in part], column).to_pylist()
    monkeypatch.setattr(text_tokens, "_BYTES_AT_ONCE", 10)
    found = text_tokens._in_parts(lambda part: parts.append(len(part)) or [[len(text)] for text in part], column)
    assert found.to_pylist() == expected and parts == [2, 1, 1, 2]
