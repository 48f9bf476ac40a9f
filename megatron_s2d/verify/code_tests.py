"""Reads test code (asserts, ``check``, ``test_*`` functions) without running it: what it needs from the program."""

from __future__ import annotations

import ast
import builtins
import importlib
import keyword
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

# Test code of LeetCode problems builds these and compares them; only plain values reach a program.
_NODES = {"ListNode", "TreeNode", "list_node", "tree_node"}
_NO_IMPORT = {"antigravity", "this"}  # standard modules that do more than define


class UnusableTests(ValueError):
    """Tests that cannot be run; the message says why."""


def method_name(name: str) -> str:
    """Return the bare name of a function or of a method of ``Solution``; raise ``UnusableTests`` for anything else."""
    bare = name.strip().removeprefix("Solution().").removeprefix("Solution.")
    if not bare.isidentifier() or keyword.iskeyword(bare):
        raise UnusableTests(f"'{name[:60]}' names neither a function nor a method of Solution")
    return bare


def asserts_label(code: str, entry_point: str | None = None, setup: str = "") -> dict[str, Any]:
    """Return the unit tests of kind ``asserts`` that ``code`` makes.

    Names that the code calls and does not define are functions of the program. Raises ``UnusableTests`` if it does not
    compile, asserts nothing, calls no function of the program, or exchanges more than plain values with it.
    """
    tree, setup_tree = _parse(code, "test code"), _parse(setup, "setup code")
    code, imported = _without_solution_imports(code, tree)
    test_nodes = list(ast.walk(tree))
    nodes = [*test_nodes, *ast.walk(setup_tree)]
    _check_style(tree)
    defined, has_unknown = _defined_names(nodes)
    called = Counter(
        node.func.id for node in test_nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    )
    functions = [name for name in {**called, **dict.fromkeys(imported)} if name not in defined | {"Solution"}]
    if entry_point is None:
        methods = [node.attr for node in test_nodes if isinstance(node, ast.Attribute) and _is_solution(node.value)]
        candidates = [*methods, *_checked(tree, defined), *sorted(functions, key=lambda name: -called[name])]
        if not candidates:
            raise UnusableTests("the test code calls no function of the program; name it in entry_point")
        entry_point = candidates[0]
    entry_point = method_name(entry_point)
    functions = list(dict.fromkeys([entry_point, *functions]))
    if classes := [name for name in functions[1:] if name[0].isupper()]:
        raise UnusableTests(f"the tests build objects of {', '.join(classes)}; only plain values reach a program")
    used = [{node.id for node in part if isinstance(node, ast.Name)} for part in (test_nodes, nodes)]
    if nodes_used := used[0] & _NODES:
        raise UnusableTests(f"the tests build {', '.join(sorted(nodes_used))}; only plain values reach a program")
    unknown = used[1] - defined - {*functions, "Solution"}
    if unknown and not has_unknown:
        raise UnusableTests(f"the tests use {', '.join(sorted(unknown))}, which neither they nor Python define")
    return {"kind": "asserts", "setup": setup, "entry_point": entry_point, "functions": functions, "tests": code}


def completed(prompt: str) -> str:
    """Return a prompt that ends in an unfinished function (HumanEval) as a module; "" if it is not Python."""
    for ending in ("", "\n    pass\n", "\n        pass\n"):
        try:
            ast.parse(prompt + ending)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        return prompt + ending
    return ""


def _parse(code: str, what: str) -> ast.Module:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UnusableTests(f"the {what} is not Python ({error})") from None


def _without_solution_imports(code: str, tree: ast.Module) -> tuple[str, list[str]]:
    """Return the code without ``from solution import name`` (KodCode), and these names."""
    names, lines = [], code.splitlines()
    for node in list(tree.body):
        if isinstance(node, ast.ImportFrom) and node.module == "solution":
            names += [alias.name for alias in node.names if alias.asname in (None, alias.name)]
            tree.body.remove(node)
            for index in range(node.lineno - 1, node.end_lineno):
                lines[index] = ""
    return "\n".join(lines) if names else code, names


def _check_style(tree: ast.Module) -> None:
    asserts = False
    for node in ast.walk(tree):
        asserts |= isinstance(node, (ast.Assert, ast.Raise))
        if isinstance(node, ast.Call):
            asserts |= "assert" in getattr(node.func, "attr", getattr(node.func, "id", "")).lower()
        if isinstance(node, ast.ClassDef) and any("TestCase" in ast.unparse(base) for base in node.bases):
            raise UnusableTests("classes of unittest are not supported; write asserts")
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test") and node.args.args:
            raise UnusableTests(f"{node.name} has parameters (fixtures of pytest), which are not supported")
    if not asserts:
        raise UnusableTests("the test code asserts nothing, so every program would pass")


def _defined_names(nodes: list[ast.AST]) -> tuple[set[str], bool]:
    """Return the names that code binds or has from Python, and whether there may be others."""
    names, has_unknown = set(vars(builtins)) | {"__name__"}, False
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for imported in _imported_names(node):
                has_unknown |= imported == "*"
                names.add(imported)
    return names, has_unknown


def _imported_names(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    for alias in node.names:
        root = (getattr(node, "module", None) or "").partition(".")[0]
        if alias.name == "*" and root in sys.stdlib_module_names and root not in _NO_IMPORT:
            yield from vars(importlib.import_module(node.module))
        else:
            yield alias.asname or alias.name.partition(".")[0]


def _is_solution(node: ast.AST) -> bool:
    """Return whether an expression is ``Solution`` or ``Solution()``."""
    node = node.func if isinstance(node, ast.Call) else node
    return isinstance(node, ast.Name) and node.id == "Solution"


def _checked(tree: ast.Module, defined: set[str]) -> Iterator[str]:
    """Yield the functions that the code passes to its ``check``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "check":
            yield from (item.id for item in node.args if isinstance(item, ast.Name) and item.id not in defined)
