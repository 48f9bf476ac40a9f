"""Command line of ``s2d convert hf-to-megatron | megatron-to-hf | merge-adapter | check | inspect``.

Parsing does not import torch; ``run`` imports the module of its command.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import TYPE_CHECKING

from megatron_s2d.conversion.progress import Report, bar, silent
from megatron_s2d.errors import UserError

if TYPE_CHECKING:
    from megatron_s2d.conversion.convert import Converted


_EXAMPLES = {
    "hf-to-megatron": (
        "s2d convert hf-to-megatron models/Qwen3-8B models/Qwen3-8B-megatron",
        "s2d convert hf-to-megatron models/Qwen3-8B models/Qwen3-8B-megatron --tensor-model-parallel-size 4",
    ),
    "megatron-to-hf": (
        "s2d convert megatron-to-hf runs/quickstart/stages/opd_rl/model exported "
        "--assets runs/quickstart/tokenizer/modular_arithmetic",
    ),
    "merge-adapter": ("s2d convert merge-adapter models/Qwen3-8B runs/my/stages/grpo/adapter models/Qwen3-8B-grpo",),
    "check": ("s2d convert check models/Qwen3-8B models/Qwen3-8B-megatron --skip-logits",),
    "inspect": (
        "s2d convert inspect runs/quickstart/stages/opd_rl/model",
        "s2d convert inspect --config models/Qwen3-8B/config.json",
    ),
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``convert`` to the commands of ``s2d``; ``run`` takes the parsed arguments."""
    convert = subparsers.add_parser(
        "convert",
        help="convert checkpoints between Hugging Face and Megatron",
        description="Convert checkpoints between Hugging Face and Megatron, compare the two, or describe one.",
        epilog="\n  ".join(("examples:", *(example for examples in _EXAMPLES.values() for example in examples))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = convert.add_subparsers(dest="convert_action", required=True, metavar="ACTION", title="actions")
    quiet = argparse.ArgumentParser(add_help=False)
    quiet.add_argument("--no-progress", action="store_true", help="show no progress bars")

    command = _add_action(actions, "hf-to-megatron", quiet, "convert a Hugging Face directory to a Megatron checkpoint")
    _add_directories(command, "hf", "megatron")
    for name in ("tensor", "pipeline", "expert"):
        command.add_argument(
            f"--{name}-model-parallel-size",
            type=_positive,
            default=1,
            metavar="N",
            help="layout that the files are written for; they load at every other one, too (default: 1)",
        )

    command = _add_action(actions, "megatron-to-hf", quiet, "convert a Megatron checkpoint to a Hugging Face directory")
    _add_directories(command, "megatron", "hf")
    command.add_argument(
        "--max-shard-size",
        type=parse_size,
        default="5GB",
        metavar="SIZE",
        help="largest file, such as 500MB (default: 5GB)",
    )
    command.add_argument("--assets", metavar="DIR", help="copy tokenizer and configuration files from DIR")

    command = _add_action(actions, "merge-adapter", quiet, "add a LoRA adapter (a PEFT directory) to a model's weights")
    _add_directories(command, "hf", "adapter", "merged")
    command.add_argument("--max-shard-size", type=parse_size, default="5GB", metavar="SIZE", help="largest file")

    command = _add_action(actions, "check", quiet, "compare the tensors of both bit by bit, and their logits")
    _add_directories(command, "hf", "megatron")
    command.add_argument(
        "--skip-logits", action="store_true", help="compare tensors only (logits need both models in memory)"
    )

    command = _add_action(actions, "inspect", quiet, "describe a checkpoint, or tell if a model is supported")
    command.add_argument("directory", nargs="?", metavar="DIR", help="checkpoint directory of either format")
    command.add_argument(
        "--config", dest="config_file", metavar="FILE", help="a config.json alone, instead: whether it is supported"
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_action(
    actions: argparse._SubParsersAction, name: str, parent: argparse.ArgumentParser, text: str
) -> argparse.ArgumentParser:
    return actions.add_parser(
        name,
        parents=[parent],
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog="\n  ".join(("examples:", *_EXAMPLES[name])),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_directories(command: argparse.ArgumentParser, *formats: str) -> None:
    texts = {
        "hf": "Hugging Face model directory",
        "megatron": "Megatron checkpoint directory",
        "adapter": "PEFT directory",
        "merged": "Hugging Face directory to write",
    }
    for name in formats:
        command.add_argument(f"{name}_directory", metavar=f"{name.upper()}_DIR", help=texts[name])


def run(arguments: argparse.Namespace) -> None:
    """Run a parsed command; errors are ``UserError``."""
    report = silent if arguments.no_progress else bar
    actions = {
        "hf-to-megatron": _hf_to_megatron,
        "megatron-to-hf": _megatron_to_hf,
        "merge-adapter": _merge_adapter,
        "check": _check,
        "inspect": _inspect,
    }
    actions[arguments.convert_action](arguments, report)


def _hf_to_megatron(arguments: argparse.Namespace, report: Report) -> None:
    from megatron_s2d.conversion.convert import hf_to_megatron

    result = hf_to_megatron(
        arguments.hf_directory,
        arguments.megatron_directory,
        tensor_model_parallel_size=arguments.tensor_model_parallel_size,
        pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
        expert_model_parallel_size=arguments.expert_model_parallel_size,
        report=report,
    )
    _print_result(arguments.megatron_directory, result)


def _megatron_to_hf(arguments: argparse.Namespace, report: Report) -> None:
    from megatron_s2d.conversion.convert import megatron_to_hf

    result = megatron_to_hf(
        arguments.megatron_directory,
        arguments.hf_directory,
        max_shard_bytes=arguments.max_shard_size,
        assets=arguments.assets,
        report=report,
    )
    _print_result(arguments.hf_directory, result)


def _merge_adapter(arguments: argparse.Namespace, report: Report) -> None:
    from megatron_s2d.conversion.convert import merge_adapter

    result = merge_adapter(
        arguments.hf_directory,
        arguments.adapter_directory,
        arguments.merged_directory,
        max_shard_bytes=arguments.max_shard_size,
        report=report,
    )
    _print_result(arguments.merged_directory, result)


def _print_result(directory: str, result: Converted) -> None:
    print(f"{directory}: {result.spec.family}, {result.spec.num_parameters:,} parameters")
    for note in result.notes:
        print(f"note: {note}")


def _check(arguments: argparse.Namespace, report: Report) -> None:
    from megatron_s2d.conversion.convert import check_conversion

    comparison = check_conversion(arguments.hf_directory, arguments.megatron_directory, report=report)
    print(f"tensors: {comparison.num_tensors} equal bit by bit ({comparison.num_bytes:,} bytes)")
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
    if (arguments.directory is None) == (arguments.config_file is None):
        raise UserError("s2d convert inspect needs either a checkpoint directory or --config")
    if arguments.config_file is not None:
        from megatron_s2d.conversion.support import describe_config

        description = describe_config(arguments.config_file)
    else:
        from megatron_s2d.conversion.convert import inspect_checkpoint

        description = inspect_checkpoint(arguments.directory, report=report)
    if arguments.json:
        json.dump(description, sys.stdout, indent=1)
        print()
        return
    for key, value in description.items():
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
    """Return the bytes of ``5GB``, ``500MB``, ``2GiB`` or a plain number (powers of 1000, with ``i`` of 1024)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it like 5GB or 500MB")
    number, prefix, binary = match.groups()
    power = " KMGT".index(prefix.upper()) if prefix else 0
    size = int(float(number) * (1024 if binary else 1000) ** power)
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a shard needs at least one byte")
    return size
