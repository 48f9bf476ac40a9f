"""Mathematical answers: extraction, equivalence, and hostile answers."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_s2d.config.reward import MathReward, verifier_text
from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt
from megatron_s2d.verify import VERIFIERS, RewardManager, check_labels
from megatron_s2d.verify.math_verifier import MathVerifier, unread_label
from megatron_s2d.verify.mathematics.compare import compare
from megatron_s2d.verify.mathematics.extract import extract_answer

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
BENCHMARKS = ("math500", "gsm8k_test", "aime24", "aime25", "hmmt25_feb", "hmmt25_nov")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no benchmark files in shared/data beside the repository")


@pytest.fixture(scope="module")
def verifier():
    verifier = MathVerifier(num_workers=2, cpu_seconds=2, memory_bytes=1 << 30)
    yield verifier
    verifier.close()


def _prompt(answer, verifier="math", id="p"):
    return Prompt(id=id, token_ids=np.zeros(0), text="", domain="math", verifier=verifier, answer=answer)


def _statuses(verifier, pairs):
    verdicts = verifier.grade([_prompt(label) for label, _ in pairs], [response for _, response in pairs])
    assert all(verdict.reward == (verdict.label == "correct") for verdict in verdicts)
    return [verdict.label for verdict in verdicts]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\left\{ 1, 2 \right\}}", r"\left\{ 1, 2 \right\}"),
        (r"$\boxed{ \{1\} }$ done", r"\{1\}"),
        (r"\fbox{7}", "7"),
        (r"$\boxed 9$", "9"),
        (r"\boxed{}", None),
        (r"\boxed{1", None),
        (r"first \boxed{1} then \boxed{2", None),
        (r"\boxedfoo{3}", None),
        ("#### 1,200\n", "1,200"),
        ("The answer is 4. Wait.\nFinal answer: **$12$**.", "12"),
        ("Answer: \\(x+1\\)", "x+1"),
        ("the answer\n", None),
        (r"<think>\boxed{1}</think> It is \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> I do not know", None),
        (r"The answer is 3, that is \boxed{4}", "4"),
        (r"\boxed{12.}", "12"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        ("the answer is } 5 { 6", None),
        ("#### 5} or {6", None),
        ("the answer is 5\\", None),
        ("", None),
        ("42", None),
    ],
)
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("14 + 15 = 29.", "29"),
        ("He pays 3 x $1,200.50 = $3,601.50 in all!", "3,601.50"),
        ("It falls to -5 degrees", "-5"),
        ("so 7-5", "5"),
        ("a half: 1/2.", "1/2"),
        (r"\boxed{4}, not 5", "4"),
        ("The answer is 6. That took 2 steps.", "6"),
        ("<think>12", None),
        ("no number in x2", None),
    ],
)
def test_last_number_where_no_answer_is_stated(response, answer):
    prompt = "<think>\n" if response.startswith("<think>") else ""
    assert extract_answer(response, prompt, last_number=True) == answer


def test_last_number_is_a_setting_of_the_verifier():
    prompts = [_prompt("29", verifier_text(MathReward())), _prompt("29")]
    check_labels(prompts)
    with pytest.raises(UserError, match="labels are no answers"):
        check_labels([_prompt("\\boxed{}", verifier_text(MathReward()))])
    with RewardManager() as manager:
        verdicts = manager.grade(prompts, ["14 + 15 = 29."] * 2)
    assert [verdict.label for verdict in verdicts] == ["correct", "no_answer"]


@pytest.mark.parametrize(
    "part", [r"\boxed{", "answer is ", "$", "answer" + " " * 50, "####", "{", "\\", "</think>", "*."]
)
def test_extract_answer_is_linear(part):
    text = part * (2_000_000 // len(part))
    start = time.process_time()
    extract_answer(text)
    extract_answer(r"\boxed{" + text + "}")
    extract_answer("answer is " + text)
    assert time.process_time() - start < 20  # quadratic: hours


EQUIVALENT = [
    ("\\frac{1}{2}", "0.5"), ("\\frac{1}{2}", "\\dfrac12"), ("\\frac{1}{2}", "1/2"), ("1200", "1,200"), ("18", "\\$18"),
    ("50", "50\\%"), ("2\\sqrt{2}", "\\sqrt{8}"), ("x^2+2x+1", "(x+1)^2"), ("(1,2)", "\\left( 1, 2 \\right)"),
    ("\\{1,2\\}", "\\{2,1\\}"), ("5", "x = 5"), ("90", "90^\\circ"), ("\\text{Evelyn}", "Evelyn"),
    ("3", "3\\text{ cm}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{bmatrix}1\\\\2\\end{bmatrix}"), ("10080", "10{,}080"),
    ("[0,1)", "\\left[0,1\\right)"), ("\\pi/4", "\\frac{\\pi}{4}"), ("-\\frac{2}{3}", "\\frac{-2}{3}"),
]  # fmt: skip
DIFFERENT = [
    ("5", "6"), ("5", "-5"), ("\\frac{1}{2}", "0.51"), ("(1,2)", "(2,1)"), ("1", "1, 2"), ("5", "5 \\text{ or } 6"),
    ("x^2", "x^3"), ("[0,1)", "[0,1]"), ("\\text{Evelyn}", "Carla"), ("2", "x"), ("\\sqrt{2}", "1.5"), ("0", "\\infty"),
    ("12", "120"), ("\\{1,2\\}", "\\{1\\}"),
]  # fmt: skip


def test_equivalent_forms_are_correct(verifier):
    statuses = _statuses(verifier, [(label, f"\\boxed{{{answer}}}") for label, answer in EQUIVALENT])
    assert [pair for pair, status in zip(EQUIVALENT, statuses, strict=True) if status != "correct"] == []


def test_other_answers_are_wrong(verifier):
    statuses = _statuses(verifier, [(label, f"\\boxed{{{answer}}}") for label, answer in DIFFERENT])
    assert [(pair, status) for pair, status in zip(DIFFERENT, statuses, strict=True) if status != "wrong"] == []


def test_verdicts_are_in_order_and_several_guesses_are_wrong(verifier):
    responses = [f"\\boxed{{{n}}}" for n in (1, 2, 3)] + ["\\boxed{1} \\boxed{2}", "nothing"]
    assert _statuses(verifier, [("1", response) for response in responses]) == [
        "correct", "wrong", "wrong", "wrong", "no_answer",
    ]  # fmt: skip


HOSTILE = [
    "9**9**9**9", "9^{9^{9^{9}}}", "(" * 900 + "1" + ")" * 900, "\\sqrt{" * 300 + "2" + "}" * 300,
    "1000000!", "\\sum_{n=1}^{10^{12}} n^{-n}", "((2^{1000000})^{1000000})", "9" * 1999, "\\frac{0}{0}", "\x00\ud800",
    "\\text{__import__('os')._exit(0)}", "\\begin{pmatrix}" + "&" * 1900 + "\\end{pmatrix}", "1" * 3000, "{" * 10**6,
    "\\frac12+9^{2500}-9^{2500}" + "+2^{\\sqrt x}-2^{\\sqrt x}" * 70,  # 5000 digits at eight points: 12 s
]  # fmt: skip


def test_hostile_answers_neither_hang_nor_pass(verifier):
    start = time.perf_counter()
    pairs = [("\\frac{1}{2}", f"\\boxed{{{answer}}}") for answer in HOSTILE]
    statuses = _statuses(verifier, [*pairs, ("\\frac{1}{2}", "\\boxed{0.5}")])
    assert statuses[-1] == "correct"
    assert not set(statuses[:-1]) & {"correct", "bad_label"}
    assert "timeout" in statuses[:-1] and "too_long" in statuses[:-1]
    assert time.perf_counter() - start < 300


def test_memory_is_limited():
    small = MathVerifier(num_workers=1, cpu_seconds=5, memory_bytes=300 << 20)
    try:
        statuses = _statuses(small, [("1", "\\boxed{2^{10^{10}}}"), ("1", "\\boxed{1}")])
    finally:
        small.close()
    assert statuses[0] in ("crash", "wrong", "timeout") and statuses[1] == "correct"


def test_killed_worker_is_restarted(verifier):
    assert _statuses(verifier, [("1", "\\boxed{1}")]) == ["correct"]
    for worker in verifier._pool._workers:
        if worker._process is not None:
            worker._process.kill()
    statuses = _statuses(verifier, [("1", "\\boxed{1}"), ("1", "\\boxed{1.0}"), ("1", "\\boxed{1.00}")])
    assert set(statuses) <= {"crash", "correct"} and "crash" in statuses
    assert _statuses(verifier, [("1", "\\boxed{1}")] * 3) == ["correct"] * 3


HEDGES = [
    "5 = 6", "5 \\approx 6", "5 \\equiv 6 \\pmod 7", "5 \\lor 6", "5 \\to 6", "\\{5, 6\\}", "5 \\pm 1", "[5, 6]",
    "5, 6", "5 \\text{ or } 6", "5 6", "5 \\} \\{ 6", "5 < x < 6", "5$ or $6", "x = 5, x = 6",
    "\\text{the answer is $5$}, 6",
]  # fmt: skip


def test_no_answer_is_correct_for_two_labels(verifier):
    statuses = [_statuses(verifier, [(label, f"\\boxed{{{answer}}}") for answer in HEDGES]) for label in ("5", "6")]
    both = [answer for answer, *pair in zip(HEDGES, *statuses, strict=True) if pair == ["correct"] * 2]
    assert both == []


def test_full_stop_after_a_label_is_ignored(verifier):
    assert _statuses(verifier, [("5. ", "\\boxed{5}"), ("0.5", "\\boxed{.5}")]) == ["correct", "correct"]


def test_unparsable_label_is_a_bad_label(verifier):
    assert _statuses(verifier, [(" ", "\\boxed{1}"), ("1", "\\boxed{1}")]) == ["bad_label", "correct"]


def test_reward_manager_routes_by_verifier():
    assert {"math", "modular_arithmetic"} <= set(VERIFIERS)
    prompts = [_prompt("2", "math"), _prompt("2", "modular_arithmetic"), _prompt("3", "math")]
    with RewardManager() as rewards:
        verdicts = rewards.grade(prompts, ["\\boxed{2}", "[ 2 ]", "\\boxed{2}"])
        assert [verdict.label for verdict in verdicts] == ["correct", "correct", "wrong"]
        for bad in (_prompt(None), _prompt("1", None), _prompt("1", "chess"), _prompt("1", "code")):
            with pytest.raises(UserError, match="prompt p"):
                rewards.grade([bad], ["1"])
            with pytest.raises(UserError, match="prompt p"):
                check_labels([*prompts, bad])
        with pytest.raises(ValueError):
            rewards.grade(prompts, ["1"])


def test_killed_trainer_leaves_no_worker_process(tmp_path):
    """Also in a daemonic process (no ``multiprocessing`` children), and with copies of the pipes in another process."""
    script = f"""
