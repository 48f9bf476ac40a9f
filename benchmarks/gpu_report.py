"""The results of ``gpu_all.sh``: one JSON file of its parts, and the tables that documents take from that file.

    python benchmarks/gpu_report.py collect PARTS RESULTS.json     (gpu_all.sh does this)
    python benchmarks/gpu_report.py table RESULTS.json             Markdown on standard output

A part is ``NAME.status.json`` (exit code, seconds), with ``NAME.rows.json`` (a benchmark's rows) or ``NAME.xml``
(pytest's checks) beside it, and ``NAME.log``, of which the end is kept where the part failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import platform
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_LOG_LINES = 30
_TIMED_OUT = (124, 137)

Row = Mapping[str, Any]


def collect(parts: Path, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the parts left in the directory, as one document."""
    found = []
    for path in sorted(parts.glob("*.status.json"), key=lambda path: path.stat().st_mtime_ns):
        status = json.loads(path.read_text(encoding="utf-8"))
        name = status["name"]
        status["outcome"] = "out of time" if status["exit"] in _TIMED_OUT else "failed" if status["exit"] else "passed"
        rows, checks, log = (parts / f"{name}.{ending}" for ending in ("rows.json", "xml", "log"))
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        status["rows"] = json.loads(rows.read_text(encoding="utf-8")) if rows.exists() else printed_rows(lines)
        if checks.exists():
            status["checks"] = read_checks(checks)
        if status["exit"] != 0:
            status["end_of_log"] = lines[-_LOG_LINES:]
        found.append(status)
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"measured": when, "machine": dict(machine), "parts": found}


def printed_rows(lines: Sequence[str]) -> list[dict[str, Any]]:
    """Rows that a benchmark printed before it was ended: lines that are JSON objects."""
    found = []
    for line in lines:
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:  # cut in the middle
                continue
    return found


def read_checks(path: Path) -> list[dict[str, str]]:
    """pytest's JUnit file: name, outcome and reason of every check."""
    found = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        outcome, reason = "passed", ""
        for kind, word in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            child = case.find(kind)
            if child is not None:
                outcome, reason = word, next(iter((child.get("message") or "").splitlines()), "")
        properties = {item.get("name"): item.get("value") for item in case.iter("property")}
        found.append({"name": case.get("name", ""), "outcome": outcome, "reason": reason, "measured": properties})
    return found


def table(results: Mapping[str, Any]) -> str:
    """Markdown: the machine, what passed, and one table a part."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in sorted(machine) if isinstance(machine[name], str))
    lines = [f"Measured {results['measured']} on {machine['capabilities']['device_name']}; {versions}.", ""]
    for part in results["parts"]:
        lines += [f"### {part['name']}: {part['outcome']} ({part['seconds']} s)", ""]
        if part.get("checks"):
            lines += _checks_table(part["checks"])
        if part["rows"]:
            lines += _rows_table(part["rows"])
    return "\n".join(lines).rstrip() + "\n"


def _checks_table(checks: Sequence[Row]) -> list[str]:
    counts = {word: sum(check["outcome"] == word for check in checks) for word in ("passed", "failed", "skipped")}
    lines = [", ".join(f"{count} {word}" for word, count in counts.items()) + ".", "", "| check | outcome | measured |"]
    lines.append("|---|---|---|")
    for check in checks:
        said = "; ".join(f"{name} {value}" for name, value in check["measured"].items())
        lines.append(f"| {check['name']} | {check['outcome']} | {_cell(said or check['reason'])} |")
    return [*lines, ""]


def _rows_table(rows: Sequence[Row]) -> list[str]:
    """A column a field, in the order of first appearance; what all rows agree on is said once, above."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    common = [name for name in names if len(rows) > 1 and all(row.get(name) == rows[0].get(name) for row in rows)]
    shown = [name for name in names if name not in common]
    lines = []
    if common:
        lines += ["; ".join(f"{_words(name)}: {_value(name, rows[0][name])}" for name in common) + ".", ""]
    lines += ["| " + " | ".join(map(_words, shown)) + " |", "|" + "---|" * len(shown)]
    lines += ["| " + " | ".join(_cell(_value(name, row.get(name))) for name in shown) + " |" for row in rows]
    return [*lines, ""]


def _words(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ") + (", GiB" if name.endswith("_bytes") else "")


def _value(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_value(name, item)}" for key, item in value.items())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if name.endswith("_bytes"):
        return f"{value / 2**30:.2f}"
    if name in ("mfu", "roofline") or name.endswith("_error"):
        return f"{100 * value:.1f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def machine_here() -> dict[str, Any]:
    """The machine and what is installed on it."""
    import torch

    from megatron_s2d.parallel import device

    found = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "megatron-core", "transformer-engine", "triton", "apex", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"capabilities": dataclasses.asdict(device.capabilities())}


def main(arguments: list[str] | None = None, *, machine: Callable[[], Mapping[str, Any]] = machine_here) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="parts to one file; fails where a part did not pass")
    collecting.add_argument("parts", type=Path)
    collecting.add_argument("results", type=Path)
    printing = commands.add_parser("table", help="Markdown of a results file")
    printing.add_argument("results", type=Path)
    given = parser.parse_args(arguments)
    if given.command == "table":
        print(table(json.loads(given.results.read_text(encoding="utf-8"))), end="")
        return 0
    results = collect(given.parts, machine())
    given.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for part in results["parts"]:
        print(f"{part['name']}: {part['outcome']}, {len(part['rows'])} rows, {len(part.get('checks', []))} checks")
    return int(any(part["outcome"] != "passed" for part in results["parts"]))


if __name__ == "__main__":
    sys.exit(main())
