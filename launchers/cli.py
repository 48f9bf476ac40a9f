"""Command line of ``s2d launch local | slurm | nemo-run``: arguments and printed results. No torch here."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.launchers import local, nemo, slurm
from megatron_s2d.launchers.config import load_launch
from megatron_s2d.launchers.job import Launch, plan_launch

_EXAMPLES = """examples:
  s2d launch local configs/smoke.yaml --processes-per-node 2 --set parallel.data_parallel_size=2
  s2d launch slurm my.yaml --nodes 4 --cluster cluster.yaml --dry-run
  s2d launch slurm my.yaml --nodes 4 --cluster cluster.yaml --cluster-set time_limit_minutes=60
  s2d launch slurm my.yaml --per-stage --cluster cluster.yaml
  s2d launch nemo-run my.yaml --executor slurm --nodes 4 --cluster cluster.yaml

Run the same command again to resume. docs/launch.md has the keys of a cluster file."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``launch`` to the commands of ``s2d``; ``run`` takes the parsed arguments."""
    command = subparsers.add_parser(
        "launch",
        help="run a workflow on many ranks: on this machine, through SLURM or NeMo-Run",
        description="Run a workflow on many ranks: on this machine (torchrun), through SLURM, or through NeMo-Run.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("launcher", choices=("local", "slurm", "nemo-run"), help="where the ranks run")
    command.add_argument(
        "--nodes", type=int, metavar="N", help="number of nodes (default: that of the cluster file, or 1)"
    )
    command.add_argument(
        "--processes-per-node",
        type=int,
        metavar="K",
        help="ranks of a node, each with a GPU (default: ranks of the layout / nodes)",
    )
    add_cluster(command)
    command.add_argument(
        "--per-stage", action="store_true", help="slurm: one job for each stage, started after its inputs"
    )
    command.add_argument(
        "--executor", choices=("local", "slurm"), default="slurm", help="nemo-run: where its tasks run (default: slurm)"
    )
    command.add_argument(
        "--dry-run", action="store_true", help="write scripts and configuration to DIR/launch; start nothing"
    )


def add_cluster(command: argparse.ArgumentParser) -> None:
    """Add the options that name the cluster to a command that submits jobs."""
    command.add_argument(
        "--cluster", type=Path, metavar="FILE", help="cluster file (YAML): partition, time limit, container ..."
    )
    command.add_argument(
        "--cluster-set",
        action="append",
        default=[],
        dest="cluster_overrides",
        metavar="KEY=VALUE",
        help="override a key of the cluster file; may be repeated",
    )


def run(options: argparse.Namespace) -> int:
    """Run a parsed command and return its exit code. Errors are ``UserError``."""
    launch = _plan(options)
    actions = {"local": _local, "slurm": _slurm, "nemo-run": _nemo_run}
    code = actions[options.launcher](launch, options)
    if options.dry_run:
        print(f"written to {launch.directory}; nothing was started")
    return code


def _plan(options: argparse.Namespace) -> Launch:
    workflow = load_workflow(options.config, options.overrides)
    # NeMo-Run's tasks are the stages; on this machine one run covers them all, whatever the cluster file sets.
    is_local = options.launcher == "local" or (options.launcher == "nemo-run" and options.executor == "local")
    per_stage = True if options.launcher == "nemo-run" else False if is_local else options.per_stage or None
    from_options = {
        "nodes": 1 if is_local and options.nodes is None else options.nodes,
        "processes_per_node": options.processes_per_node,
        "per_stage": per_stage,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in from_options.items() if value is not None]
    settings = load_launch(options.cluster, [*options.cluster_overrides, *overrides])
    return plan_launch(workflow, settings, options.out or Path("runs") / workflow.name)


def _local(launch: Launch, options: argparse.Namespace) -> int:
    local.write(launch)
    return 0 if options.dry_run else local.run(launch)


def _slurm(launch: Launch, options: argparse.Namespace) -> int:
    slurm.write(launch)
    if not options.dry_run:
        for task, number in slurm.submit(launch).items():
            print(f"{task}: job {number}")
        print(f"scripts and logs: {launch.directory}")
    return 0


def _nemo_run(launch: Launch, options: argparse.Namespace) -> int:
    if options.dry_run:
        nemo.write(launch, options.executor)
    else:
        print(f"scripts and logs: {nemo.run(launch, options.executor)}")
    return 0