import json, multiprocessing, os, sys, time
def rank():
    import torch.distributed as dist
    dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
    from megatron_s2d.records import Prompt
    from megatron_s2d.verify import RewardManager
    prompt = Prompt(id="p", token_ids=None, text="", domain="", verifier="math", answer="4")
    rewards = RewardManager().__enter__()
    statuses = [v.label for v in rewards.grade([prompt] * 2, ["\\\\boxed{{2+2}}", "\\\\boxed{{5}}"])]
    workers = [w._process.pid for w in rewards._verifiers["math"]._pool._workers if w._process]
    torch_loaded = any("torch" in open(f"/proc/{{pid}}/maps").read() for pid in workers)
    other = os.fork()  # holds the pipes open and outlives this process
    if other == 0:
        for descriptor in range(3):
            os.close(descriptor)
        time.sleep(60)
        os._exit(0)
    print(json.dumps([statuses, workers, torch_loaded, other]))
    sys.stdout.flush()
    os.kill(os.getpid(), 9)
process = multiprocessing.get_context("fork").Process(target=rank, daemon=True)
process.start()
process.join()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    statuses, workers, torch_loaded, other = json.loads(run.stdout)
    try:
        assert statuses == ["correct", "wrong"] and workers and not torch_loaded
        end = time.monotonic() + 10
        while any(_alive(pid) for pid in workers) and time.monotonic() < end:
            time.sleep(0.05)
        assert _alive(other) and not any(_alive(pid) for pid in workers)
    finally:
        os.kill(other, signal.SIGKILL)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _benchmark(name):
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
    if name == "math500":
        return [(row["answer"], row["solution"]) for row in rows]
    if name.startswith("gsm8k"):
        return [(row["answer"].rpartition("####")[2].strip().replace(",", ""), row["answer"]) for row in rows]
    return [(str(row["answer"]), f"It is \\boxed{{{row['answer']}}}.") for row in rows]


