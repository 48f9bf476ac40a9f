"""The ``s2d`` command: parses arguments, calls the package and prints errors as one line.

Commands import what they need when they run, so that ``--help`` and mistakes in arguments answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import sys
import traceback
from collections.abc import Sequence

from megatron_s2d.artifacts.files import remaining_disk_errors
from megatron_s2d.artifacts.versions import check_torch
from megatron_s2d.cli import init, results, run, studies, tools
from megatron_s2d.cli.parser import silence_libraries
from megatron_s2d.errors import UserError
from megatron_s2d.formatting import printable
from megatron_s2d.parallel.launcher_env import is_launched
from megatron_s2d.workflow.status import RESUME_HINT, Interrupted, JobCrashed
from megatron_s2d.workflow.stop_signals import stop_signals_raised

_EXIT_ERROR, _EXIT_CRASH, _EXIT_INTERRUPTED = 1, 3, 130
_DEBUG_HINT = "(run again with --debug for the traceback, and please report it)"
_EPILOG = """examples:
  s2d run configs/quickstart.yaml --dry-run     # check and print the plan
  s2d run configs/quickstart.yaml               # train, evaluate, report; run it again to resume
  s2d eval runs/quickstart --arm rl_teacher_bridge
  s2d plan configs/quickstart.yaml --gpu h200
  s2d launch slurm configs/quickstart.yaml --dry-run
  s2d doctor

exit codes: 0 success, 1 a mistake that you can correct (one line says where), 3 an internal error,
130 interrupted (run the same command again to resume). `s2d COMMAND --help` has more examples."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 (user error), 3 (internal error) or 130 (interrupted)."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return _EXIT_ERROR
    if not options.debug:
        silence_libraries()
    try:
        if options.command != "doctor":  # it lists all versions
            check_torch()
        # Ranks that a launcher started are told by it, and answer with a checkpoint (StopOnSignal).
        with remaining_disk_errors(), contextlib.nullcontext() if is_launched() else stop_signals_raised():
            return options.run(options) or 0
    except UserError as error:
        return _fail(f"error: {error}", options.debug, _EXIT_ERROR)
    except Interrupted as interrupted:
        return _fail(str(interrupted), False, _EXIT_INTERRUPTED)
    except KeyboardInterrupt as interrupt:
        by = f" by {interrupt}" if interrupt.args else ""  # the name of another signal than Ctrl-C's
        return _fail(f"stopped{by}; {RESUME_HINT}", False, _EXIT_INTERRUPTED)
    except BrokenPipeError:
        return _EXIT_ERROR
    except MemoryError:
        return _fail("error: out of memory: give the command more", options.debug, _EXIT_ERROR)
    except JobCrashed as error:
        return _fail(f"internal error: {error} {_DEBUG_HINT}", options.debug, _EXIT_CRASH, error.traceback)
    except Exception as error:
        message = f"internal error: {type(error).__name__}: {error} {_DEBUG_HINT}"
        return _fail(message, options.debug, _EXIT_CRASH)


def _fail(message: str, debug: bool, code: int, trace: str = "") -> int:
    """Print the message as one line, after the traceback if asked for; return the exit code."""
    if debug:
        sys.stderr.write(trace or traceback.format_exc())
    # Names and texts of the user's files may contain sequences that terminals obey.
    print(printable(" ".join(message.split("\n"))), file=sys.stderr)
    return code


def _version() -> str:
    try:
        return importlib.metadata.version("megatron-s2d")
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path, not installed
        return "(not installed)"


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands without importing torch."""
    parser = argparse.ArgumentParser(
        prog="s2d",
        description="Sparse-to-dense post-training on Megatron-Core: RL with verifiable rewards on a teacher, then "
        "forward-KL warm-up and on-policy distillation into a student, as one resumable run.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatron-s2d {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    init.add_init(commands)
    run.add_run(commands)
    run.add_plan(commands)
    run.add_launch(commands)
    studies.add_sweep(commands)
    studies.add_simulate(commands)
    results.add_eval(commands)
    results.add_generate(commands)
    results.add_watch(commands)
    results.add_report(commands)
    tools.add_reward(commands)
    tools.add_cache(commands)
    tools.add_convert(commands)
    tools.add_serve_teacher(commands)
    tools.add_doctor(commands)
    return parser
