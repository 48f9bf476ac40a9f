"""``s2d run``, ``plan`` and ``launch``: train a workflow, or show what training it would need."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_s2d.cli.parser import add_command, add_config, finish_command, load_config, open_console
from megatron_s2d.errors import UserError


def add_run(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "run",
        _run,
        "train, evaluate and report a workflow; run it again to resume",
        "Run the stages that a workflow's arms need, evaluate the arms and write report.html. Run the same command "
        "again to resume: finished stages are reused, an unfinished one resumes from its last checkpoint, and a stage "
        "whose settings, data or inputs changed runs again.",
        "s2d run configs/quickstart.yaml",
        "s2d run configs/quickstart.yaml --dry-run",
        "s2d run configs/quickstart.yaml --set seed=2 --out runs/seed_2",
        "s2d run configs/quickstart.yaml --stage teacher_base",
    )
    add_config(command)
    command.add_argument(
        "--dry-run", action="store_true", help="check everything that needs no training, print the plan and stop"
    )
    command.add_argument(
        "--elastic",
        action="store_true",
        help="under torchrun or srun: use as many data-parallel replicas as there are ranks, whatever the config says, "
        "so that a job which lost a node continues on the others",
    )
    command.add_argument(
        "--stage",
        metavar="NAME",
        help="run only this stage and its evaluation; its inputs must be finished, and no report is written",
    )
    command.set_defaults(gpu=None, num_gpus=None, assume=[], measure=False, rank=None)  # --dry-run prints a plan


def _run(options: argparse.Namespace) -> int:
    if options.dry_run:
        options.stage = None
        return _plan(options)
    from megatron_s2d.parallel.cuda_variables import set_device_variables
    from megatron_s2d.parallel.launcher_env import is_launched, launched_world_size

    config, run_dir = load_config(options)
    if options.elastic:
        config = config.with_world_size(launched_world_size())
    if is_launched():
        set_device_variables(config)  # before the imports: some libraries start CUDA when they are imported
        from megatron_s2d.workflow.torchrun_runner import run_workflow
    else:
        from megatron_s2d.workflow.runner import run_workflow
    run_workflow(config, run_dir, open_console(), options.stage)
    return 0


def add_plan(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "plan",
        _plan,
        "check a workflow and estimate its memory, time and layout",
        "Check a workflow and print what would run: stages, sizes, labels and the memory of a rank. With --gpu also "
        "the time and traffic of a step on that GPU, with --num-gpus also the fastest layout that fits. Needs no GPU.",
        "s2d plan configs/quickstart.yaml",
        "s2d plan configs/quickstart.yaml --gpu h200 --num-gpus 8",
        "s2d plan configs/quickstart.yaml --gpu h100 --assume matmul_efficiency=0.4",
        "s2d plan configs/opd_qwen3.yaml --measure --rank 1 --stage opd",
    )
    add_config(command)
    command.add_argument("--gpu", metavar="NAME", help="GPU to estimate for: h200, h100, a100-80, b200 or l40s")
    command.add_argument("--num-gpus", type=int, metavar="N", help="propose a layout for N GPUs")
    command.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace an assumption of the estimate, for example --assume matmul_efficiency=0.6; may be repeated",
    )
    _add_measure(command)


def _add_measure(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--measure",
        action="store_true",
        help="run two steps of one rank on a CUDA runtime without a GPU, and print its memory by phase, launches, "
        "waits, collectives and products (docs/measure.md)",
    )
    command.add_argument("--rank", type=int, metavar="R", help="with --measure: the rank (default: 0)")
    command.add_argument("--stage", metavar="NAME", help="with --measure: this stage only")


def _plan(options: argparse.Namespace) -> int:
    import tempfile

    from megatron_s2d.workflow.plan import make_plan
    from megatron_s2d.workflow.plan_estimate import machine_from_options, print_estimate
    from megatron_s2d.workflow.plan_table import print_plan
    from megatron_s2d.workflow.preflight import check_workflow
    from megatron_s2d.workflow.server_room import check_servers

    for option in ("rank", "stage"):
        if getattr(options, option) is not None and not options.measure:
            raise UserError(f"--{option} needs --measure")
    machine = machine_from_options(options.gpu, options.num_gpus, options.assume)
    config, run_dir = load_config(options)
    with tempfile.TemporaryDirectory() as scratch:
        preflight = check_workflow(config, Path(scratch))
    if options.measure:
        from megatron_s2d.measure.report import print_measurements

        return min(1, print_measurements(preflight, options.stage, options.rank or 0, machine, open_console()))
    jobs = make_plan(config, run_dir)
    if getattr(options, "dry_run", False):
        check_servers(preflight, jobs)
    print_plan(preflight, jobs, run_dir, open_console())
    print_estimate(preflight, machine, options.num_gpus, open_console())
    return 0


def add_launch(commands: argparse._SubParsersAction) -> None:
    from megatron_s2d.launchers import cli

    cli.add_parser(commands)
    add_config(commands.choices["launch"])
    finish_command(commands.choices["launch"], cli.run)