def _check_benchmark(verifier, name, pairs):
    start = time.perf_counter()
    statuses = _statuses(verifier, pairs)
    right_ms = 1000 * (time.perf_counter() - start) / len(pairs)
    failing = [(pair[0], status) for pair, status in zip(pairs, statuses, strict=True) if status != "correct"]
    print(f"{name}: {len(pairs) - len(failing)} of {len(pairs)} references are graded correct; failing: {failing}")
    assert len(failing) <= 0.01 * len(pairs), failing
    shifted = [(label, pairs[(index + 1) % len(pairs)][1]) for index, (label, _) in enumerate(pairs)]
    start = time.perf_counter()
    shifted_statuses = _statuses(verifier, shifted)
    wrong_ms = 1000 * (time.perf_counter() - start) / len(pairs)
    print(f"{name}: {right_ms:.1f} ms a response, {wrong_ms:.1f} ms with the label of another problem")
    wrong = [(pair, status) for pair, status in zip(shifted, shifted_statuses, strict=True) if status == "correct"]
    labels = [label for label, _ in pairs]
    equal_neighbours = sum(a == b for a, b in zip(labels, labels[1:] + labels[:1], strict=True))
    assert len(wrong) <= equal_neighbours + 0.01 * len(pairs), wrong


@needs_data
@pytest.mark.parametrize(
    "name", ["math500", "gsm8k_test", "gsm8k_train", "aime24", "aime25", "hmmt25_feb", "hmmt25_nov"]
)
def test_references_are_graded_correct(verifier, name):
    _check_benchmark(verifier, name, _benchmark(name))


@needs_data
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_label_is_read_and_equals_itself_only(name):
    labels = list(dict.fromkeys(label for label, _ in _benchmark(name)))
    assert [label for label in labels if unread_label(label) is not None] == []
    assert [label for label in labels if compare(label, label) != "correct"] == []
    source = random.Random(0)
    pairs = [source.sample(labels, 2) for _ in range(1500)]
    accepted = [pair for pair in pairs if "_" not in "".join(pair) and compare(*pair) == "correct"]
    digits = [[sorted(re.findall(r"\d", re.sub(r"\^2$", "", label))) for label in pair] for pair in accepted]
    assert [pair for pair, (a, b) in zip(accepted, digits, strict=True) if a != b] == []  # 5 and x=5, 36 and 36^\circ
