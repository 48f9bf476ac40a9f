"""Names of quantised number types; SGLang makes tables of them while it is imported."""


class ScalarType:
    """The type of such a number."""


class _Names:
    """Every attribute is its own name."""

    def __getattr__(self, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


scalar_types = _Names()
