"""Programs against unit tests: correct ones pass, mutated ones fail, hostile ones neither do harm nor pass."""

import ast
import collections
import enum
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_s2d.config.base import parse
from megatron_s2d.config.data import FileSource
from megatron_s2d.data.problems import read_problems
from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt
from megatron_s2d.verify.code_extraction import extract_program
from megatron_s2d.verify.code_verifier import CodeVerifier, sandbox_layers
from megatron_s2d.verify.serialization import Opaque, calls_like, decode, encode, equal, like

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no benchmark files in shared/data beside the repository")

ASSERTS = {"kind": "asserts", "setup": "", "entry_point": "f", "tests": "def check(f):\n    assert f(2) == 'SECRET4'\n"}


@pytest.fixture(scope="module")
def verifier():
    verifier = CodeVerifier(num_workers=2, cpu_seconds=1, memory_bytes=512 << 20, wall_seconds=60)
    yield verifier
    verifier.close()


def _prompt(label, id="p"):
    return Prompt(id, None, "", "code", "code", label if isinstance(label, str) else json.dumps(label))


def _status(verifier, program, label):
    verdict = verifier.grade([_prompt(label)], [f"```python\n{program}\n```"])[0]
    assert verdict.reward == (verdict.label == "correct")
    return verdict.label


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\nx = 1\n```", "x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        ("first\n```python\na\n```\nthen\n```py\nb\n\nc\n```\nend", "b\n\nc"),
        ("```python\na\n```\nrun it:\n```bash\npython a.py\n```", "a"),
        ("<think>```python\na\n```</think>none", None),
        ("``` Python title=a.py\na\n```", "a"),
        ("1. So\n   ```python\n   def f():\n       return 1\n\n   ```", "def f():\n    return 1\n"),
        ('````python\na = """\n```\n"""\n````', 'a = """\n```\n"""'),
        ("```python\na\n````", "a"),
        ("```python is not``` a fence\n```python\na\n```", "a"),
        ("```pythonic\na\n```", None),
        ("```python\na", "a"),
        ("def f(): pass", "def f(): pass"),
        ("", None),
    ],
)
def test_extract_program(response, program):
    assert extract_program(response) == program


def test_plain_values_keep_their_types():
    values = [
        None, True, 1, -(10**5000), 1.0, float("inf"), "a\n\ud800", b"\x00", (1, [2, (3,)]), {1, 2}, frozenset({"a"}),
        {(1, 2): [1.5], "k": None}, 1 + 2j, range(3), [],
    ]  # fmt: skip
    for value in values:
        decoded = decode(encode(value))
        assert decoded == value and type(decoded) is type(value)
    assert decode(encode(float("nan"))) != 0

    for value in (Always(), object(), lambda: 1, iter([1]), np.ones(1)):
        decoded = decode(encode(value))
        assert isinstance(decoded, Opaque) and bool(decoded) == bool(value) and decoded != value and decoded != 3


class Always:
    def __eq__(self, other):
        return True

    __hash__ = None


class AlwaysInt(Always, int):
    def __int__(self):
        return 4


class AlwaysText(Always, str):
    def __str__(self):
        return "SECRET4"


class Colour(str, enum.Enum):  # noqa: UP042 (StrEnum has another __str__)
    RED = "red"


def test_other_types_become_plain_values():
    named = collections.namedtuple("Named", "a b")(1, [2])
    for value, plain in [
        (named, (1, [2])), (np.float64(0.1), 0.1), (np.int64(3), 3), (np.bool_(True), True), (np.float32(0.5), 0.5),
        (enum.IntEnum("E", "A B").B, 2), (Colour.RED, "red"), (AlwaysInt(3), 3), (AlwaysText("x"), "x"),
        (type("D", (dict,), {})({1: 2}), {1: 2}), (type("L", (list,), {})([1]), [1]),
    ]:  # fmt: skip
        decoded = decode(encode(value))
        assert decoded == plain and type(decoded) is type(plain)


@pytest.mark.parametrize("text", ["", "nonsense", '{"code": 1}', '{"int": 3}', '{"tuple": 3}', "{}", "[" * 100_000])
def test_decode_rejects_other_text(text):
    with pytest.raises(ValueError):
        decode(text)


def test_equal_with_tolerance():
    assert equal([1.0, (2, {"a": 0.1 + 0.2})], [1, (2, {"a": 0.3})], 1e-6)
    assert equal(float("nan"), float("nan"), 1e-6) and equal(1e9, 1e9 + 1, 1e-6)
    for actual, expected in [([1], (1,)), (1.1, 1.0), ([1, 2], [1]), (None, 0), ("1", 1), ({1: 2}, {1: 3})]:
        assert not equal(actual, expected, 1e-6)


