"""Reads unit tests in the layouts of published data sets, or refuses them by name. No torch here.

Results, by ``kind`` (what ``case_runner.py`` and ``code_verifier.py`` run):
``{"kind": "script", "inputs", "outputs"}`` texts for standard input and output,
``{"kind": "examples", "entry_point", "inputs", "outputs"}`` lists of arguments, and results,
``{"kind": "asserts", "setup", "entry_point", "functions", "tests"}`` test code, and the functions of the program in it,
``{"kind": "reference", "reference", "entry_point", "inputs", "example", "compare", "tolerance"}`` (MBPP+).
"""

from __future__ import annotations

import ast
import base64
import binascii
import dataclasses
import json
import pickletools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt
from megatron_s2d.verify.code_tests import UnusableTests, asserts_label, completed, method_name

_MAX_BYTES = 1 << 28  # of decompressed tests
_FIELDS = {
    "asserts": {"setup", "entry_point", "tests"},
    "reference": {"reference", "entry_point", "inputs", "example", "compare", "tolerance"},
    "examples": {"entry_point", "inputs", "outputs"},
    "script": {"inputs", "outputs"},
}
_CASE_KEYS = (
    ("input", "output"), ("inputs", "outputs"), ("input", "expected_output"), ("input", "expected"),
    ("stdin", "stdout"),
)  # fmt: skip
_CALLS = {None: None, "stdin": False, "stdin_stdout": False, "functional": True, "function_call": True}
_FORMS = (
    "inputs and outputs (with fn_name for functions), a list of test cases with input and output, test code with "
    "entry_point, or a list of asserts"
)
# Text in a pickle of one text, as LiveCodeBench has it; anything else would build objects.
_TEXT_OPCODES = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "STOP"}
_TEXTS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_NAMES = ("fn_name", "func_name", "function_name", "entry_point")
_WRAPPERS = (
    "input_output", "verification_info", "ground_truth", "test_cases", "unit_tests", "official_tests",
    "tests",
)  # fmt: skip
_LCB_TESTS = ("public_test_cases", "private_test_cases")
_CODE_CONTESTS_TESTS = ("public_tests", "private_tests", "generated_tests")


def parse_unit_tests(prompt: Prompt) -> dict[str, Any]:
    """Return the unit tests in a prompt's label, with their ``kind``. Raises ``UserError`` if they cannot be run."""
    try:
        return _read(_value(prompt.answer), _Context())
    except UnusableTests as error:
        reason = str(error)
    except RecursionError:
        reason = "the label is nested too deeply"
    raise UserError(f"prompt {prompt.id}: {reason}")


def check_unit_tests(prompt: Prompt) -> None:
    """Raise ``UserError`` like ``parse_unit_tests``, and for test code that cannot work."""
    label = parse_unit_tests(prompt)
    if label["kind"] == "asserts":
        try:
            asserts_label(label["tests"], label["entry_point"], label["setup"])
        except UnusableTests as error:
            raise UserError(f"prompt {prompt.id}: {error}") from None


@dataclasses.dataclass(frozen=True)
class _Context:
    """What the objects around the tests say of them."""

    name: str | None = None  # of the function
    setup: str = ""


# --------------------------------------------------------------------------------------------------------- text layers


def _value(text: Any) -> Any:
    """Return what text holds: JSON, JSON in JSON text, JSON lines, compressed JSON; other text and values unchanged."""
    for _ in range(4):
        if not isinstance(text, str):
            return text
        content = text.strip().lstrip("\ufeff")
        try:
            text = json.loads(content)
            continue
        except (ValueError, RecursionError):
            pass
        if (unpacked := _decompressed(content)) is not None:
            text = unpacked
            continue
        lines = [line for line in content.splitlines() if line.strip()]
        try:
            return [json.loads(line) for line in lines] if len(lines) > 1 else text
        except (ValueError, RecursionError):
            return text
    return text


def _decompressed(text: str) -> str | None:
    """Return the text in base64 of zlib, by itself or pickled; None if ``text`` is not that."""
    try:
        packed = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    if len(packed) < 8 or packed[0] != 0x78:  # how zlib begins
        return None
    try:
        decompressor = zlib.decompressobj()
        data = decompressor.decompress(packed, _MAX_BYTES)
        if not decompressor.eof:
            raise UnusableTests(f"compressed tests are cut off, or larger than {_MAX_BYTES >> 20} MiB")
        return _pickled_text(data) if data.startswith(b"\x80") else data.decode()
    except (zlib.error, UnicodeDecodeError) as error:
        raise UnusableTests(f"compressed tests are damaged ({error})") from None


