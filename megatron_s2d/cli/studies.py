"""``s2d sweep`` and ``simulate``: many runs in one table, and predictions for larger clusters."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_s2d.cli.parser import add_command, open_console


def add_sweep(commands: argparse._SubParsersAction) -> None:
    from megatron_s2d.launchers.cli import add_cluster

    command = add_command(
        commands,
        "sweep",
        _sweep,
        "run a grid of workflows and tabulate results, contrasts and power laws",
        "Run every point of a grid of workflows, or resume one, and write results, contrasts and power laws to one "
        "report. Points that fail are listed in the report; the others run.",
        "s2d sweep configs/sweeps/label_budget.yaml --dry-run",
        "s2d sweep configs/sweeps/label_budget.yaml",
        "s2d sweep configs/sweeps/label_budget.yaml --submit --cluster cluster.yaml",
        "s2d sweep configs/sweeps/label_budget.yaml --collect",
    )
    command.add_argument("sweep", type=Path, metavar="SWEEP", help="sweep file (YAML)")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="sweep directory (default: runs/ and the sweep's `name`)"
    )
    command.add_argument("--dry-run", action="store_true", help="check and list the points; run nothing")
    command.add_argument(
        "--submit", action="store_true", help="submit a SLURM job for every unfinished point; see also --collect"
    )
    command.add_argument("--collect", action="store_true", help="report the finished points; run nothing")
    add_cluster(command)


def _sweep(options: argparse.Namespace) -> int:
    from megatron_s2d.config.sweep import load_sweep
    from megatron_s2d.studies.sweep import expand_points, print_points, run_sweep, unfinished_points

    sweep = load_sweep(options.sweep)
    out = options.out or Path("runs") / sweep.name
    if options.dry_run:
        print_points(sweep, out, open_console())
        return 0
    if options.submit:
        from megatron_s2d.launchers.slurm import submitter

        run_sweep(sweep, out, open_console(), submitter(options.cluster, options.cluster_overrides))
        print(f"after the jobs have finished: s2d sweep {options.sweep} --out {out} --collect")
        return 0
    from megatron_s2d.studies.sweep_report import write_sweep
    from megatron_s2d.studies.sweep_results import collect_sweep

    points = expand_points(sweep) if options.collect else run_sweep(sweep, out, open_console())
    failures = unfinished_points(points, out)
    page = write_sweep(collect_sweep(sweep, out, points, failures), out, open_console())
    print(f"report: {page}")
    return 1 if failures else 0


def add_simulate(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "simulate",
        _simulate,
        "predict time and memory of on-policy distillation on many GPUs",
        "Predict the seconds, tokens per second and memory of an on-policy distillation step on many GPUs, from "
        "measured kernel times and bandwidths where the file has them, else from data sheets and printed assumptions.",
        "s2d simulate configs/simulations/llama_70b_to_8b.yaml",
        "s2d simulate configs/simulations/llama_70b_to_8b.yaml --out runs/prediction",
    )
    command.add_argument("simulation", type=Path, metavar="SIMULATION", help="simulation file (YAML)")
    command.add_argument("--out", type=Path, metavar="DIR", help="also write tables and plots to DIR")


def _simulate(options: argparse.Namespace) -> None:
    from megatron_s2d.studies.simulate import load_simulation, print_simulation

    print_simulation(load_simulation(options.simulation), options.out, open_console())
