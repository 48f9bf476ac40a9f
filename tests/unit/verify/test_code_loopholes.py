"""Ways to be rewarded without solving the problem, or to hold the verifier up, found by trying."""

import json

import pytest

from megatron_s2d.records import Prompt
from megatron_s2d.verify.code_verifier import CodeVerifier


def grade(label, program, **limits):
    verifier = CodeVerifier(num_workers=1, cpu_seconds=1, memory_bytes=512 << 20, **({"wall_seconds": 60} | limits))
    try:
        prompt = Prompt("p", None, "", "code", "code", json.dumps(label))
        return verifier.grade([prompt], [f"```python\n{program}\n```"])[0]
    finally:
        verifier.close()


@pytest.mark.parametrize("error", ["StopIteration", "StopAsyncIteration", "GeneratorExit"])
@pytest.mark.parametrize(
    "test",
    [
        "assert all(map(lambda x: f(x) == x + 1, [1, 2]))",
        "for value in map(f, [1, 1]): assert value == 2",
        "assert list(map(f, [1, 2])) in ([], [2, 3])",
    ],
)
def test_an_exception_that_ends_loops_is_no_pass(error, test):
    label = {"kind": "asserts", "setup": "", "entry_point": "f", "tests": f"def check(f):\n    {test}\n"}
    assert grade(label, "def f(x): return x + 1").label == "correct"
    verdict = grade(label, f"def f(x): raise {error}")
    assert (verdict.reward, verdict.label) == (0.0, "error")


def test_script_tests_share_one_time_limit():
    """Each case ends within its own limit; without a total all 50 of them would pass."""
    label = {"inputs": ["1"] * 50, "outputs": ["1"] * 50}
    verdict = grade(label, "import time\ntime.sleep(1)\nprint(input())", total_seconds=3.0)
    assert verdict.label == "timeout"
