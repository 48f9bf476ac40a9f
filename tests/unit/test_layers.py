"""House rules as tests: the layers that imports follow, no circles between files, and what imports without torch."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_s2d"

# A module imports from its own layer and from the ones above it (CONTRIBUTING.md).
LAYERS = [
    ("errors", "formatting", "arithmetic", "buffer_sizes"),
    ("config", "records", "columns", "artifacts"),
    ("kl", "matrix_products"),
    ("objectives",),
    ("parallel",),
    ("models", "data", "verify"),
    ("rollout",),
    ("train",),
    ("teachers",),
    ("stages",),
    ("estimate", "report"),
    ("workflow",),
    ("studies", "measure"),
    ("cli",),
]
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}

# Beside the layers: the packages that these import, and the files that import them.
CONVERSION_IMPORTS = {"config", "artifacts", "errors", "formatting", "models", "parallel", "conversion"}
LAUNCHERS_IMPORTS = {"config", "artifacts", "errors", "formatting", "workflow", "studies", "launchers"}


def module_name(path: Path) -> str:
    """Dotted name under which a file is imported; launchers/ and conversion/ are installed inside the package."""
    parts = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).with_suffix("").parts
    return ".".join(("megatron_s2d", *parts)).removesuffix(".__init__")


def source_files() -> list[Path]:
    """All Python files of the package, of launchers/ and of conversion/."""
    folders = (PACKAGE, ROOT / "launchers", ROOT / "conversion")
    files = [path for folder in folders for path in folder.rglob("*.py") if "cpu_stub" not in path.parts]
    return sorted(files)


MODULES = {module_name(path): path for path in source_files()}


def imports_in(source: str, modules: Iterable[str]) -> Iterator[str]:
    """Modules of ``modules`` that ``source`` imports, at any depth: in functions and for type checkers as well."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield from (
                    name for name in ([submodule] if submodule in modules else [node.module]) if name in modules
                )


@functools.cache
def imported_modules(path: Path) -> frozenset[str]:
    return frozenset(imports_in(path.read_text(encoding="utf-8"), MODULES))


def packages_imported_by(path: Path) -> set[str]:
    """First name after ``megatron_s2d`` of each import."""
    return {name.split(".")[1] for name in imported_modules(path) if "." in name}


def find_cycle(graph: dict[str, Iterable[str]]) -> list[str]:
    """Names along one circle, the first again at the end; empty for a graph without one."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize(
    "path", [path for path in source_files() if path.is_relative_to(PACKAGE)], ids=lambda path: module_name(path)
)
def test_imports_follow_the_layers(path):
    package = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if package == "__init__":
        return
    allowed = {name for name, level in LEVELS.items() if level <= LEVELS[package]}
    if package == "cli":
        allowed |= {"conversion", "launchers"}
    assert packages_imported_by(path) <= allowed, f"{package} imports {packages_imported_by(path) - allowed}"


@pytest.mark.parametrize("path", sorted((ROOT / "conversion").glob("*.py")), ids=lambda path: path.name)
def test_conversion_imports_neither_training_nor_workflow(path):
    assert packages_imported_by(path) <= CONVERSION_IMPORTS


@pytest.mark.parametrize("path", sorted((ROOT / "launchers").glob("*.py")), ids=lambda path: path.name)
def test_launchers_import_the_plan_and_not_the_training(path):
    assert packages_imported_by(path) <= LAUNCHERS_IMPORTS


@pytest.mark.parametrize(
    ("folder", "forbidden"), [("served", ["sglang", "megatron"]), ("megatron", ["sglang", "served"])]
)
def test_rollout_engines_do_not_import_each_other(folder, forbidden):
    prefixes = tuple(f"megatron_s2d.rollout.{name}" for name in forbidden)
    for path in sorted((PACKAGE / "rollout" / folder).glob("*.py")):
        assert not [name for name in imported_modules(path) if name.startswith(prefixes)], path
        attributes = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert "sglang" not in attributes, f"{path} reads settings of rollout.sglang"


def test_files_do_not_import_each_other_in_a_circle():
    graph = {name: imported_modules(path) - {name} for name, path in MODULES.items()}
    assert find_cycle(graph) == []


def test_circle_check_sees_imports_inside_functions():
    sources = {
        "a.one": "from a.two import f",
        "a.two": "def f():\n    from a import three",
        "a.three": "import a.one",
    }
    graph = {name: set(imports_in(source, sources)) for name, source in sources.items()}
    assert sorted(set(find_cycle(graph))) == ["a.one", "a.three", "a.two"]
    assert find_cycle(graph | {"a.three": set()}) == []


def test_configuration_planning_and_launchers_import_without_torch():
    modules = [
        "megatron_s2d.config.workflow",
        "megatron_s2d.workflow.plan",
        "megatron_s2d.workflow.preflight",
        "megatron_s2d.workflow.plan_estimate",
        "megatron_s2d.studies.simulate",
        "megatron_s2d.studies.sweep_report",
        "megatron_s2d.workflow.runner",
        "megatron_s2d.launchers.cli",
        "megatron_s2d.cli",
    ]
    code = f"import sys\nfor name in {modules!r}: __import__(name)\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_megatron_is_imported_after_the_choice_of_its_functions():
    first = "import megatron_s2d.parallel.plain_functions"
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        imported = re.search(r"^(from|import) megatron\.core", source, re.MULTILINE)
        if imported and path.relative_to(PACKAGE).parts[0] != "measure":  # as on a machine with a GPU
            assert first in source[: imported.start()], path


def test_every_package_is_installed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("__init__.py") if "cpu_stub" not in path.parts}
    assert listed == {".".join(folder.parts) for folder in folders} | {
        "megatron_s2d.launchers",
        "megatron_s2d.conversion",
        "megatron_s2d.configs",
    }


def test_environment_variables_are_read_in_two_packages():
    allowed = {"parallel", "launchers"}
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] not in allowed:
            text = path.read_text()
            assert "os.environ" not in text and "getenv" not in text, path


def test_files_and_functions_are_short():
    folders = (PACKAGE, *(ROOT / name for name in ("conversion", "launchers", "benchmarks")))
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        text = path.read_text()
        assert len(text.splitlines()) <= 450, f"{path} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno <= 80, f"{path}: {node.name} is too long"
