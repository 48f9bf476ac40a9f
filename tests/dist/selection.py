"""Which cases a launch of ranks has to compute: those of the tests that were selected."""

import pytest


def selected(request: pytest.FixtureRequest, *names: str) -> set[tuple]:
    """The values of parameters ``names`` in the selected tests of the module, slow ones only if they are asked for."""
    parameters = [
        item.callspec.params
        for item in request.session.items
        if hasattr(item, "callspec") and item.module is request.module
    ]
    return {tuple(values[name] for name in names) for values in parameters if all(name in values for name in names)}
