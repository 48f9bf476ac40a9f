"""Shared parts of the ``s2d`` commands: help texts, common arguments, the console."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from megatron_s2d.config.workflow import WorkflowConfig


class _HelpFormatter(argparse.HelpFormatter):
    """Wraps descriptions to the terminal and leaves examples as they are written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return super()._fill_text(text, width, indent)


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    summary: str,
    description: str,
    *examples: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog="\n  ".join(("examples:", *examples)),
        formatter_class=_HelpFormatter,
    )
    finish_command(command, run)
    return command


def finish_command(command: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int | None]) -> None:
    """Add what every command has: ``--debug`` and its function."""
    command.add_argument("--debug", action="store_true", help="print the traceback of an error")
    command.set_defaults(run=run)


def add_config(command: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that reads a workflow."""
    command.add_argument("config", type=Path, metavar="CONFIG", help="workflow file (YAML)")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a key, for example --set stages.opd_rl.optimizer.lr=5e-4; may be repeated",
    )
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="run directory (default: runs/ and the config's `name`)"
    )


def load_config(options: argparse.Namespace) -> tuple[WorkflowConfig, Path]:
    """Return the workflow and its run directory."""
    from megatron_s2d.config.workflow import load_workflow

    config = load_workflow(shipped(options.config), options.overrides)
    return config, (options.out or Path("runs") / config.name)


def shipped(path: Path) -> Path:
    """Return ``path``, or the file of that name in the installed package: its wheel has ``configs/`` inside."""
    inside = Path(__file__).parents[1] / path
    return inside if not path.exists() and path.parts[:1] == ("configs",) and inside.is_file() else path


def open_console() -> Console:
    """Return the terminal's console; output to a file or pipe gets wide lines instead of truncated cells."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def silence_libraries() -> None:
    """Hide warnings of torch and Megatron-Core from the terminal (jobs write them to their log files)."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=SyntaxWarning)
    warnings.filterwarnings("ignore", module=r"(megatron\.core|torch)\b")
    for name in ("megatron", "torch", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
