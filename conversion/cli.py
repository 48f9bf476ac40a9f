"""``s2d convert hf-to-megatron | megatron-to-hf | check | inspect``: arguments and printed results.

Parsing needs no torch; ``run`` imports what its command needs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import TYPE_CHECKING

from megatron_s2d.conversion.progress import Report, bar, silent

if TYPE_CHECKING:
    from megatron_s2d.conversion.convert import Converted


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``convert`` to the main command's sub-commands; the parsed arguments go to ``run``."""
    convert = subparsers.add_parser("convert", help="Hugging Face <-> Megatron checkpoints")
    actions = convert.add_subparsers(dest="convert_action", required=True)
    quiet = argparse.ArgumentParser(add_help=False)
    quiet.add_argument("--no-progress", action="store_true", help="no progress bars")

    command = actions.add_parser(
        "hf-to-megatron", parents=[quiet], help="Hugging Face directory to Megatron checkpoint"
    )
    command.add_argument("hf_directory")
    command.add_argument("megatron_directory")
    for name in ("tensor", "pipeline", "expert"):
        command.add_argument(
            f"--{name}-model-parallel-size",
            type=_positive,
            default=1,
            metavar="N",
            help="layout that the files are cut for; they load at every other one too",
        )

    command = actions.add_parser(
        "megatron-to-hf", parents=[quiet], help="Megatron checkpoint to Hugging Face directory"
    )
    command.add_argument("megatron_directory")
    command.add_argument("hf_directory")
    command.add_argument("--max-shard-size", type=parse_size, default="5GB", metavar="SIZE", help="such as 5GB, 500MB")
    command.add_argument("--assets", metavar="DIR", help="take tokenizer and configuration files from this directory")

    command = actions.add_parser("check", parents=[quiet], help="compare tensors bit by bit, and logits")
    command.add_argument("hf_directory")
    command.add_argument("megatron_directory")
    command.add_argument(
        "--skip-logits", action="store_true", help="only tensors; for models that do not fit into memory twice"
    )

    command = actions.add_parser("inspect", parents=[quiet], help="what a checkpoint directory holds")
    command.add_argument("directory")
    command.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Carry out a parsed command; errors are ``UserError``."""
    report = silent if arguments.no_progress else bar
    actions = {
        "hf-to-megatron": _hf_to_megatron,
        "megatron-to-hf": _megatron_to_hf,
        "check": _check,
        "inspect": _inspect,
    }
    actions[arguments.convert_action](arguments, report)


def _hf_to_megatron(arguments: argparse.Namespace, report: Report) -> None:
    from megatron_s2d.conversion.convert import hf_to_megatron

    done = hf_to_megatron(
        arguments.hf_directory,
        arguments.megatron_directory,
        tensor_model_parallel_size=arguments.tensor_model_parallel_size,
        pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
        expert_model_parallel_size=arguments.expert_model_parallel_size,
        report=report,
    )
    _print_result(arguments.megatron_directory, done)


def _megatron_to_hf(arguments: argparse.Namespace, report: Report) -> None:
    from megatron_s2d.conversion.convert import megatron_to_hf

    done = megatron_to_hf(
        arguments.megatron_directory,
        arguments.hf_directory,
        max_shard_bytes=arguments.max_shard_size,
        assets=arguments.assets,
        report=report,
    )
    _print_result(arguments.hf_directory, done)


def _print_result(directory: str, done: Converted) -> None:
    print(f"{directory}: {done.spec.family}, {done.spec.num_parameters:,} parameters")
    for note in done.notes:
        print(f"note: {note}")


def _check(arguments: argparse.Namespace, report: Report) -> None:
    from megatron_s2d.conversion.convert import check_conversion

    found = check_conversion(arguments.hf_directory, arguments.megatron_directory, report=report)
    print(f"tensors: {found.num_tensors} equal bit by bit ({found.num_bytes:,} bytes)")
    if arguments.skip_logits:
        print("logits: not compared (--skip-logits)")
        return
    from megatron_s2d.conversion.logits import compare_logits

    logits = compare_logits(arguments.hf_directory, arguments.megatron_directory)
    print(
        f"logits: transformers and Megatron differ by at most {logits.max_difference:.1e} at {logits.num_positions} "
        f"positions (standard deviation {logits.standard_deviation:.2f})"
    )


def _inspect(arguments: argparse.Namespace, report: Report) -> None:
    from megatron_s2d.conversion.convert import inspect_checkpoint

    found = inspect_checkpoint(arguments.directory, report=report)
    if arguments.json:
        json.dump(found, sys.stdout, indent=1)
        print()
        return
    for key, value in found.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, item in value.items():
                print(f"  {name}: {item}")
        else:
            print(f"{key}: {f'{value:,}' if isinstance(value, int) and not isinstance(value, bool) else value}")


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


def parse_size(text: str) -> int:
    """Bytes of ``5GB``, ``500MB``, ``2GiB`` or a plain number (powers of 1000, with ``i`` of 1024)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it like 5GB or 500MB")
    number, prefix, binary = match.groups()
    power = " KMGT".index(prefix.upper()) if prefix else 0
    size = int(float(number) * (1024 if binary else 1000) ** power)
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a shard needs at least one byte")
    return size
