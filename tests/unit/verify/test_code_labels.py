"""Unit tests in the layouts of published data sets: read, or refused in one line that names the prompt and the form."""

import base64
import json
import pickle
import zlib

import pytest

from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt
from megatron_s2d.verify.code_labels import check_unit_tests, parse_unit_tests


def read(label):
    text = label if isinstance(label, str) else json.dumps(label)
    prompt = Prompt("row7", None, "", "code", "code", text)
    check_unit_tests(prompt)
    return parse_unit_tests(prompt)


def script(*pairs):
    inputs, outputs = zip(*pairs, strict=True)
    return {"kind": "script", "inputs": list(inputs), "outputs": list(outputs)}


def examples(name, *pairs):
    inputs, outputs = zip(*pairs, strict=True)
    return {"kind": "examples", "entry_point": name, "inputs": list(inputs), "outputs": list(outputs)}


def compressed(content):
    return base64.b64encode(zlib.compress(content)).decode()


STDIN_CASE = {"input": "1\n", "output": "2", "testtype": "stdin"}
FUNCTION_CASE = {"input": "[1, 2]\n3", "output": "[4]", "testtype": "functional"}
PRIVATE = compressed(pickle.dumps(json.dumps([STDIN_CASE])))

LAYOUTS = {
    "APPS, TACO: scripts": ({"inputs": ["1", "2"], "outputs": ["2", "4"]}, script(("1", "2"), ("2", "4"))),
    "TACO: lines as lists": ({"inputs": [["1", "2"]], "outputs": [["3"]]}, script(("1\n2", "3"))),
    "numbers for texts": ({"inputs": ["5", 6], "outputs": [25, 1.5]}, script(("5", "25"), ("6", "1.5"))),
    "APPS: fn_name": ({"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}, examples("add", ([1, 2], 3))),
    "an empty fn_name": ({"inputs": ["1"], "outputs": ["2"], "fn_name": ""}, script(("1", "2"))),
    "a null fn_name": ({"inputs": ["1"], "outputs": ["2"], "fn_name": None}, script(("1", "2"))),
    "Eurus, verl: lines of JSON": (
        {"inputs": ["[1]\n2\n"], "outputs": ["[3]"], "fn_name": "f"},
        examples("f", ([[1], 2], [3])),
    ),
    "lines of Python": (
        {"inputs": ["'a'\nTrue"], "outputs": ["(1, 2)"], "fn_name": "f"},
        examples("f", (["a", True], [1, 2])),
    ),
    "single arguments": ({"inputs": [5, [6]], "outputs": [6, 7], "fn_name": "f"}, examples("f", ([5], 6), ([6], 7))),
    "a method": ({"inputs": [[1]], "outputs": [2], "fn_name": "Solution().f"}, examples("f", ([1], 2))),
    "APPS: the row": ({"question": "?", "input_output": '{"inputs": ["1"], "outputs": ["2"]}'}, script(("1", "2"))),
    "JSON in JSON": (json.dumps('{"inputs": ["1"], "outputs": ["2"]}'), script(("1", "2"))),
    "columns as JSON": ({"inputs": '["1"]', "outputs": '["2"]'}, script(("1", "2"))),
    "LiveCodeBench: public cases": ([STDIN_CASE], script(("1\n", "2"))),
    "LiveCodeBench: private cases": (PRIVATE, script(("1\n", "2"))),
    "LiveCodeBench: private cases of another protocol": (
        compressed(pickle.dumps(json.dumps([STDIN_CASE]), protocol=2)),
        script(("1\n", "2")),
    ),
    "compressed JSON": (compressed(json.dumps([STDIN_CASE]).encode()), script(("1\n", "2"))),
    "LiveCodeBench: the row": (
        {"public_test_cases": json.dumps([STDIN_CASE]), "private_test_cases": PRIVATE, "metadata": "{}"},
        script(("1\n", "2"), ("1\n", "2")),
    ),
    "LiveCodeBench: a function": (
        {"public_test_cases": json.dumps([FUNCTION_CASE]), "metadata": '{"func_name": "f"}'},
        examples("f", ([[1, 2], 3], [4])),
    ),
    "DeepCoder: a function": (
        [FUNCTION_CASE | {"metadata": {"func_name": "f"}}],
        examples("f", ([[1, 2], 3], [4])),
    ),
    "DeepCoder: a script": ([STDIN_CASE | {"metadata": {"func_name": None}}], script(("1\n", "2"))),
    "PRIME: stdin_stdout": ([{"type": "stdin_stdout", "input": "1", "output": "2"}], script(("1", "2"))),
    "PRIME: function_call": (
        [{"type": "function_call", "fn_name": "f", "input": [1], "output": [2]}],
        examples("f", ([1], [2])),
    ),
    "PRIME: verification_info": (
        {"language": "python", "test_cases": [{"type": "stdin_stdout", "input": "1", "output": "2"}]},
        script(("1", "2")),
    ),
    "cases without a type": ([{"input": "1", "output": "2"}], script(("1", "2"))),
    "one case": ({"input": "1", "output": "2"}, script(("1", "2"))),
    "a case on each line": (
        '{"input": "1", "output": "2"}\n{"input": "3", "output": "6"}',
        script(("1", "2"), ("3", "6")),
    ),
    "cases as JSON texts": (['{"input": "1", "output": "2"}'], script(("1", "2"))),
    "other names of the columns": ([{"input": "1", "expected_output": "2"}], script(("1", "2"))),
    "open-r1": ({"official_tests": [{"input": "1\n", "output": "2\n"}]}, script(("1\n", "2\n"))),
    "CodeContests": (
        {"public_tests": {"input": ["1"], "output": ["2"]}, "private_tests": {"input": ["3"], "output": ["6"]}},
        script(("1", "2"), ("3", "6")),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_cases(layout):
    label, expected = LAYOUTS[layout]
    assert read(label) == expected


CHECK = "def check(candidate):\n    assert candidate(1) == 2\n"
ASSERTS = {
    "HumanEval": ({"prompt": "import math\ndef f(x):\n    '''Doc.'''\n", "test": CHECK, "entry_point": "f"}, ["f"]),
    "HumanEval that checks itself": ({"test": CHECK + "check(f)\n", "entry_point": "f"}, ["f"]),
    "check without a name": ({"test": CHECK + "check(f)\n"}, ["f"]),
    "MBPP": ({"test_list": ["assert f(1) == 2", "assert f(2) == 3"], "test_setup_code": ""}, ["f"]),
    "MBPP with imports": ({"test_list": ["assert math.isclose(f(1), 2)"], "test_imports": ["import math"]}, ["f"]),
    "several functions": ({"test_list": ["assert g(f(1)) == 2"], "entry_point": "f"}, ["f", "g"]),
    "AceCode": (["assert f(1) == 2", "assert f(2) == 3"], ["f"]),
    "test code": ("assert f(1) == 2\nassert f(2) == 3", ["f"]),
    "SandboxFusion": ({"assert_case": ["assert f(1) == 2"]}, ["f"]),
    "MBPP+": ({"test": "import numpy as np\nfor x, y in zip([1], [2]):\n    assert np.allclose(f(x), y)"}, ["f"]),
    "LeetCodeDataset": (
        {"test": "def check(candidate):\n    assert candidate(a=1) == 2\n", "entry_point": "Solution().f"},
        ["f"],
    ),
    "DeepCoder: LeetCode": ({"functional": CHECK + "check(Solution().f)\n"}, ["f"]),
    "KodCode": ("from solution import f\n\ndef test_one():\n    assert f(1) == 2\n", ["f"]),
    "LeetCodeDataset with its helpers": (
        {
            "prompt": "class ListNode: pass\ndef list_node(v): return ListNode()\nclass Solution:\n    def f(self, x):",
            "test": CHECK,
            "entry_point": "Solution().f",
        },
        ["f"],
    ),
    "a prompt in prose": ({"prompt": "Write a function\ndef f", "test": CHECK, "entry_point": "f"}, ["f"]),
    "our own, a method": ({"kind": "asserts", "setup": "", "tests": CHECK, "entry_point": "Solution().f"}, ["f"]),
    "names of star imports": (["from math import *\nassert floor(f(1)) == 2"], ["f"]),
}


@pytest.mark.parametrize("layout", ASSERTS)
def test_layouts_of_test_code(layout):
    label, functions = ASSERTS[layout]
    tests = read(label)
    assert (tests["kind"], tests["entry_point"]) == ("asserts", functions[0])
    assert tests.get("functions", functions) == functions


class Hostile:
    def __reduce__(self):
        return (print, ("unpickled",))


REFUSED = {
    "a number": ("4", "not a JSON object"),
    "prose": ("the sum", "not a JSON object"),
    "an unknown object": ({"stdin_path": "a.txt"}, r"unknown layout \(keys: stdin_path\)"),
    "text for columns": ({"inputs": "1 2", "outputs": "3"}, "'inputs' of the unit tests is not a list"),
    "a case without output": ([{"input": "1"}], "test case 1 lacks input and output"),
    "no cases": ([], "no unit tests"),
    "no private cases": ({"private_test_cases": "[]"}, "no unit tests"),
    "a list of different lengths": ({"public_tests": {"input": ["1"], "output": []}}, "1 inputs and 0 outputs"),
    "arguments without a name": (
        {"inputs": [[1, 2]], "outputs": [3]},
        "test case 1 has list instead of text .* fn_name",
    ),
    "objects as text": ({"inputs": [{"a": 1}], "outputs": ["1"]}, "has dict instead of text"),
    "named arguments": (
        {"inputs": [{"a": 1}], "outputs": [1], "fn_name": "f"},
        "the input of test case 1 is an object",
    ),
    "lines that are not JSON": (
        {"inputs": ["nums = [1]"], "outputs": ["1"], "fn_name": "f"},
        r"the input of test case 1 has a line that is not JSON \(nums = \[1\]\)",
    ),
    "a result that is not JSON": (
        {"inputs": ["1"], "outputs": ["yes!"], "fn_name": "f"},
        "the output of test case 1 has a line that is not JSON",
    ),
    "a function without a name": ([FUNCTION_CASE], "test case 1 of type functional .* metadata.func_name"),
    "a function of a class": ({"inputs": [[1]], "outputs": [1], "fn_name": "Stack.push"}, "'Stack.push' names neither"),
    "an unknown type": (
        [{"type": "interactive", "input": "1", "output": "2"}],
        "is of type interactive; known are stdin",
    ),
    "objects in setup code": (
        {"test_list": ["assert f(root) == 1"], "test_setup_code": "root = Node(1)"},
        "use Node, which",
    ),
    "two functions": (
        [{"fn_name": name, "input": [1], "output": [1]} for name in ("f", "g")],
        "the test cases call different functions",
    ),
    "another language": ({"language": "cpp", "test_cases": [STDIN_CASE]}, "unit tests for cpp"),
    "a pickled object": (compressed(pickle.dumps(Hostile())), "a pickle with [A-Z_]+, which is not read"),
    "a pickled list": (compressed(pickle.dumps([STDIN_CASE])), "a pickle with EMPTY_LIST, which is not read"),
    "half of compressed cases": (PRIVATE[: len(PRIVATE) // 8 * 4], "compressed tests are cut off"),
    "damaged compressed cases": (PRIVATE[:16] + "AAAAAAAA" + PRIVATE[24:], "compressed tests are damaged"),
    "tests that do not compile": (
        {"test": "def check(f:\n  assert f(1)", "entry_point": "f"},
        "the test code is not Python",
    ),
    "tests without an assert": ({"test": "def check(f):\n    f(1) == 2\n", "entry_point": "f"}, "asserts nothing"),
    "unittest": ({"test": "class A(unittest.TestCase):\n    def test(self): self.assertTrue(f(1))\n"}, "unittest"),
    "fixtures": ("def test_a(tmp_path):\n    assert f(1) == 2\n", "fixtures of pytest"),
    "objects of the program": (["assert f(Node(1)) == 2"], "build objects of Node"),
    "lists with nodes": (
        {"test": "def check(f):\n    assert f(list_node([1])) == 1\n", "entry_point": "f"},
        "build list_node",
    ),
    "unknown names": (
        {"test": "def check(f):\n    assert f(DATA) == 1\n", "entry_point": "f"},
        "use DATA, which neither",
    ),
    "no function": ({"test": CHECK}, "calls no function of the program"),
    "nesting": ("[" * 100_000, "row7: .*(not a JSON object|nested too deeply)"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_other_forms_are_refused_in_one_line(form, capfd):
    label, message = REFUSED[form]
    with pytest.raises(UserError, match=message) as error:
        read(label)
    assert str(error.value).startswith("prompt row7: ") and "\n" not in str(error.value)
    assert capfd.readouterr().out == ""  # nothing was unpickled


def test_compressed_tests_have_a_limit(monkeypatch):
    monkeypatch.setattr("megatron_s2d.verify.code_labels._MAX_BYTES", 1 << 10)
    with pytest.raises(UserError, match="cut off, or larger than"):
        read(compressed(b" " * (1 << 20)))
