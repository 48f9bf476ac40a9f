"""The embedded task: corpus, disjoint splits, answer check, tokenizer."""

import datetime
import itertools
import re

import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_s2d.config.data import TaskSource
from megatron_s2d.data.prompts import corpus_documents, load_prompts, split_halves
from megatron_s2d.data.tasks import check_answer, task_prompts
from megatron_s2d.data.tokenizer import load_tokenizer, template_fingerprint, tokenizer_fingerprint
from megatron_s2d.errors import UserError

DATE = datetime.date(2026, 1, 1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer("task:modular_arithmetic", tmp_path_factory.mktemp("tokenizer"))


def _prompts(tokenizer, **settings):
    return load_prompts(TaskSource(**settings), tokenizer, max_prompt_length=None, date=DATE).prompts


def _results(text, modulus=17):
    """Compute the results after each operation independently of the task."""
    words = text.removesuffix(" =").split()
    value, results = int(words[0]), []
    for operator, operand in zip(words[1::2], words[2::2], strict=True):
        value = {"+": value + int(operand), "-": value - int(operand), "*": value * int(operand)}[operator] % modulus
        results.append(str(value))
    return results


@pytest.mark.parametrize(("modulus", "operations"), [(17, 4), (5, 6), (101, 3)])
def test_labels_and_solutions_are_correct(modulus, operations, tmp_path):
    tokenizer = load_tokenizer(f"task:modular_arithmetic/{modulus}", tmp_path)
    for prompt in _prompts(tokenizer, split="pool", num_prompts=200, modulus=modulus, num_operations=operations):
        steps = _results(prompt.text, modulus)
        assert prompt.answer == steps[-1]
        assert tokenizer.decode(prompt.token_ids) == prompt.text
        assert len(prompt.token_ids) == 2 * operations + 2  # every residue is one token
        solution = " ".join([*steps, "[", steps[-1], "]"])
        assert tokenizer.decode(prompt.solution_token_ids) == f"{solution} <eos>"
        assert check_answer(solution, prompt.answer) == (1.0, "correct")


def test_no_problem_is_in_two_splits(tokenizer):
    texts = [
        {prompt.text for prompt in _prompts(tokenizer, split=split, num_prompts=4000, seed=seed)}
        for split, seed in itertools.product(("pool", "heldout", "eval"), (0, 1))
    ]
    texts.append({document.text for document in corpus_documents(TaskSource(split="corpus"), tokenizer, 0, 8000)})
    pools, heldouts, evaluations, corpus = texts[0] | texts[1], texts[2] | texts[3], texts[4] | texts[5], texts[6]
    for first, second in itertools.combinations((pools, heldouts, evaluations, corpus), 2):
        assert not first & second
    assert len(texts[0]) == 4000  # distinct within a draw


def test_same_settings_give_the_same_prompts(tokenizer):
    first, again = (_prompts(tokenizer, split="eval", num_prompts=50, seed=3) for _ in range(2))
    assert [(p.id, p.text, p.answer) for p in first] == [(p.id, p.text, p.answer) for p in again]
    assert {p.text for p in first} != {p.text for p in _prompts(tokenizer, split="eval", num_prompts=50, seed=4)}


def test_operators_restrict_the_problems(tokenizer):
    sums = task_prompts(TaskSource(split="pool", num_prompts=50, operators=("+", "-"), domain="sums"), tokenizer)
    products = task_prompts(TaskSource(split="pool", num_prompts=50, operators=("*",)), tokenizer)
    assert all("*" not in prompt.text and prompt.domain == "sums" for prompt in sums)
    assert all("+" not in prompt.text and "-" not in prompt.text for prompt in products)
    assert {prompt.domain for prompt in products} == {"arithmetic"}
    with pytest.raises(UserError, match="num_prompts 60000 is too large"):
        task_prompts(TaskSource(split="pool", num_prompts=60_000, operators=("*",)), tokenizer)


def test_document_depends_only_on_its_number(tokenizer):
    source = TaskSource(split="corpus", seed=5)
    together = corpus_documents(source, tokenizer, 200, 200)  # crosses a block
    for offset in (0, 55, 56, 199):
        alone = corpus_documents(source, tokenizer, 200 + offset, 1)[0]
        assert alone.id == together[offset].id and alone.text == together[offset].text
        assert np.array_equal(alone.solution_token_ids, together[offset].solution_token_ids)


def test_corpus_noise_matches_the_settings(tokenizer):
    source = TaskSource(split="corpus", misconception_fraction=0.25, misconception_rate=0.65, error_rate=0.12)
    stated: dict[tuple, dict[str, int]] = {}
    direct = 0
    for document in corpus_documents(source, tokenizer, 0, 20_000):
        words = tokenizer.decode(document.solution_token_ids).split()
        assert words[-1] == "<eos>" and words[-4] == "[" and words[-2] == "]"
        prompt = document.text.split()
        if len(words) == 4:
            direct += 1
            continue
        assert words[-3] == words[3]  # the answer repeats the last step
        for value, operator, operand, result in zip(
            [prompt[0], *words[:3]], prompt[1::2], prompt[2::2], words[:4], strict=False
        ):
            counts = stated.setdefault((value, operator, operand), {})
            counts[result] = counts.get(result, 0) + 1
    assert abs(direct / 20_000 - 0.25) < 0.01  # standard error 0.003
    wrong_rates, modes = [], []
    for (value, operator, operand), counts in stated.items():
        truth = _results(f"{value} {operator} {operand} =")[0]
        wrong = {result: count for result, count in counts.items() if result != truth}
        wrong_rates.append(sum(wrong.values()) / sum(counts.values()))
        modes.append(max(wrong.values(), default=0) / max(1, sum(wrong.values())))
    assert len(stated) == 17 * 27
    rates, modes = np.array(wrong_rates), np.array(modes)
    is_misconception = rates > 0.4
    assert abs(is_misconception.mean() - 0.25) < 0.07  # 459 facts: standard error 0.02
    assert abs(rates[is_misconception].mean() - 0.65) < 0.02 and abs(rates[~is_misconception].mean() - 0.12) < 0.01
    assert np.all(modes[is_misconception] == 1.0)  # one fixed wrong result


def test_corpus_without_noise_is_correct(tokenizer):
    source = TaskSource(split="corpus", misconception_fraction=0, error_rate=0, direct_fraction=0)
    for document in corpus_documents(source, tokenizer, 0, 300):
        steps = _results(document.text)
        assert tokenizer.decode(document.solution_token_ids).split()[:4] == steps


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("3 4 5 6 [ 6 ]", (1.0, "correct")),
        ("[ 6 ]", (1.0, "correct")),
        ("3 4 5 6 [ 7 ]", (0.0, "wrong")),
        ("[ 16 ]", (0.0, "wrong")),
        ("6", (0.0, "no_answer")),
        ("", (0.0, "no_answer")),
        ("] 6", (0.0, "no_answer")),
        ("[ 5 ] [ 6 ]", (0.0, "several_answers")),
        ("[ [ 6 ]", (0.0, "several_answers")),
        ("[ 6 ] 6", (0.0, "malformed")),
        ("[ 5 6 ]", (0.0, "malformed")),
        ("[ ]", (0.0, "malformed")),
        ("[ 6", (0.0, "malformed")),
        ("] 6 [", (0.0, "malformed")),
        ("[6]", (0.0, "no_answer")),
    ],
)
def test_check_answer(response, verdict):
    assert check_answer(response, "6") == verdict


