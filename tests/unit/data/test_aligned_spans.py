"""Texts in the tokens of two tokenizers, and a teacher's likelihood of them as values of the student's tokens."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_s2d.data.aligned_spans import align, span_log_probs, token_ends
from megatron_s2d.data.tokenizer import load_tokenizer

TEXTS = ["the cat sat on the mat", "theatre, thesis; naïve café", "数学 is 漢字 🙂🙂 ok", "a  b\n\n  c", ""]


def byte_level(vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, theatre thesis the the"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


FEW, MANY = byte_level(260), byte_level(300)


@pytest.mark.parametrize("text", TEXTS)
def test_ends_of_tokens_are_those_of_the_decoded_prefixes(text):
    ids = FEW(text, add_special_tokens=False)["input_ids"]
    found, ends = token_ends(FEW, ids)
    assert found == text
    for index, end in enumerate(ends):
        prefix = FEW.decode(ids[: index + 1])
        assert (end == -1) == prefix.endswith("\ufffd")
        assert end == -1 or text[:end] == prefix


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("pair", [(FEW, MANY), (MANY, FEW)])
def test_spans_are_the_same_text_in_both(text, pair):
    own, other = pair
    ids = [*own(text, add_special_tokens=False)["input_ids"], own.eos_token_id]
    aligned = align(ids, own, other, end=(own.eos_token_id, other.eos_token_id))
    starts = (0, 0)
    for own_start, own_stop, start, stop in aligned.spans[:-1]:
        assert (own_start, start) == starts
        assert own.decode(ids[own_start:own_stop]) == other.decode(aligned.token_ids[start:stop].tolist())
        starts = own_stop, stop
    assert aligned.spans[-1] == (len(ids) - 1, len(ids), len(aligned.token_ids) - 1, len(aligned.token_ids))
    assert starts == (len(ids) - 1, len(aligned.token_ids) - 1)


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizers_that_agree_give_the_teachers_values(text):
    ids = [*MANY(text, add_special_tokens=False)["input_ids"], MANY.eos_token_id]
    aligned = align(ids, MANY, MANY, end=(MANY.eos_token_id,) * 2)
    assert aligned.token_ids.tolist() == ids
    rng = np.random.default_rng(0)
    teacher, student = (-rng.exponential(size=len(ids)).astype(np.float32) for _ in range(2))
    found = span_log_probs(teacher, student, aligned.spans)
    ends = token_ends(MANY, ids[:-1])[1]
    whole = [
        index for index in range(len(ids)) if index == len(ids) - 1 or (-1 not in ends[max(0, index - 1) : index + 1])
    ]
    assert found[whole] == pytest.approx(teacher[whole], abs=1e-6)


def test_a_tokenizer_that_writes_spaces_between_tokens(tmp_path):
    task = load_tokenizer("task:modular_arithmetic", tmp_path)
    ids = task("3 + 4 = 7", add_special_tokens=False)["input_ids"]
    text, ends = token_ends(task, ids)
    assert text == task.decode(ids) and [text[:end] for end in ends] == [
        task.decode(ids[: n + 1]) for n in range(len(ids))
    ]
    aligned = align([*ids, task.eos_token_id], task, MANY, end=(task.eos_token_id, MANY.eos_token_id))
    assert len(aligned.spans) == len(ids) + 1


def test_a_span_of_several_tokens_is_one_action():
    teacher, student = np.array([-1.0, -2.0, -0.5], np.float32), np.array([-0.25, -0.75], np.float32)
    found = span_log_probs(teacher, student, [(0, 2, 0, 3)])
    assert (found - student).tolist() == pytest.approx([-2.5, -2.5])  # -3.5 of the teacher, -1 of the student
