"""Answers of every kind and notation: a table of our own, cases from the field, and laws that hold for all answers."""

import contextlib
import json
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt
from megatron_s2d.verify import check_labels, labels_as_text
from megatron_s2d.verify.math_verifier import MathVerifier, label_text, unread_label
from megatron_s2d.verify.mathematics.compare import compare, is_quick
from megatron_s2d.verify.mathematics.extract import extract_answer
from megatron_s2d.verify.mathematics.parser import parse
from megatron_s2d.verify.mathematics.text import UnreadableError

SHARED = Path(__file__).resolve().parents[3].parent / "shared"
FIELD_CASES = SHARED / "field-cases" / "math.jsonl"
CASES = [json.loads(line) for line in Path(__file__).with_name("math_cases.jsonl").read_text().splitlines()]
PARTS = r"""
1 23 0.5 x y + - * / ^ _ { } ( ) [ ] \{ \} \frac , \sqrt : = < \le \cup \pm ! % | \sin \pi e i \infty \text{ ° and or
cm per \pmod \equiv for if \ldots A B. \begin{pmatrix} & \\ \end{pmatrix} √ ² ½ ∞ five \overline{3} ' \circ $ \$ \in
\mathbb{R} _5 \binom \lfloor \rfloor base th ~ \, \langle \rangle to \based \repeating \mid \over \star
"""
KINDS = sorted({case["kind"] for case in CASES})


@pytest.fixture(scope="module")
def verifier():
    verifier = MathVerifier(num_workers=2)
    yield verifier
    verifier.close()


def prompt(label, text="", number=0):
    return Prompt(id=f"data/{number}", token_ids=np.zeros(0), text=text, domain="math", verifier="math", answer=label)


def faults(verifier, cases):
    """Return the cases whose verdict is not the right one: (label, response, verdict)."""
    verdicts = verifier.grade([prompt(label, text) for label, text, _, _ in cases], [case[2] for case in cases])
    graded = zip(cases, verdicts, strict=True)
    return [(label, response, v.label) for (label, _, response, right), v in graded if (v.reward == 1) != right]


def response_of(case):
    return case["response"] if "response" in case else f"So it is $\\boxed{{{case['answer']}}}$."


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_cases(verifier, kind):
    cases = [(c["label"], c.get("prompt", ""), response_of(c), c["correct"]) for c in CASES if c["kind"] == kind]
    assert len(cases) >= 10 and len({case[3] for case in cases}) == 2
    assert faults(verifier, cases) == []


def field_cases():
    return [json.loads(line) for line in FIELD_CASES.read_text().splitlines()] if FIELD_CASES.exists() else []


@pytest.mark.skipif(not FIELD_CASES.exists(), reason="no shared/field-cases beside the repository")
@pytest.mark.parametrize("case", field_cases(), ids=lambda case: case["id"])
def test_cases_from_the_field(verifier, case):
    assert faults(verifier, [(case["label"], "", case["response"], case["right"] == "correct")]) == []


def test_every_readable_answer_of_the_table_equals_itself():
    texts = {text for case in CASES for text in (case["label"], case.get("answer", "")) if text}
    readable = [text for text in texts if unread_label(text) != "bad_label"]
    assert len(readable) > 400
    assert [text for text in readable if compare(label_text(text), label_text(text)) != "correct"] == []


@pytest.mark.parametrize("text", ["<think>\n", "<think>", "prompt <|im_start|>assistant\n<think>\n"])
def test_reasoning_that_the_template_opens_holds_no_answer(verifier, text):
    cases = [
        ("4", text, "maybe \\boxed{4}", False),
        ("4", text, "The answer is 4", False),
        ("4", text, "no </think> \\boxed{4}", True),
        ("4", text, "\\boxed{4} </think> \\boxed{5}", False),
        ("4", text + "\n</think>\n\n", "\\boxed{4}", True),  # the template switches reasoning off
        ("4", "Reason between <think> and </think>.", "\\boxed{4}", True),
    ]
    assert faults(verifier, cases) == []


def test_exact_numbers_are_equal_only_to_themselves():
    """Random fractions close to each other, as quotients and powers: equality is that of ``Fraction``."""
    source = random.Random(1)
    for _ in range(300):
        a, b, power = source.randrange(1, 10**6), source.randrange(1, 10**6), source.randrange(1, 60)
        c, d = a + source.randrange(2), b + source.randrange(2)
        label, answer = (
            f"\\left(\\frac{{{a}}}{{{b}}}\\right)^{{{power}}}",
            f"\\frac{{{c}^{{{power}}}}}{{{d}^{{{power}}}}}",
        )
        assert (compare(label, answer) == "correct") == (Fraction(a, b) == Fraction(c, d)), (label, answer)