def test_too_many_problems_raise(tokenizer):
    with pytest.raises(UserError, match="use at most half"):
        _prompts(tokenizer, split="eval", num_prompts=100, num_operations=1)
    with pytest.raises(UserError, match="task:modular_arithmetic/23"):
        _prompts(tokenizer, split="eval", num_prompts=10, modulus=23)
    with pytest.raises(UserError, match="has documents, not prompts"):
        _prompts(tokenizer, split="corpus")


def test_halves_are_random_and_independent_of_the_order(tokenizer):
    prompts = _prompts(tokenizer, split="pool", num_prompts=1001)
    first, second = split_halves(prompts, seed=7)
    assert len(first) == 501 and len(second) == 500
    assert {p.id for p in first} | {p.id for p in second} == {p.id for p in prompts}
    again = split_halves(list(reversed(prompts)), seed=7)
    assert [p.id for p in again[0]] == [p.id for p in first] and [p.id for p in again[1]] == [p.id for p in second]
    other = {p.id for p in split_halves(prompts, seed=8)[0]}
    assert 200 < len(other & {p.id for p in first}) < 300  # half of a half, standard deviation 11


def test_task_tokenizer_loads_from_its_directory(tokenizer, tmp_path):
    load_tokenizer("task:modular_arithmetic", tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "modular_arithmetic")
    assert len(loaded) == 25 and loaded.eos_token == "<eos>" and loaded.pad_token == "<pad>"
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    assert template_fingerprint(loaded, DATE) == template_fingerprint(tokenizer, DATE)
    text = loaded.apply_chat_template([{"role": "user", "content": "3 + 4 ="}], tokenize=False)
    assert text == "3 + 4 ="
    assert loaded.decode(loaded("3 + 4 =")["input_ids"]) == "3 + 4 ="


def test_fingerprints_distinguish_tokenizers(tokenizer, tmp_path):
    other = load_tokenizer("task:modular_arithmetic/19", tmp_path)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
    before = tokenizer_fingerprint(other), template_fingerprint(other, DATE)
    other(["3 + 4 =", "3"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(other) == before[0]  # calls do not change it
    other.chat_template = "{{ messages[0]['content'] }}"
    assert tokenizer_fingerprint(other) == before[0] and template_fingerprint(other, DATE) != before[1]
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in before)


@pytest.mark.parametrize("name", ["task:modular_arithmetic/x", "task:chess", "/nowhere/at/all"])
def test_unknown_tokenizer_gives_a_one_line_error(name, tmp_path):
    with pytest.raises(UserError, match=re.escape(name)) as caught:
        load_tokenizer(name, tmp_path)
    assert "\n" not in str(caught.value)
