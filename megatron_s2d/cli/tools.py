"""``s2d cache``, ``convert``, ``serve-teacher``, ``doctor``: files, a teacher's server, the installation."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from megatron_s2d.cli.parser import add_command, finish_command, open_console
from megatron_s2d.errors import UserError


def add_cache(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "cache",
        _cache,
        "describe or verify a teacher cache",
        "Describe a teacher cache (info), or check every file, row and sample of it against its checksums (verify).",
        "s2d cache info runs/quickstart/stages/cache_rl/cache",
        "s2d cache verify runs/quickstart/stages/cache_rl/cache",
    )
    command.add_argument("action", choices=("info", "verify"), help="what to do")
    command.add_argument("directory", type=Path, metavar="DIR", help="`cache` folder of a teacher_cache stage")


def _cache(options: argparse.Namespace) -> None:
    from megatron_s2d.data.cache import cache_info, verify_cache

    info = cache_info(options.directory) if options.action == "info" else verify_cache(options.directory)
    table = Table(show_header=False)
    for key, value in info.items():
        table.add_row(key, str(value))
    open_console().print(table)
    if options.action == "verify":
        print("verified: every shard, row and sample matches its checksum")


def add_reward(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "reward",
        _reward,
        "try the reward of a data entry on a file of responses",
        "Grade responses with the reward of an entry of `data`: a verdict each, then labels, rewards, speed. Without "
        "--responses the labels of the prompts are graded as if a model had written them.",
        "s2d reward configs/own_reward.yaml --data steps --limit 4",
        "s2d reward my.yaml --data train --responses runs/my/stages/rl/rollouts.jsonl",
    )
    command.add_argument("config", type=Path, metavar="CONFIG", help="workflow file (YAML)")
    command.add_argument("--data", required=True, metavar="ENTRY", help="entry of `data`, or entry/half")
    command.add_argument(
        "--responses", type=Path, metavar="FILE", help="JSON lines with `id` (or `problem_id`) and `response`"
    )
    command.add_argument("--limit", type=int, metavar="N", help="grade the first N responses only")
    command.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="override a key"
    )


def _reward(options: argparse.Namespace) -> None:
    from megatron_s2d.config.workflow import load_workflow
    from megatron_s2d.workflow.try_reward import try_reward

    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit}: give at least 1")
    config = load_workflow(options.config, options.overrides)
    try_reward(config, options.data, options.responses, options.limit, open_console())


def add_convert(commands: argparse._SubParsersAction) -> None:
    from megatron_s2d.conversion import cli

    cli.add_parser(commands)
    finish_command(commands.choices["convert"], _convert)


def _convert(options: argparse.Namespace) -> None:
    from megatron_s2d.conversion import cli

    cli.run(options)


def add_serve_teacher(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "serve-teacher",
        _serve_teacher,
        "serve a teacher to trainers on other machines",
        "Load a model on the GPUs of this machine (tensor and pipeline parallel) and score responses over HTTP for "
        "stages with a teacher_service: log-probabilities, top-k entries, or hidden states with the output "
        "layer, from which the trainer computes the exact KL. Prints its address and the digest of its weights; Ctrl-C "
        "ends it.",
        "s2d serve-teacher teacher.yaml",
        "s2d serve-teacher --model /models/big --set parallel.tensor_model_parallel_size=8",
    )
    command.add_argument("settings", type=Path, nargs="?", metavar="CONFIG", help="file with the server's settings")
    command.add_argument("--model", type=Path, metavar="DIR", help="the teacher's weights, instead of the file's model")
    command.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="override a key"
    )


def _serve_teacher(options: argparse.Namespace) -> None:
    from megatron_s2d.workflow.serve_teacher import load_serve_config, run_server

    config = load_serve_config(options.settings, options.model, options.overrides)
    run_server(config, lambda line: print(line, flush=True))


def add_doctor(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "doctor",
        _doctor,
        "show installed versions, devices, and what missing packages would add",
        "Show which packages are installed and whether their versions fit, which devices there are, which backend each "
        "part of the trainer uses here, and what each missing optional package would add.",
        "s2d doctor",
    )
    command.add_argument(
        "--constraints",
        type=Path,
        metavar="FILE",
        help="tested versions, as name==version lines (default: constraints.txt of the checkout)",
    )


def _doctor(options: argparse.Namespace) -> int:
    from megatron_s2d.workflow.doctor import diagnose, print_diagnosis

    diagnosis = diagnose(options.constraints)
    print_diagnosis(diagnosis, open_console())
    return diagnosis.exit_code
