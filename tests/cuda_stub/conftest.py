"""Ranks of real layouts on the CUDA stub; skipped with the reason where it cannot be compiled."""

from pathlib import Path

import pytest
from cases import CASES, HAS_TRANSFORMER_ENGINE, NEED_TRANSFORMER_ENGINE, REFUSE_TRANSFORMER_ENGINE, SLOW

from megatron_s2d.errors import UserError
from megatron_s2d.measure.build_stub import stub_library, why_unavailable

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    reason = why_unavailable()
    for item in items:
        if HERE in item.path.parents and reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_generate_tests(metafunc):
    """Run each test of ``rank_checks.py`` for the cases of its file."""
    if "case" in metafunc.fixturenames:
        names = metafunc.module.NAMES
        metafunc.parametrize("case", [pytest.param(CASES[name], id=name, marks=marks_of(name)) for name in names])


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    """Return the marks of a case: slow, and skipped where its layers are not installed."""
    needs = name in NEED_TRANSFORMER_ENGINE and not HAS_TRANSFORMER_ENGINE
    skip = [pytest.mark.skip(reason="Transformer Engine is not installed (docs/gpu.md)")] if needs else []
    if name in REFUSE_TRANSFORMER_ENGINE and HAS_TRANSFORMER_ENGINE:
        skip = [pytest.mark.skip(reason="Transformer Engine's layers do not have its parts (docs/supported-models.md)")]
    return skip + ([pytest.mark.slow] if name in SLOW | NEED_TRANSFORMER_ENGINE else [])


@pytest.fixture(scope="session", autouse=True)
def stub() -> Path:
    """The compiled library; a compiler error fails here, with its first line."""
    try:
        return stub_library()
    except UserError as error:
        pytest.fail(str(error))
