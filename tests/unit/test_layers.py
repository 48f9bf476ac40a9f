"""House rules that are tests: who may import whom, and what imports without torch."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_s2d"

# A module may import from its own layer and from the ones above it (CONTRIBUTING.md).
LAYERS = [
    ("errors", "formatting"),
    ("config", "records", "columns", "artifacts"),
    ("kl",),
    ("objectives",),
    ("parallel",),
    ("models", "data", "verify"),
    ("rollout",),
    ("train",),
    ("teachers",),
    ("stages",),
    ("estimate", "report"),
    ("workflow",),
    ("studies",),
    ("cli",),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("megatron_s2d."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("megatron_s2d.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_layers(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    allowed = {name for name, rank in RANK.items() if rank <= RANK[own]}
    if own == "cli":
        allowed |= {"conversion", "launchers"}
    assert imports_of(path) <= allowed, f"{own} may not import {imports_of(path) - allowed}"


@pytest.mark.parametrize("path", sorted((ROOT / "conversion").glob("*.py")), ids=lambda path: path.name)
def test_conversion_stays_beside_the_trainer(path):
    assert imports_of(path) <= {"config", "artifacts", "errors", "formatting", "models", "parallel", "conversion"}


@pytest.mark.parametrize("path", sorted((ROOT / "launchers").glob("*.py")), ids=lambda path: path.name)
def test_launchers_know_the_plan_and_not_the_training(path):
    assert imports_of(path) <= {"config", "artifacts", "errors", "formatting", "workflow", "studies", "launchers"}


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


def test_every_package_is_installed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("__init__.py") if "cpu_stub" not in path.parts}
    assert listed == {".".join(folder.parts) for folder in folders} | {
        "megatron_s2d.launchers",
        "megatron_s2d.conversion",
    }


def test_the_environment_is_read_in_two_places():
    allowed = {"parallel", "launchers"}
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] not in allowed:
            text = path.read_text()
            assert "os.environ" not in text and "getenv" not in text, path


def test_files_and_functions_stay_readable():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "conversion").glob("*.py"), *(ROOT / "launchers").glob("*.py")]:
        text = path.read_text()
        assert len(text.splitlines()) <= 450, f"{path} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 80, f"{path}: {node.name} is too long"
