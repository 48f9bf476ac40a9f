"""Numbers as text for people: durations, bytes, percentages. No torch here."""

from __future__ import annotations


def format_seconds(seconds: float) -> str:
    """Return ``42s``, ``3m05s`` or ``2h07m``."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    return f"{total // 3600}h{total % 3600 // 60:02d}m"


def format_bytes(count: float) -> str:
    """Return bytes in binary units: ``512 B``, ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def printable(text: str) -> str:
    """Return ``text`` with control characters written out, so that a terminal shows them instead of obeying them."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def percent(mean: float, std_err: float | None = None) -> str:
    """Return ``83.2 ± 1.5``, in per cent; the mean alone without a standard error."""
    return f"{100 * mean:.1f}{_plus_minus(std_err)}"


def tokens(mean: float, std_err: float | None = None) -> str:
    """Return a mean number of tokens: ``812.4 ± 9.3``."""
    return f"{mean:.1f}" + ("" if std_err is None else f" ± {std_err:.1f}")


def points(difference: float, std_err: float | None = None) -> str:
    """Return a difference in percentage points with its sign: ``+3.1 ± 1.5``."""
    return f"{100 * difference:+.1f}".replace("-", "−") + _plus_minus(std_err)


def _plus_minus(std_err: float | None) -> str:
    return "" if std_err is None else f" ± {100 * std_err:.1f}"
