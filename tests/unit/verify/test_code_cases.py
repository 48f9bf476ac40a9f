"""Cases of a program: apart from each other, fast, within limits, and judged by what Python itself would do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_s2d.records import Prompt
from megatron_s2d.verify import code_pool
from megatron_s2d.verify.code_verifier import CodeVerifier

FIELD_CASES = Path(__file__).resolve().parents[3].parent / "shared" / "field-cases" / "code.jsonl"


@pytest.fixture(scope="module")
def verifier():
    verifier = CodeVerifier(num_workers=1, cpu_seconds=2, memory_bytes=512 << 20, wall_seconds=120)
    yield verifier
    verifier.close()


def status(verifier, program, label):
    prompt = Prompt("p", None, "", "code", "code", label if isinstance(label, str) else json.dumps(label))
    verdict = verifier.grade([prompt], [f"```python\n{program}\n```"])[0]
    assert verdict.reward == (verdict.label == "correct")
    return verdict.label


def function(outputs, inputs=None, name="f"):
    return {"inputs": inputs or [[i] for i in range(len(outputs))], "outputs": outputs, "fn_name": name}


def asserts(*lines, setup=""):
    tests = "def check(f):\n" + "".join(f"    {line}\n" for line in lines)
    return {"kind": "asserts", "setup": setup, "entry_point": "f", "tests": tests}


ECHO = {"inputs": ["1", "2", "3"], "outputs": ["1", "2", "3"]}


# ------------------------------------------------------------------------------------------------------------ isolation


@pytest.mark.parametrize(
    "program",
    [
        "seen = []\ndef f(x):\n    seen.append(x)\n    return len(seen)",
        "def f(x, seen=[]):\n    seen.append(x)\n    return len(seen)",
        "import builtins\ndef f(x):\n    builtins.n = getattr(builtins, 'n', 0) + 1\n    return builtins.n",
        "import math\ndef f(x):\n    math.n = getattr(math, 'n', 0) + 1\n    return math.n",
        "import sys\ndef f(x):\n    n = sys.getrecursionlimit()\n    sys.setrecursionlimit(n + 1)\n    return n - 999",
    ],
)
def test_a_case_of_a_function_does_not_see_another(verifier, program):
    assert status(verifier, program, function([1, 1, 1])) == "correct"
    assert status(verifier, program, function([1, 2, 3])) == "wrong"


KEEP = "import sys, math, os\nx = int(input())\nmath.n = getattr(math, 'n', 0) + 1\n"


@pytest.mark.parametrize(
    "program",
    [
        KEEP + "print(math.n)",
        "import gc\nx = input()\nprint(1 + sum('MARK' + 'ER' in str(type(o).__dict__) for o in gc.get_objects()))",
        "import os\nprint(os.lseek(0, 0, os.SEEK_CUR) + 1)",
    ],
)
def test_a_case_of_a_script_does_not_see_another(verifier, program):
    assert status(verifier, program, {"inputs": ["1"] * 3, "outputs": ["1"] * 3}) == "correct"


HOSTILE_FIRST_CASE = {
    "patched modules": "import sys\nfor m in list(sys.modules.values()):\n    for n in list(vars(m)):\n"
    "        if n in ('confine', 'run_script', '_fork', '_wait', 'json', 'socket', 'os'): setattr(m, n, print)\n",
    "spraying": 'import os\nfor d in range(3, 256):\n    try: os.write(d, b\'{"timed_out": false, "exits": [0]}\')\n'
    "    except OSError: pass\n",
    "killing the server": "import os\n"
    "for p in (os.getppid(), -1, 0):\n    try: os.kill(p, 9)\n    except OSError: pass\n",
    "writing to the server": "import os\nfor f in ('mem', 'fd/3', 'fd/0'):\n"
    "    try: open(f'/proc/{os.getppid()}/{f}', 'r+b')\n    except OSError: pass\n",
    "an exit function": "import atexit\natexit.register(print, '2')\n",
    "a thread that stays": "import threading, time\n"
    "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n",
    "its own input": "import os\nos.lseek(0, 0, 0)\n"
    "try: os.write(0, b'999')\nexcept OSError: pass\nos.lseek(0, 0, 0)\n",
}


@pytest.mark.parametrize("name", HOSTILE_FIRST_CASE)
def test_a_hostile_case_does_not_decide_a_later_one(verifier, name):
    """The first case misbehaves as well as it can and prints the right answer; the second is wrong."""
    program = "x = input()\nif x == '1':\n    print(1)\nelse:\n    print(5)\nif x == '1':\n" + "".join(
        f"    {line}\n" for line in HOSTILE_FIRST_CASE[name].splitlines()
    )
    assert status(verifier, program, ECHO) in ("wrong", "error")
    assert status(verifier, "print(input())", ECHO) == "correct"


def test_descriptors_of_the_server_and_of_the_tests_cannot_be_opened(verifier):
    """The process that forks holds the file with the expected results of a function; its programs may not open it."""
    program = (
        "import os\nfound = []\nfor pid in range(max(2, os.getpid() - 5), os.getpid() + 5):\n"
        "    for fd in range(64):\n        if pid != os.getpid():\n"
        "            try: found.append(open(f'/proc/{pid}/fd/{fd}', 'rb').read(1))\n            except OSError: pass\n"
        "for fd in range(64):\n    try: found.append(open(f'/proc/{os.getppid()}/fd/{fd}', 'rb').read(1))\n"
        "    except OSError: pass\ndef f(x):\n    return len(found)"
    )
    assert status(verifier, program, function([0])) == "correct"


def test_answers_in_advance_do_not_count(verifier):
    """An answer that a case leaves in its pipe is not read as the answer of the next one."""
    program = (
        "import os\ndef f(x):\n    if x == 0:\n        for fd in range(3, 64):\n            try: os.write(fd, b'"
        '{"tuple": ["value", 0, null]}\\n{"tuple": ["value", 7, null]}\\n{"tuple": ["value", 7, null]}\\n\''
        ")\n            except OSError: pass\n    return 0"
    )
    assert status(verifier, program, function([0, 7])) in ("wrong", "crash")


# ----------------------------------------------------------------------------------------------------------------- time


def test_many_cases_start_python_once(monkeypatch):
    starts = []
    original = code_pool.ForkServer._start
    monkeypatch.setattr(code_pool.ForkServer, "_start", lambda server: (starts.append(1), original(server))[1])
    verifier = CodeVerifier(num_workers=1, wall_seconds=400)
    try:
        texts = [str(i) for i in range(200)]
        assert status(verifier, "print(input())", {"inputs": texts, "outputs": texts}) == "correct"
        assert status(verifier, "def f(x): return x", function(list(range(50)))) == "correct"
    finally:
        verifier.close()
    assert len(starts) == 1


def test_a_killed_server_is_started_again(verifier):
    assert status(verifier, "print(input())", ECHO) == "correct"
    (server,) = verifier._servers._servers
    os.kill(server._process.pid, signal.SIGKILL)
    assert status(verifier, "print(input())", ECHO) == "correct"


SLEEPER = "import time\ndef f(x):\n    time.sleep(0.5)\n    return x"


def test_calls_share_one_time_limit(verifier):
    """Each case ends within its own limit; without a total all 40 of them would pass."""
    limited = CodeVerifier(num_workers=1, cpu_seconds=5, wall_seconds=60, total_seconds=2.0)
    try:
        assert status(limited, SLEEPER, function(list(range(40)))) == "timeout"
    finally:
        limited.close()
    assert status(verifier, SLEEPER, function([0])) == "correct"


@pytest.mark.parametrize(
    ("program", "label"),
    [
        ("x = input()\nwhile x == '2': pass\nprint(x)", ECHO),
        ("def f(x):\n    while x == 1: pass\n    return x", function([0, 1])),
        ("while True: pass\ndef f(x): return x", function([0])),
    ],
)
def test_a_case_that_loops(verifier, program, label):
    assert status(verifier, program, label) == "timeout"


def test_memory_is_counted_beyond_imported_modules(verifier):
    program = "import numpy as np\na = np.ones(45_000_000)\nprint(int(a[0]) * int(input()))"
    assert status(verifier, program, ECHO) == "correct"
    assert status(verifier, program.replace("45", "450"), ECHO) == "error"


# ------------------------------------------------------------------------------------------------- scripts end as usual


# As many programs of competitions begin; it writes when Python flushes standard output at the end.
FAST_IO = """
import os, sys
from io import BytesIO, IOBase
class FastIO(IOBase):
    def __init__(self, file):
        self._file, self.buffer = file.fileno(), BytesIO()
        self.write = self.buffer.write
    def readline(self):
        self.buffer = BytesIO(os.read(self._file, os.fstat(self._file).st_size))
        return self.buffer.readline()
    def flush(self):
        os.write(self._file, self.buffer.getvalue())
        self.buffer.truncate(0), self.buffer.seek(0)