def test_json_arguments_get_the_types_of_the_example():
    assert like([[1, [2]], [3, 4, 3]], ((1, (2,)), {5})) == ((1, (2,)), {3, 4})
    calls = [["(1+2j)", "0", "j"], ["2", "3.5", "x"]]
    assert calls_like(calls, (1, 1j, "y")) == [[1 + 2j, 0j, "j"], [2 + 0j, 3.5 + 0j, "x"]]
    assert calls_like([[["a"], "8"]], ((1, 2), 3)) == [[("a",), "8"]]
    assert like([[1, [2, [3]]]], ((1, (2,)),)) == ((1, (2, (3,))),)
    assert like(["a", [[1, 2], [3, 4], [5]]], ("x", [(1, 2)])) == ("a", [(1, 2), (3, 4), (5,)])
    assert like(["text", [1, 2]], ("other", {3})) == ("text", {1, 2})


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("def f(x):\n    return 'SECRET' + str(2 * x)", "correct"),
        ("print('noise')\ndef f(x):\n    print('noise')\n    return 'SECRET4'", "correct"),
        ("def f(x):\n    return 'SECRET5'", "wrong"),
        ("def f(x):\n    return None", "wrong"),
        ("def f(x):\n    raise KeyError(x)", "error"),
        ("def f(x):\n    return", "wrong"),
        ("def f(x)", "error"),
        ("import nowhere", "error"),
        ("g = 1", "error"),
    ],
)
def test_function_style(verifier, program, status):
    assert _status(verifier, program, ASSERTS) == status