def test_a_decimal_equals_what_it_rounds_and_nothing_else():
    source = random.Random(2)
    for _ in range(300):
        a, b = source.randrange(1, 10**4), source.choice((7, 11, 13, 17, 19, 23, 9973))
        if a % b == 0:
            continue
        digits = a * 10**8 // b
        for written, right in (
            (digits, True),
            (digits + 1, 2 * (a * 10**8 % b) >= b),
            (digits + 2, False),
            (digits - 1, False),
        ):
            text = f"{written // 10**8}.{written % 10**8:08d}"
            if len(text.replace(".", "").strip("0")) >= 6:
                assert (compare(f"\\frac{{{a}}}{{{b}}}", text) == "correct") == right, (a, b, text)


def test_a_polynomial_equals_its_expansion_only():
    source = random.Random(3)
    for _ in range(60):
        p, q, r = (source.randrange(-9, 10) for _ in range(3))
        product = f"(x{p:+d})(x{q:+d})(y{r:+d})"
        terms = f"x^2y{p + q:+d}xy{p * q:+d}y{r:+d}x^2{(p + q) * r:+d}x{p * q * r:+d}"
        assert compare(terms, product) == "correct", (terms, product)
        assert compare(terms, product + "+10^{-12}") == "wrong"


def test_random_texts_are_read_or_refused_in_linear_time():
    """No other error, and no answer is correct for two labels that differ."""
    parts = PARTS.split()
    source = random.Random(4)
    for _ in range(1500):
        words = source.choices(parts, k=source.choice((2, 3, 5, 9, 30)))
        text = "".join(word + source.choice(("", " ")) for word in words)
        with contextlib.suppress(UnreadableError):
            parse(text)
        label_text(text)
        is_quick(text, text)
        assert {compare("41", text), compare("42", text)} != {"correct"}


@pytest.mark.parametrize(
    "part", ["(", "{", "\\sqrt", "\\frac", "^", "-", "x^", "a=", "1,", "|", "\\left", "_", "\\text{", "9", "1 "]
)
def test_long_answers_are_read_in_linear_time(part):
    text = part * (2000 // len(part))
    assert compare("1", text) in ("wrong", "unreadable")
    assert compare(text, "1") in ("wrong", "unreadable", "bad_label")


def test_labels_that_no_answer_equals_are_refused_before_the_run():
    bad = ["\\boxed{}", "$$", "Infinity", "-inf", "NaN", "nan", "{", "\\frac{1}{2", "...", "?", "x" * 3000]
    prompts = [prompt(label, number=number) for number, label in enumerate([*bad, "5", "\\infty", "\\{\\}"])]
    with pytest.raises(
        UserError, match=r"11 of 14 labels are no answers \(data/0: .*boxed.*, data/2: 'Infinity', \.\.\.\); correct"
    ):
        check_labels(prompts)
    check_labels(prompts[len(bad) :])
    for label in bad:
        with pytest.raises(UserError, match="1 of 1 labels are no answers"):
            check_labels([prompt(label)])


def test_labels_that_are_compared_as_text_are_counted_with_examples():
    readable = ["5", "\\text{Evelyn}", "n \\equiv 3 \\pmod 7", "x>3", "(1,2)", "\\text{no solution}", "4213_5", "B. 12"]
    texts = ["\\sum_{k=1}^n k", "\\int_0^1 x\\,dx", "x \\mapsto x^2 \\star 1"]
    assert labels_as_text([prompt(label) for label in readable]) is None
    message = labels_as_text([prompt(label, number=number) for number, label in enumerate([*readable, *texts])])
    assert message.startswith("3 of 11 labels cannot be read as mathematics, so only the same text is right (data/8: ")


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The answer is 42 because 6*7 = 42.", "42"),
        ("Answer: $42$ (see above)", "42"),
        ("The answer is $42$, since $6 \\cdot 7 = 42$.", "42"),
        ("The answer is $41$ or $42$.", "41, 42"),
        ("The answer is $41$ or maybe $42$.", "41$ or maybe $42"),
        ("\\boxed{3}, \\boxed{5}, and \\boxed{7}", "3, 5, 7"),
        ("\\boxed{3} = \\boxed{5}", "3 = 5"),
        ("\\boxed{3} then \\boxed{5}", "5"),
        ("<answer> 42 </answer>", "42"),
        ("<answer> 42", None),
        ("I hope this answer helps", None),
    ],
)
def test_extract_answer_from_prose(response, answer):
    assert extract_answer(response) == answer
