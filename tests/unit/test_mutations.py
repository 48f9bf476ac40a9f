"""The list of mutations stays applicable: every text is in its file once, and the named tests exist."""

import ast
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
from mutations import MUTATIONS, mutated


def test_there_are_forty_mutations_with_different_names():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 40


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_can_be_applied(mutation):
    source = (TESTS.parent / "megatron_s2d" / mutation.file).read_text(encoding="utf-8")
    changed = mutated(source, mutation)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    for name in mutation.tests.split():
        assert (TESTS / "unit" / name).exists(), f"tests/unit/{name} does not exist"