READ_ALL_DESCRIPTORS = """
import os
def f(x):
    content = b""
    for descriptor in range(64):
        for read in (lambda: os.pread(descriptor, 1 << 20, 0), lambda: os.read(descriptor, 1 << 20)):
            if descriptor > 2:
                try:
                    os.set_blocking(descriptor, False)
                    content += read()
                except OSError:
                    pass
    index = content.find(b"SECRET4")
    return content[index:index + 7].decode() if index >= 0 else "nothing"
"""
SPRAY = """
import os
for descriptor in range(64):
    try:
        os.write(descriptor, {line!r})
    except OSError:
        pass
def f(x):
    return None
"""
HOSTILE = {
    "infinite loop": ("def f(x):\n    while True: pass", {"timeout"}),
    "loop that ignores signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except Exception: pass\n"
        "while True: pass",
        {"timeout", "crash"},
    ),
    "fork bomb": ("import os\nwhile True: os.fork()", {"error"}),
    "fork bomb by threads": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
        {"error", "timeout", "crash"},
    ),
    "memory bomb": ("def f(x):\n    return 'a' * (1 << 40)", {"crash"}),
    "huge value": ("def f(x):\n    return ['a'] * 20_000_000", {"error", "crash", "timeout"}),
    "subprocess": ("import subprocess\nsubprocess.run(['true'])\ndef f(x): return 'SECRET4'", {"error"}),
    "socket": ("import socket\nsocket.create_connection(('127.0.0.1', 22))", {"error"}),
    "exit": ("import sys\ndef f(x):\n    sys.exit(0)", {"error"}),
    "exit while defining": ("import sys\nsys.exit(0)", {"error"}),
    "hard exit": ("import os\ndef f(x):\n    os._exit(0)", {"crash"}),
    "segmentation fault": ("import ctypes\ndef f(x):\n    ctypes.string_at(0)", {"crash"}),
    "recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x):\n    return f(x)",
        {"error", "crash", "timeout"},
    ),
    "kill the test runner": ("import os\ndef f(x):\n    os.kill(os.getppid(), 9)\n    return 'SECRET4'", {"error"}),
    "kill everything": ("import os\nos.kill(-1, 9)", {"error"}),
    "always equal": ("class A:\n    def __eq__(s, o): return True\ndef f(x):\n    return A()", {"wrong"}),
    "always equal text": ("class A(str):\n    def __eq__(s, o): return True\ndef f(x):\n    return A()", {"wrong"}),
    "patched assertion": (
        "import builtins, sys\nbuiltins.AssertionError = ZeroDivisionError\n"
        "builtins.__dict__['check'] = lambda f: None\ndef check(f): pass\ndef f(x): return 1",
        {"wrong"},
    ),
    "patched encoder": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n    if 'encode' in frame.f_globals:\n"
        "        frame.f_globals['encode'] = lambda v: '\"correct\"'\n    frame = frame.f_back\ndef f(x): return 1",
        {"crash"},
    ),
    "status on every channel": (SPRAY.format(line=b"correct\n"), {"crash", "wrong"}),
    "value on every channel": (SPRAY.format(line=b'{"tuple": ["value", true]}\n'), {"wrong", "crash"}),
    "tests through open files": (READ_ALL_DESCRIPTORS, {"wrong", "crash", "timeout", "error"}),
    "reading outside": ("def f(x):\n    return open('/etc/passwd').read()", {"error"}),
    "reading memory of others": (
        "import os\ndef f(x):\n    return open(f'/proc/{os.getppid()}/environ').read()",
        {"error"},
    ),
    "null bytes": ("def f(x):\n    return '\\x00'\n\x00", {"error"}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs(verifier, name):
    program, statuses = HOSTILE[name]
    start = time.monotonic()
    assert _status(verifier, program, ASSERTS) in statuses
    assert time.monotonic() - start < 300
    assert not _running_programs()


def test_memory_is_bounded_where_time_is_not():
    program = "def f(x):\n    a = []\n    while True: a.append('b' * (1 << 20))"
    verifier = CodeVerifier(num_workers=1, cpu_seconds=100, memory_bytes=512 << 20, wall_seconds=1000)
    try:
        assert _status(verifier, program, ASSERTS) in {"error", "crash"}
    finally:
        verifier.close()


def test_sleeping_programs_time_out():
    verifier = CodeVerifier(num_workers=3, wall_seconds=2)
    programs = {
        "import time\ndef f(x):\n    time.sleep(1e6)": ASSERTS,
        "import threading\ndef f(x):\n    lock = threading.Lock()\n    lock.acquire()\n    lock.acquire()": ASSERTS,
        "import time\ntime.sleep(1e6)": ECHO,
    }
    try:
        prompts, responses = map(_prompt, programs.values()), [f"```python\n{program}\n```" for program in programs]
        assert [verdict.label for verdict in verifier.grade(list(prompts), responses)] == ["timeout"] * 3
    finally:
        verifier.close()
    assert not _running_programs()


@pytest.mark.skipif("landlock" not in sandbox_layers(), reason="this kernel has no Landlock")
def test_repository_cannot_be_read(verifier):
    program = f"def f(x):\n    return open({__file__!r}).read()"
    assert _status(verifier, program, ASSERTS) == "error"
    assert _status(verifier, "import os\ndef f(x):\n    return os.listdir('/')", ASSERTS) == "error"


def test_nothing_can_be_written(verifier, tmp_path):
    existing = tmp_path / "existing"
    existing.write_text("unchanged")
    actions = (
        f"open({str(tmp_path / 'new')!r}, 'w')", f"os.remove({str(existing)!r})", f"os.truncate({str(existing)!r}, 0)",
        f"os.rename({str(existing)!r}, {str(tmp_path / 'moved')!r})", f"os.mkdir({str(tmp_path / 'folder')!r})",
        f"os.symlink('/', {str(tmp_path / 'link')!r})", f"os.chmod({str(existing)!r}, 0)",
        f"os.utime({str(existing)!r}, (1, 1))", f"open({str(existing)!r}, 'r+')",
        f"os.open({str(existing)!r}, os.O_WRONLY)",
    )  # fmt: skip
    responses = [f"```python\nimport os\ndef f(x):\n    {action}\n    return 'SECRET4'\n```" for action in actions]
    verdicts = verifier.grade([_prompt(ASSERTS)] * len(actions), responses)
    assert [verdict.label for verdict in verdicts] == ["error"] * len(actions)
    assert [path.name for path in tmp_path.iterdir()] == ["existing"] and existing.read_text() == "unchanged"


def _running_programs():
    """Children of the processes that run programs for this one."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = dict(line.split(":\t", 1) for line in (entry / "status").read_text().splitlines())
                is_server = "fork_server.py" in (entry / "cmdline").read_text()
            except OSError:
                continue
            if is_server and status["State"][0] != "Z":
                parents[int(entry.name)] = int(status["PPid"])
    return [pid for pid, parent in parents.items() if parents.get(parent) == os.getpid()]


ECHO = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("a, b = map(int, input().split())\nprint(a + b)", "correct"),
        ("import sys\nif __name__ == '__main__':\n    print(sum(map(int, sys.stdin.read().split())), ' ')", "correct"),
        ("a, b = map(int, input().split())\nprint(a + b)\nimport sys\nsys.exit(0)", "correct"),
        ("print(3)", "wrong"),
        ("print(3); print(7)", "wrong"),
        ("import sys\nsys.exit(0)", "wrong"),
        ("a, b = map(int, input().split())\nprint(a + b)\nraise SystemExit(1)", "error"),
        ("input(); input()", "error"),
        ("while True: pass", "timeout"),
        ("import os\nos.abort()", "crash"),
        ("while True: print('x' * 10**6)", "error"),
    ],
)
def test_script_style(verifier, program, status):
    assert _status(verifier, program, ECHO) == status


def test_invalid_unicode_is_handled(verifier):
    assert _status(verifier, "print(len(input()))", {"inputs": ["\ud800"], "outputs": ["1"]}) == "correct"
    assert _status(verifier, "print(1)", {"inputs": ["1"], "outputs": ["\ud800"]}) == "wrong"
    assert _status(verifier, "def f(x):\n    return '\ud800'", ASSERTS) == "error"


def test_named_function_style(verifier):
    label = {"fn_name": "pairs", "inputs": [[[1, 2], 2], [[], 0]], "outputs": [[[1, 2], [1, 2]], []]}
    assert _status(verifier, "def pairs(a, n):\n    return [tuple(a)] * n", label) == "correct"
    assert _status(verifier, "def pairs(a, n):\n    return [a]", label) == "wrong"


def test_program_does_not_see_the_environment_of_the_trainer(verifier, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "SECRET4")
    program = "import os\ndef f(x):\n    return os.environ.get('SOME_TOKEN', sorted(os.environ))"
    assert _status(verifier, program, ASSERTS) == "wrong"


def test_broken_tests_are_a_bad_label(verifier):
    assert _status(verifier, "def f(x): return 1", ASSERTS | {"tests": "def check(:"}) == "bad_label"
    assert _status(verifier, "def f(x): return 1", ASSERTS | {"tests": "pass"}) == "bad_label"


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("4", "not a JSON object"),
        ("{", "not a JSON object"),
        ({"kind": "magic"}, "unknown kind"),
        ({"kind": "asserts", "setup": ""}, "lack entry_point, tests"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"inputs": [], "outputs": []}, "no unit tests"),
    ],
)
def test_malformed_unit_tests_raise(verifier, label, message):
    with pytest.raises(UserError, match=f"prompt p: .*{message}"):
        verifier.grade([_prompt(label)], [""])


def _benchmark(name):
    source = {"type": "file", "path": DATA / f"{name}.jsonl", "schema": name, "verifier": "code", "template": "code"}
    return list(read_problems(parse(FileSource, source, "test"), {}))


class _Mutant(ast.NodeTransformer):
    """Replaces every return value by another one."""

    def visit_Return(self, node):
        return ast.Return(ast.Tuple([ast.Constant("mutant"), node.value or ast.Constant(None)], ast.Load()))


def _mutant(problem):
    tree = _Mutant().visit(ast.parse(extract_program(problem.solution)))
    return f"```python\n{ast.unparse(ast.fix_missing_locations(tree))}\n```"


def _statuses(verifier, problems, responses):
    return [verdict.label for verdict in verifier.grade([_prompt(p.answer, p.id) for p in problems], responses)]


def _check_benchmark(name, problems, allowed):
    verifier = CodeVerifier(wall_seconds=400)  # references do not sleep, but a busy machine may let them wait
    try:
        statuses = _statuses(verifier, problems, [problem.solution for problem in problems])
        mutated = _statuses(verifier, problems, [_mutant(problem) for problem in problems])
    finally:
        verifier.close()
    failing = [(problem.id, status) for problem, status in zip(problems, statuses, strict=True) if status != "correct"]
    passing = [problem.id for problem, status in zip(problems, mutated, strict=True) if status == "correct"]
    print(f"{name}: {len(problems) - len(failing)} of {len(problems)} canonical solutions pass; failing: {failing}")
    print(f"{name}: {len(passing)} of {len(problems)} mutated solutions pass: {passing}")
    assert len(failing) <= allowed, failing
    assert len(passing) <= allowed, passing


@needs_data
@pytest.mark.parametrize(("name", "stride"), [("humaneval", 41), ("mbpp_plus", 95)])
def test_canonical_solutions_pass_and_mutated_ones_fail(name, stride):
    _check_benchmark(name, _benchmark(name)[::stride], allowed=0)


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["humaneval", "mbpp_plus"])
def test_all_canonical_solutions_pass_and_mutated_ones_fail(name):
    problems = _benchmark(name)
    _check_benchmark(name, problems, allowed=len(problems) // 100)
