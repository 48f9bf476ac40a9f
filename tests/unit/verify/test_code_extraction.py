"""Which block of a response is the program, and which printed numbers count as equal."""

import time

import pytest

from megatron_s2d.verify.code_extraction import extract_program
from megatron_s2d.verify.code_output import same_output

FUNCTION = {"kind": "examples", "entry_point": "add", "inputs": [[1, 2]], "outputs": [3]}
SCRIPT = {"kind": "script", "inputs": ["1"], "outputs": ["1"]}
SILENT = {"kind": "script", "inputs": [""], "outputs": ["1"]}
ADD = "def add(a, b):\n    return a + b"
DOCSTRING = f'{ADD}\n    """\n    ```\n    x\n    ```\n    """'
READ = "n = int(input())\nprint(n)"


@pytest.mark.parametrize(
    ("label", "response", "program"),
    [
        pytest.param(None, "first\n```python\na\n```\nthen\n```py\nb\n\nc\n```\nend", "b\n\nc", id="the last block"),
        pytest.param(
            FUNCTION, f"```python\n{ADD}\n```\nUse:\n```python\nprint(add(1, 2))\n```", ADD, id="use after it"
        ),
        pytest.param(
            FUNCTION, f"```python\n{ADD}\n```\n```python\n>>> add(1, 2)\n3\n```", ADD, id="a session after it"
        ),
        pytest.param(FUNCTION, f"```python\n{ADD}\n```\nprints\n```\n3\n```", ADD, id="output after it"),
        pytest.param(FUNCTION, f"```\n{ADD}\n```\nprints\n```\n3\n```", ADD, id="output after an untagged block"),
        pytest.param(FUNCTION, f"```python\nold\n```\n```python\n{ADD}\n```\n```text\n3\n```", ADD, id="text after it"),
        pytest.param(FUNCTION, f"```python\n{ADD} + 1\n```\n```python\n{ADD}\n```", ADD, id="the corrected one"),
        pytest.param(
            FUNCTION,
            "```python\nadd = lambda a, b: a\n```\n```python\nadd(1, 2)\n```",
            "add = lambda a, b: a",
            id="lambda",
        ),
        pytest.param(
            FUNCTION,
            "```python\nclass Solution:\n    def add(self): 1\n```\n```python\nx\n```",
            "class Solution:\n    def add(self): 1",
            id="method",
        ),
        pytest.param(
            FUNCTION,
            "```python\nadd == 1\n```\n```python\ndef adder(): 1\n```",
            "def adder(): 1",
            id="neither defines it",
        ),
        pytest.param(
            FUNCTION, f"```\n{ADD}\n```\n```python\nadd(1, 2)\n```", ADD, id="only an untagged one defines it"
        ),
        pytest.param(FUNCTION, f"```python\n{ADD}\n```\n```\n{ADD} + 1\n```", ADD, id="tagged before untagged"),
        pytest.param(SCRIPT, f"```python\n{READ}\n```\n```\n{READ}\n2\n```", READ, id="script, tagged before untagged"),
        pytest.param(
            SCRIPT, f"```python\n{READ}\n```\nFor 1 it prints\n```python\nprint(1)\n```", READ, id="script, use"
        ),
        pytest.param(SCRIPT, f"```python\n{READ}\n```\n```python\n1\n```", READ, id="script, output tagged as Python"),
        pytest.param(SCRIPT, f"```python\n{READ}\n```\n```\n$ python a.py\n1\n```", READ, id="script, command line"),
        pytest.param(
            SCRIPT,
            f"```python\nimport sys\nprint(sys.stdin.read())\n```\n```python\n{READ}\n```",
            READ,
            id="two scripts",
        ),
        pytest.param(SILENT, "```python\nprint(1)\n```\n```python\n1\n```", "print(1)", id="script without input"),
        pytest.param(SCRIPT, f"```python\n{READ}", READ, id="unclosed"),
        pytest.param(SCRIPT, f"```\n{READ}\n", f"{READ}\n", id="unclosed and untagged"),
        pytest.param(SCRIPT, f"```python\nold\nThe next:\n```python\n{READ}\n```", READ, id="the one before unclosed"),
        pytest.param(SCRIPT, f"```python\n{READ}\n```\n```", READ, id="a fence too many"),
        pytest.param(SCRIPT, f"```python\n{READ}```", READ, id="fence after the last line"),
        pytest.param(SCRIPT, f"```python\n{READ}\n      ```\nDone.", READ, id="closing fence indented"),
        pytest.param(SCRIPT, "```python print(1)```", "print(1)", id="on one line"),
        pytest.param(SCRIPT, f"Here it is: ```python\n{READ}\n```", READ, id="after prose"),
        pytest.param(SCRIPT, f"~~~python\n{READ}\n~~~", READ, id="tildes"),
        pytest.param(SCRIPT, f"```Python3\n{READ}\n```", READ, id="Python3"),
        pytest.param(SCRIPT, f"```python3.11\n{READ}\n```", READ, id="python3.11"),
        pytest.param(SCRIPT, f"```{{.python .numberLines}}\n{READ}\n```", READ, id="attributes"),
        pytest.param(SCRIPT, f"```python:main.py\n{READ}\n```", READ, id="file name"),
        pytest.param(SCRIPT, f"```pycon\n>>> 1\n```\n```python\n{READ}\n```", READ, id="other tags"),
        pytest.param(SCRIPT, f"```python\n{READ}\n```\n".replace("\n", "\r\n"), READ, id="carriage returns"),
        pytest.param(SCRIPT, f"\ufeff```python\n\ufeff{READ}\n```", READ, id="byte order marks"),
        pytest.param(SCRIPT, READ, READ, id="no fence"),
        pytest.param(SCRIPT, "The answer is 1.", None, id="prose"),
        pytest.param(SCRIPT, "from the input we read n, and if n is 1 the answer is 1", None, id="prose like code"),
        pytest.param(SCRIPT, "```cpp\nint main() {}\n```", None, id="another language"),
        pytest.param(SCRIPT, "```python\n\n```", None, id="an empty block"),
        pytest.param(SCRIPT, f"<think>```python\n{READ}\n```", None, id="in open reasoning"),
        pytest.param(SCRIPT, f"<think>```python\nx\n```</think>```python\n{READ}\n```", READ, id="after reasoning"),
        pytest.param(FUNCTION, f"```python\n{DOCSTRING}\n```", DOCSTRING, id="fences in a docstring"),
    ],
)
def test_which_program_counts(label, response, program):
    found = extract_program(response, label)
    assert (found.rstrip("\n") if found else found) == (program.rstrip("\n") if program else program)


