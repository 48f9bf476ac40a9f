"""Collects the results of ``gpu_all.sh`` into one JSON file and prints them as Markdown tables.

    python benchmarks/gpu_report.py collect PARTS RESULTS.json     (gpu_all.sh does this)
    python benchmarks/gpu_report.py table RESULTS.json             Markdown on standard output

A part is ``NAME.status.json`` (exit code, seconds), with ``NAME.rows.json`` (a benchmark's rows) or ``NAME.xml``
(pytest's checks) next to it, and ``NAME.log``, whose last lines are included if the part failed.
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
    """Return the files of all parts in the directory as one document."""
    results = []
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
        results.append(status)
    measured_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"measured": measured_at, "machine": dict(machine), "parts": results}


def printed_rows(lines: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows that a killed benchmark printed: lines that are JSON objects."""
    rows = []
    for line in lines:
        if line.startswith("{"):
            try:
                rows.append(json.loads(line))
            except ValueError:  # an incomplete line
                continue
    return rows


def read_checks(path: Path) -> list[dict[str, str]]:
    """Read name, outcome and reason of every check from pytest's JUnit file."""
    checks = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        outcome, reason = "passed", ""
        for kind, result in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            child = case.find(kind)
            if child is not None:
                outcome, reason = result, next(iter((child.get("message") or "").splitlines()), "")
        properties = {item.get("name"): item.get("value") for item in case.iter("property")}
        checks.append({"name": case.get("name", ""), "outcome": outcome, "reason": reason, "measured": properties})
    return checks


def table(results: Mapping[str, Any]) -> str:
    """Return Markdown with the machine, the outcomes, and one table per part."""
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
    counts = {
        outcome: sum(check["outcome"] == outcome for check in checks) for outcome in ("passed", "failed", "skipped")
    }
    lines = [
        ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) + ".",
        "",
        "| check | outcome | measured |",
    ]
    lines.append("|---|---|---|")
    for check in checks:
        measured = "; ".join(f"{name} {value}" for name, value in check["measured"].items())
        lines.append(f"| {check['name']} | {check['outcome']} | {_cell(measured or check['reason'])} |")
    return [*lines, ""]


def _rows_table(rows: Sequence[Row]) -> list[str]:
    """Return one column per field in the order of first appearance, below a line of the values common to all rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    common = [name for name in names if len(rows) > 1 and all(row.get(name) == rows[0].get(name) for row in rows)]
    varying = [name for name in names if name not in common]
    lines = []
    if common:
        lines += ["; ".join(f"{_title(name)}: {_value(name, rows[0][name])}" for name in common) + ".", ""]
    lines += ["| " + " | ".join(map(_title, varying)) + " |", "|" + "---|" * len(varying)]
    lines += ["| " + " | ".join(_cell(_value(name, row.get(name))) for name in varying) + " |" for row in rows]
    return [*lines, ""]


def _title(name: str) -> str:
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


def describe_machine() -> dict[str, Any]:
    """Return the device capabilities and the installed versions."""
    import torch

    from megatron_s2d.parallel import device

    machine = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "megatron-core", "transformer-engine", "triton", "apex", "transformers"):
        try:
            machine[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            machine[name] = None
    return machine | {"capabilities": dataclasses.asdict(device.capabilities())}


def main(arguments: list[str] | None = None, *, machine: Callable[[], Mapping[str, Any]] = describe_machine) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="parts to one file; exit code 1 if a part failed")
    collecting.add_argument("parts", type=Path)
    collecting.add_argument("results", type=Path)
    printing = commands.add_parser("table", help="Markdown of a results file")
    printing.add_argument("results", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "table":
        print(table(json.loads(options.results.read_text(encoding="utf-8"))), end="")
        return 0
    results = collect(options.parts, machine())
    options.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for part in results["parts"]:
        print(f"{part['name']}: {part['outcome']}, {len(part['rows'])} rows, {len(part.get('checks', []))} checks")
    return int(any(part["outcome"] != "passed" for part in results["parts"]))


if __name__ == "__main__":
    sys.exit(main())