def _pickled_text(data: bytes) -> str:
    """Return the one text in a pickle. Nothing is unpickled: its instructions are read, and others are refused."""
    text = None
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in _TEXTS and text is None:
                text = argument
            elif opcode.name not in _TEXT_OPCODES:
                raise UnusableTests(
                    f"compressed tests are a pickle with {opcode.name}, which is not read; only pickled text is "
                    "(LiveCodeBench). Store the tests as JSON"
                )
    except ValueError as error:
        if isinstance(error, UnusableTests):
            raise
        raise UnusableTests(f"compressed tests are a damaged pickle ({error})") from None
    if text is None:
        raise UnusableTests("compressed tests are a pickle without text")
    return text


# ------------------------------------------------------------------------------------------------------------- layouts


def _read(value: Any, context: _Context) -> dict[str, Any]:
    if isinstance(value, list):
        return _read_list(value, context)
    if isinstance(value, str) and _looks_like_tests(value):
        return asserts_label(value, context.name, context.setup)
    if not isinstance(value, dict):
        raise UnusableTests(f"the label is not a JSON object or list with unit tests; verifier code needs {_FORMS}")
    if "kind" in value:
        return _own_kind(value)
    context = _inner_context(value, context)
    if any(key in value for key in (*_LCB_TESTS, *_CODE_CONTESTS_TESTS)):
        return _read_parts(value, context)
    if isinstance(value.get("type", value.get("testtype")), str):
        return _read_list([value], context)
    for inputs, outputs in (("inputs", "outputs"), ("input", "output")):
        if inputs in value and outputs in value:
            return _read_columns(value, inputs, outputs, context)
    for key in ("test_list", "assert_case", "asserts"):
        if isinstance(value.get(key), list):
            return asserts_label("\n".join(map(str, value[key])), context.name, context.setup)
    for key in ("test", "functional"):
        if isinstance(value.get(key), str):
            return asserts_label(value[key], context.name, context.setup)
    for key in _WRAPPERS:
        if value.get(key):
            return _read(_value(value[key]), context)
    raise UnusableTests(f"unit tests of an unknown layout (keys: {', '.join(map(str, value))[:200]}); write {_FORMS}")


def _looks_like_tests(text: str) -> bool:
    return any(line.lstrip().startswith(("assert ", "assert(", "def check", "def test")) for line in text.splitlines())


def _own_kind(label: dict[str, Any]) -> dict[str, Any]:
    required = _FIELDS.get(label["kind"])
    if required is None:
        raise UnusableTests(f"unit tests of an unknown kind; choose one of {', '.join(_FIELDS)}")
    if missing := required - label.keys():
        raise UnusableTests(f"unit tests of kind {label['kind']} lack {', '.join(sorted(missing))}")
    if label["kind"] in ("asserts", "reference"):
        if "inputs" in required and not label["inputs"]:
            raise UnusableTests("no unit tests; give at least one input")
        return label | {"entry_point": method_name(label["entry_point"])}
    return _read_columns(label, "inputs", "outputs", _Context(label.get("entry_point")))


def _inner_context(value: dict[str, Any], context: _Context) -> _Context:
    language = value.get("language")
    if isinstance(language, str) and not language.lower().startswith("py"):
        raise UnusableTests(f"unit tests for {language[:40]}; verifier code runs Python")
    metadata = _value(value.get("metadata"))
    name = _name(value) or _name(metadata if isinstance(metadata, dict) else {}) or context.name
    setup = context.setup
    if "test" in value and isinstance(value.get("prompt"), str):
        setup = completed(value["prompt"])
    for key in ("test_imports", "test_setup_code"):
        part = value.get(key)
        setup += "".join(f"{line}\n" for line in (part if isinstance(part, list) else [part]) if line)
    return _Context(name, setup)


def _name(value: Mapping[str, Any]) -> str | None:
    return next((value[key] for key in _NAMES if isinstance(value.get(key), str) and value[key].strip()), None)


def _read_parts(value: dict[str, Any], context: _Context) -> dict[str, Any]:
    """Read LiveCodeBench (lists of test cases) and CodeContests (columns), whose tests are in several parts."""
    cases = []
    for key in (*_LCB_TESTS, *_CODE_CONTESTS_TESTS):
        part = _value(value.get(key)) or []
        if isinstance(part, dict) and all(isinstance(part.get(name), list) for name in ("input", "output")):
            _check_lengths(part["input"], part["output"])
            part = [{"input": one, "output": two} for one, two in zip(part["input"], part["output"], strict=True)]
        if not isinstance(part, list):
            raise UnusableTests(f"'{key}' is not a list of test cases")
        cases += part
    return _read_list(cases, context)