class Wrapper(IOBase):
    def __init__(self, file):
        self.buffer = FastIO(file)
        self.flush = self.buffer.flush
        self.write = lambda text: self.buffer.write(text.encode())
        self.readline = lambda: self.buffer.readline().decode()
sys.stdin, sys.stdout = Wrapper(sys.stdin), Wrapper(sys.stdout)
input = lambda: sys.stdin.readline().rstrip()
print(input())
"""


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (FAST_IO, "correct"),
        ("import sys, io\nsys.stdout = io.TextIOWrapper(open(1, 'wb'))\nprint(input())", "correct"),
        ("import sys\ndel sys.modules['__main__']\nprint(input())", "correct"),
        ("print(open('/dev/stdin').read())", "correct"),
        ("print(open('/proc/self/fd/0').read())", "correct"),
        ("import sys\nprint(sys.stdin.buffer.readline().decode())", "correct"),
        ("import os\nprint(os.read(0, 9).decode())", "correct"),
        ("import fileinput\nfor line in fileinput.input(): print(line)", "correct"),
        ("out = open(1, 'w')\nout.write(input())", "correct"),
        ("import os\nout = os.fdopen(os.dup(1), 'w')\nout.write(input())", "correct"),
        ("import sys\nsys.stdout.write(input())", "correct"),
        ("import sys, io\nx = input()\nsys.stdout = io.StringIO()\nprint(x)\nsys.__stdout__.write(x)", "correct"),
        ("import atexit\natexit.register(print, input())", "correct"),
        ("import threading\nx = input()\nthreading.Thread(target=lambda: print(x)).start()", "correct"),
        ("class A:\n    def __del__(self, x=input()): print(x)\na = A()", "correct"),
        ("import sys\nprint(input())\nsys.exit(None)", "correct"),
        ("import sys\nprint(input())\nsys.exit(False)", "correct"),
        ("import sys\nprint(input())\nsys.exit('done')", "error"),
        ("import sys\nprint(input())\nsys.exit(256)", "correct"),
        ("import sys\nprint(input())\nsys.exit(2)", "error"),
        ("print(input())\nraise KeyboardInterrupt", "error"),
        ("print(input())\nimport os\nos._exit(0)", "wrong"),
        ("import __main__\nx = input()\nprint(__main__.x)", "correct"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nprint(A(int(input())).x)", "correct"),
        ("import random\nrandom.seed(0)\nprint(input())", "correct"),
        ("import sys\nassert sys.argv == ['program'] and len(sys.path) > 1\nprint(input())", "correct"),
        ("print(input())\nopen('/dev/stdout', 'w').write('9')", "error"),
        ("from __future__ import annotations\nprint(input())", "correct"),
        ("print(input(), file=open(1, 'w'))", "correct"),
    ],
)
def test_scripts_behave_like_scripts(verifier, program, expected):
    assert status(verifier, program, {"inputs": ["7"], "outputs": ["7"]}) == expected


# ------------------------------------------------------------------------------------------------------------ functions


@pytest.mark.parametrize(
    ("program", "label", "expected"),
    [
        ("class Solution:\n    def f(self, x): return x", function([0, 1]), "correct"),
        ("class Solution:\n    def f(self, x): return -x", function([0, 1]), "wrong"),
        ("class Solution:\n    n = 0\n    def f(self, x): return x", function([0, 1], name="Solution.f"), "correct"),
        ("class Solution:\n    def f(self, x): return list(Counter([x]))[0]", function([0, 1]), "correct"),
        ("class Solution:\n    def f(self, x: List[int]): return heapq.nlargest(1, [x])[0]", function([0]), "correct"),
        ("class Solution:\n    def f(self, x): return pow(2, 5, 7) + x", function([4, 5]), "correct"),
        ("def f(x): return list(Counter([x]))[0]", function([0, 1]), "error"),
        ("class Solution:\n    def g(self, x): return x", function([0, 1]), "error"),
        ("def f(x): return x\nclass Solution:\n    def f(self, x): return 9", function([0, 1]), "correct"),
        ("def f(x): return x", function([[0], [1]]), "correct"),
        ("def f(x): return [x]", function([[0], [1]]), "correct"),
        ("def f(x): return [x] if x else x", function([[0], [1]]), "wrong"),
        ("def f(x): return x", function([[0], 1]), "wrong"),
        ("def f(x): return x", function([[0, 0], [1, 1]]), "wrong"),
        ("def f(x): return {x: [x]}", function([{"0": [0]}, {"1": [1]}]), "correct"),
        ("def f(x): return {str(x): [x]}", function([{"0": [0]}, {"1": [1]}]), "correct"),
        ("def f(x): return {x: 1, str(x): 1}", function([{"0": 1}]), "wrong"),
        ("def f(x): return {x == 0: None}", function([{"true": None}]), "correct"),
        ("def f(x): return [{'a': {x: 1}}]", function([[{"a": {"0": 1}}]]), "correct"),
        ("def f(x): return x[1] + x[-2]", function([5], [[{"1": 2, "-2": 3}]]), "correct"),
        ("def f(x): return x['1']", function([5], [[{"1": 5, "a": 3}]]), "correct"),
        ("def f(x): return 1e-7", function([3e-7]), "wrong"),
        ("def f(x): return 0.1 + 0.2", function([0.3]), "correct"),
        ("def f(x): return 1000000006.0", function([1000000007]), "wrong"),
        ("def f(x): return 10**400", function([1.5]), "wrong"),
        ("def f(x): return 4 / 2", function([2]), "correct"),
        ("def f(x): return float('nan')", function([float("nan")]), "correct"),
        ("def f(x): return (x, (x,))", function([[0, [0]]]), "correct"),
        ("def f(x): return {x}", function([[0]]), "wrong"),
        ("def f(x): return str(x)", function([0]), "wrong"),
        ("def f(x): x.sort()", function([[1, 2]], [[[2, 1]]]), "wrong"),
    ],
)
def test_results_of_functions(verifier, program, label, expected):
    assert status(verifier, program, label) == expected


@pytest.mark.parametrize(
    ("program", "label", "expected"),
    [
        ("def f(a): a.sort()", asserts("a = [3, 1, 2]", "f(a)", "assert a == [1, 2, 3]"), "correct"),
        ("def f(a): a = sorted(a)", asserts("a = [3, 1, 2]", "f(a)", "assert a == [1, 2, 3]"), "wrong"),
        ("def f(a): a[0].append(1)", asserts("b = [0]", "f([b])", "assert b == [0, 1]"), "correct"),
        ("def f(a): del a['x']; a['y'] = {1}", asserts("a = {'x': 1}", "f(a=a)", "assert a == {'y': {1}}"), "correct"),
        ("def f(a): a.add(2)", asserts("a = {1}", "f(a)", "assert a == {1, 2}"), "correct"),
        ("def f(a): a.clear()", asserts("a = [1]", "f((a, 2))", "assert a == [1]"), "error"),
        (
            "def f(a): return [a.pop(), a]",
            asserts("a = [1, 2]", "assert f(a) == [2, [1]]", "assert a == [1]"),
            "correct",
        ),
        ("def f(a): raise KeyError", asserts("try: f(1)", "except KeyError: return", "assert False"), "correct"),
        ("def f(a): return a", asserts("assert f(object()) == 1"), "bad_label"),
        ("def f(a): return a", asserts("assert True"), "bad_label"),
        ("def f(a): return a", asserts("assert missing == f"), "bad_label"),
        (
            "class Solution:\n    def f(self, a): return a",
            asserts("assert f(1) == 1", setup="def f(a):\n    pass\n"),
            "correct",
        ),
        ("x = 1", asserts("assert f(1) is None", setup="def f(a):\n    pass\n"), "error"),
        ("def f(a): return a", json.dumps({"test_list": ["assert f(1) == 1"]}), "correct"),
        ("def f(a): return a", json.dumps({"test_list": ["assert f(1) == 2"]}), "wrong"),
        ("def f(a): return a", "from solution import f\ndef test_a():\n    assert f(1) == 2", "wrong"),
        ("def f(a): return a\ndef g(a): return a + 1", json.dumps(["assert g(f(1)) == 2"]), "correct"),
        (
            "class Solution:\n    def f(self, a): return a",
            json.dumps({"functional": "assert Solution().f(1) == 1"}),
            "correct",
        ),
    ],
)
def test_test_code(verifier, program, label, expected):
    assert status(verifier, program, label) == expected


# ---------------------------------------------------------------------------------------------------------- field cases


def field_cases():
    if not FIELD_CASES.is_file():
        return [pytest.param(None, marks=pytest.mark.skip(reason="no field cases in shared/ beside the repository"))]
    rows = [json.loads(line) for line in FIELD_CASES.read_text(encoding="utf-8").splitlines()]
    # Rows of a large label do not hold it, and an endless loop takes the whole limit (test_a_case_that_loops).
    return [pytest.param(row, id=row["id"]) for row in rows if isinstance(row["label"], dict) and row["id"] != "c88"]


@pytest.mark.parametrize("case", field_cases())
def test_field_cases(verifier, case):
    right = case["right"] if isinstance(case["right"], list) else [case["right"]]
    if case["id"] == "c76":
        right = [*right, "crash"]  # scipy may need more than the 512 MiB of these tests
    assert status(verifier, case["program"], case["label"]) in right


# --------------------------------------------------------------------------------------------------------- end of a run

GRADE_A_SLEEPER = """
import json, sys, threading
from megatron_s2d.records import Prompt
from megatron_s2d.verify.code_verifier import CodeVerifier
verifier = CodeVerifier(num_workers=1)
prompt = Prompt("p", None, "", "code", "code", json.dumps({"inputs": ["1"], "outputs": ["1"]}))
program = "```python\\nimport time\\ntime.sleep(600)\\n```"
threading.Thread(target=verifier.grade, args=([prompt], [program])).start()
sys.stdin.read()
"""


def processes():
    """The parent of every process that has not ended."""
    parents = {}
    for entry in Path("/proc").iterdir():
        try:
            # Behind the name, which is in parentheses: the state and the parent.
            fields = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdigit() else ["Z"]
        except OSError:  # it has just ended
            continue
        if fields[0] != "Z":
            parents[int(entry.name)] = int(fields[1])
    return parents


def children(pid):
    return [child for child, parent in processes().items() if parent == pid]


def wait_for(condition):
    for _ in range(1200):
        if result := condition():
            return result
        time.sleep(0.1)
    raise AssertionError("not within two minutes")


def test_a_killed_trainer_leaves_no_process():
    trainer = subprocess.Popen([sys.executable, "-c", GRADE_A_SLEEPER], stdin=subprocess.PIPE)
    try:
        (server,) = wait_for(lambda: [pid for pid in children(trainer.pid) if children(pid)])
        (program,) = children(server)
    finally:
        trainer.kill()
        trainer.communicate()
    wait_for(lambda: not {server, program} & processes().keys())