def test_reasoning_that_the_template_began():
    assert extract_program(f"```python\n{READ}\n```", SCRIPT, "user: 1\nassistant: <think>\n") is None
    assert extract_program(f"so</think>\n```python\n{READ}\n```", SCRIPT, "assistant: <think>\n") == READ


def test_extraction_is_linear():
    for part in (
        "```",
        "```\n",
        "` ",
        "```python\na",
        "````python`",
        " " * 50 + "\n",
        "``` ",
        "x = ",
        "~~~",
        "``` python\n",
    ):
        start = time.process_time()
        extract_program(part * (1_000_000 // len(part)), FUNCTION)
        extract_program("``` " + " " * 1_000_000 + "x", SCRIPT)
        assert time.process_time() - start < 5, part


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ("1.5", "1.50"), ("1.5000001", "1.5"), ("0.3333333333333333", "0.333333333"),
        ("0.333333", "0.3333333333333333"),
        ("1e-07", "0.0000001"), ("-0.0", "0.000"), ("1", "1.0"), ("(0.5, 2)", "(0.50, 2)"), ("x=1.50 y", "x=1.5 y"),
        ("0.0", "0.00000000000000012345678"), ("6.02e23", "602000000000000000000000.0"), ("1 \n2\n\n", "1\n2"),
    ],
)  # fmt: skip
def test_printed_numbers_that_are_equal(actual, expected):
    assert same_output(actual, expected)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ("1e5", "100000"), ("100000.0", "100000"), ("1.0", "1"), ("1.51", "1.50"), ("0.0000001", "0.0000003"),
        ("1234567.90", "1234567.89"), ("1.2.30", "1.2.3"), ("v1.50", "v1.5"), ("1  2", "1 2"), ("nan", "1.5"),
        ("inf", "1.5"), ("1.5 1.5", "1.5"), ("2.8284271247461903", "2.83"), ("1,5", "1.5"), ("1.5", "1.5 1"),
        ("", "0.0"), ("0.000001234", "0.000001230"), ("1000000006.0", "1000000007.0"), ("+5", "5"), ("5", "-5"),
    ],
)  # fmt: skip
def test_printed_numbers_that_differ(actual, expected):
    assert not same_output(actual, expected)