def _read_list(items: list[Any], context: _Context) -> dict[str, Any]:
    if not items:
        raise UnusableTests("no unit tests; give at least one input")
    if all(isinstance(item, str) for item in items):
        if any(_looks_like_tests(item) for item in items):
            return asserts_label("\n".join(items), context.name, context.setup)
        items = [_value(item) for item in items]
    inputs, outputs, kinds, names = [], [], set(), set()
    for number, case in enumerate(items, 1):
        keys = next((keys for keys in _CASE_KEYS if isinstance(case, dict) and set(keys) <= case.keys()), None)
        if keys is None:
            raise UnusableTests(f"test case {number} lacks input and output; write {_FORMS}")
        inner = _inner_context(case, context)
        kind = case.get("testtype", case.get("type"))
        if kind not in _CALLS:
            raise UnusableTests(f"test case {number} is of type {kind}; known are {', '.join(filter(None, _CALLS))}")
        is_function = inner.name is not None if kind is None else _CALLS[kind]
        if is_function and inner.name is None:
            raise UnusableTests(
                f"test case {number} of type {kind} calls a function without a name; give it in fn_name "
                "(LiveCodeBench: metadata.func_name)"
            )
        kinds.add(is_function)
        names.add(inner.name)
        inputs.append(case[keys[0]])
        outputs.append(case[keys[1]])
    if len(kinds) > 1 or (True in kinds and len(names) > 1):
        raise UnusableTests("the test cases call different functions, or some of them use standard input")
    return _examples(inputs, outputs, names.pop()) if True in kinds else _script(inputs, outputs)


def _read_columns(value: dict[str, Any], inputs: str, outputs: str, context: _Context) -> dict[str, Any]:
    columns = [_value(value[key]) for key in (inputs, outputs)]
    if inputs == "input" and all(isinstance(value[key], str) for key in (inputs, outputs)):
        columns = [[value[key]] for key in (inputs, outputs)]  # one test case
    for key, column in zip((inputs, outputs), columns, strict=True):
        if not isinstance(column, list):
            raise UnusableTests(f"'{key}' of the unit tests is not a list with an item per case")
    _check_lengths(*columns)
    return _script(*columns) if context.name is None else _examples(*columns, context.name)


def _check_lengths(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    if len(inputs) != len(outputs):
        raise UnusableTests(
            f"unit tests with {len(inputs)} inputs and {len(outputs)} outputs; give one output per input"
        )
    if not inputs:
        raise UnusableTests("no unit tests; give at least one input")


# --------------------------------------------------------------------------------------------------------------- cases


def _script(inputs: Sequence[Any], outputs: Sequence[Any]) -> dict[str, Any]:
    texts = [[_text(item, number) for number, item in enumerate(items, 1)] for items in (inputs, outputs)]
    return {"kind": "script", "inputs": texts[0], "outputs": texts[1]}


def _text(value: Any, number: int) -> str:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise UnusableTests(
        f"test case {number} has {type(value).__name__} instead of text for standard input and output; tests of a "
        "function need its name in fn_name"
    )


def _examples(inputs: Sequence[Any], outputs: Sequence[Any], name: str) -> dict[str, Any]:
    calls, results = [], []
    for number, (arguments, result) in enumerate(zip(inputs, outputs, strict=True), 1):
        if isinstance(arguments, str):  # LiveCodeBench: a line of JSON per argument, and JSON for the result
            lines = [line for line in arguments.split("\n") if line.strip()]
            arguments = [_literal(line, f"the input of test case {number}") for line in lines]
            result = _literal(result, f"the output of test case {number}") if isinstance(result, str) else result
        elif isinstance(arguments, dict):
            raise UnusableTests(
                f"the input of test case {number} is an object; give a list of arguments in their order"
            )
        elif not isinstance(arguments, list):
            arguments = [arguments]
        calls.append(arguments)
        results.append(result)
    return {"kind": "examples", "entry_point": method_name(name), "inputs": calls, "outputs": results}


def _literal(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return json.loads(json.dumps(ast.literal_eval(text.strip())))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise UnusableTests(
            f"{what} has a line that is not JSON ({text.strip()[:40]}); tests of a function give a line of JSON per "
            "argument, or a list of arguments"
        ) from None
