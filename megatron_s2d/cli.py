"""The ``s2d`` command: parses arguments, calls, and prints errors as one line. Heavy imports happen inside commands."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_s2d.errors import UserError
from megatron_s2d.workflow.status import RESUME_HINT, Interrupted, JobCrashed

_HINT = "(--debug shows where; please report it)"
_EXIT_ERROR, _EXIT_CRASH, _EXIT_INTERRUPTED = 1, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 1 (the user's mistake), 3 (ours), 130 (stopped, can go on)."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return _EXIT_ERROR
    try:
        return options.run(options) or 0
    except UserError as error:
        return _fail(f"error: {error}", options.debug, _EXIT_ERROR)
    except Interrupted as interrupted:
        return _fail(str(interrupted), False, _EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        return _fail(f"stopped; {RESUME_HINT}", False, _EXIT_INTERRUPTED)
    except BrokenPipeError:
        return _EXIT_ERROR
    except JobCrashed as error:
        return _fail(f"internal error: {error} {_HINT}", options.debug, _EXIT_CRASH, error.traceback)
    except Exception as error:
        return _fail(f"internal error: {type(error).__name__}: {error} {_HINT}", options.debug, _EXIT_CRASH)


def _console() -> Console:
    """The terminal; a file or a pipe gets wide lines rather than cut words."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def _quiet_libraries() -> None:
    """Keep what torch and Megatron-Core say about their own plans out of a terminal; runs keep it in their log files."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=SyntaxWarning)
    warnings.filterwarnings("ignore", module=r"(megatron\.core|torch)\b")
    for name in ("megatron", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _fail(text: str, debug: bool, code: int, trace: str = "") -> int:
    if debug:
        sys.stderr.write(trace or traceback.format_exc())
    print(" ".join(text.split("\n")), file=sys.stderr)
    return code


def build_parser() -> argparse.ArgumentParser:
    """The command line; building it imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="s2d",
        description="Sparse-to-dense post-training on Megatron-Core: GRPO teachers, forward-KL warm-up, on-policy "
        "distillation, and their control arms, as one resumable run.",
        epilog="examples:\n  s2d run configs/quickstart.yaml\n  s2d run configs/quickstart.yaml --dry-run\n"
        "  s2d launch slurm configs/quickstart.yaml --dry-run\n"
        "  s2d eval runs/quickstart --arm rl_teacher_bridge\n  s2d doctor",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_run(commands)
    _add_plan(commands)
    _add_sweep(commands)
    _add_simulate(commands)
    _add_eval(commands)
    _add_generate(commands)
    _add_report(commands)
    _add_doctor(commands)
    _add_cache(commands)
    _add_convert(commands)
    _add_launch(commands)
    return parser


def _command(commands, name: str, run, text: str, example: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _finish_command(command, run)
    return command


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", type=Path, metavar="CONFIG", help="workflow file (YAML)")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a key, for example --set stages.opd.optimizer.lr=5e-4; may be repeated",
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="run directory (default: runs/NAME-of-the-config)")


# ---------------------------------------------------------------------------------------------------- run and plan


def _add_run(commands) -> None:
    command = _command(
        commands,
        "run",
        _run,
        "Run a workflow, or go on with one that was interrupted, and write its report.",
        "s2d run configs/quickstart.yaml --set seed=2 --out runs/second",
    )
    _add_config(command)
    command.add_argument("--dry-run", action="store_true", help="check everything and print the plan; run nothing")
    command.add_argument(
        "--elastic",
        action="store_true",
        help="under torchrun or srun: as many data-parallel replicas as there are ranks, whatever the config says; so a "
        "job that lost a node goes on with the others",
    )
    command.add_argument(
        "--stage",
        metavar="NAME",
        help="run this stage only, with its evaluation; its inputs must be finished, and no report is written",
    )
    command.set_defaults(gpu=None, num_gpus=None, assume=[])


def _add_plan(commands) -> None:
    command = _command(
        commands,
        "plan",
        _plan,
        "Check a workflow and print what would run: stages, sizes, labels, memory of a rank; for a named GPU also "
        "time, traffic and the layout that fits and should be fastest.",
        "s2d plan configs/quickstart.yaml --gpu h200 --num-gpus 8",
    )
    _add_config(command)
    command.add_argument("--gpu", metavar="NAME", help="h200, h100, a100-80, b200 or l40s; nothing runs on it")
    command.add_argument("--num-gpus", type=int, metavar="N", help="propose a layout for N of them")
    command.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace an assumption of the estimate, for example --assume matmul_efficiency=0.6; may be repeated",
    )


def _load(options: argparse.Namespace):
    from megatron_s2d.config.workflow import load_workflow

    config = load_workflow(options.config, options.overrides)
    return config, (options.out or Path("runs") / config.name)


def _run(options: argparse.Namespace) -> None:
    if options.dry_run:
        return _plan(options)
    from megatron_s2d.parallel.launcher_env import is_launched, launched_world_size

    if is_launched():
        from megatron_s2d.workflow.torchrun_runner import run_workflow
    else:
        from megatron_s2d.workflow.runner import run_workflow
    config, run_dir = _load(options)
    if options.elastic:
        config = config.with_world_size(launched_world_size())
    run_workflow(config, run_dir, _console(), options.stage)
    return None


def _plan(options: argparse.Namespace) -> None:
    import tempfile

    from megatron_s2d.workflow.plan import make_plan
    from megatron_s2d.workflow.plan_estimate import machine_of, print_cost
    from megatron_s2d.workflow.plan_table import print_plan
    from megatron_s2d.workflow.preflight import check_workflow

    machine = machine_of(options.gpu, options.num_gpus, options.assume)
    config, run_dir = _load(options)
    with tempfile.TemporaryDirectory() as scratch:
        checked = check_workflow(config, Path(scratch))
    print_plan(checked, make_plan(config, run_dir), run_dir, _console())
    print_cost(checked, machine, options.num_gpus, _console())


def _add_sweep(commands) -> None:
    from megatron_s2d.launchers.cli import add_cluster

    command = _command(
        commands,
        "sweep",
        _sweep,
        "Run a grid of workflows, or go on with one, and put their results in one table with contrasts and power laws.",
        "s2d sweep configs/sweeps/label_budget.yaml --dry-run",
    )
    command.add_argument("sweep", type=Path, metavar="SWEEP", help="sweep file (YAML)")
    command.add_argument("--out", type=Path, metavar="DIR", help="where the runs go (default: runs/NAME-of-the-sweep)")
    command.add_argument("--dry-run", action="store_true", help="list the points with their checks; run nothing")
    command.add_argument(
        "--submit", action="store_true", help="a SLURM job for every point that is not finished; see also --collect"
    )
    command.add_argument("--collect", action="store_true", help="run nothing: the table of what is finished")
    add_cluster(command)


def _sweep(options: argparse.Namespace) -> int:
    from megatron_s2d.config.sweep import load_sweep
    from megatron_s2d.studies.sweep import failures, points_of, print_points, run_sweep

    sweep = load_sweep(options.sweep)
    out = options.out or Path("runs") / sweep.name
    if options.dry_run:
        print_points(sweep, out, _console())
        return 0
    if options.submit:
        from megatron_s2d.launchers.slurm import submitter

        run_sweep(sweep, out, _console(), submitter(options.cluster, options.cluster_overrides))
        print(f"when the jobs are done: s2d sweep {options.sweep} --out {out} --collect")
        return 0
    from megatron_s2d.studies.sweep_report import write_sweep
    from megatron_s2d.studies.sweep_results import collect_sweep

    points = points_of(sweep) if options.collect else run_sweep(sweep, out, _console())
    failed = failures(points, out)
    page = write_sweep(collect_sweep(sweep, out, points, failed), out, _console())
    print(f"report: {page}")
    return _EXIT_ERROR if failed else 0


def _add_simulate(commands) -> None:
    command = _command(
        commands,
        "simulate",
        _simulate,
        "Predict seconds, tokens a second and memory of on-policy distillation on many GPUs from measured kernel times "
        "and bandwidths, or from data sheets and printed assumptions.",
        "s2d simulate configs/simulations/llama_70b_to_8b.yaml --out runs/prediction",
    )
    command.add_argument("simulation", type=Path, metavar="SIMULATION", help="simulation file (YAML)")
    command.add_argument("--out", type=Path, metavar="DIR", help="write tables and plots there")


def _simulate(options: argparse.Namespace) -> None:
    from megatron_s2d.studies.simulate import load_simulation, print_simulation

    print_simulation(load_simulation(options.simulation), options.out, _console())


# ---------------------------------------------------------------------------------------------------- eval


def _add_eval(commands) -> None:
    command = _command(
        commands,
        "eval",
        _eval,
        "Show avg@k and pass@k with standard errors of a run's evaluations, or compare two of them problem by problem.",
        "s2d eval runs/quickstart --arm rl_teacher_bridge --against-arm direct_student_grpo",
    )
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory, or an evaluation.jsonl file")
    command.add_argument("--arm", help="arm or evaluated stage (default: all)")
    command.add_argument("--against", type=Path, metavar="RUN_DIR", help="second run directory or evaluation.jsonl")
    command.add_argument("--against-arm", metavar="ARM", help="arm of the second run (default: the same)")
    command.add_argument("--json", action="store_true", help="machine-readable output")


def _eval(options: argparse.Namespace) -> None:
    from megatron_s2d.workflow.evaluations import compare, show

    if options.against is None and options.against_arm is None:
        show(options.run_dir, options.arm, as_json=options.json, console=_console())
        return
    other = options.against or options.run_dir
    compare(
        (options.run_dir, options.arm),
        (other, options.against_arm or options.arm),
        as_json=options.json,
        console=_console(),
    )


# ---------------------------------------------------------------------------------------------------- generate


def _add_generate(commands) -> None:
    command = _command(
        commands,
        "generate",
        _generate,
        "Sample responses from the final weights of a finished stage.",
        's2d generate runs/quickstart opd_rl_teacher --prompt "7 + 5 * 3 - 2 + 8 =" --num-samples 4',
    )
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    command.add_argument("stage", metavar="STAGE", help="a finished stage of the run, or an arm")
    command.add_argument("--prompt", action="append", default=[], help="prompt text; may be repeated")
    command.add_argument("--data", metavar="ENTRY", help="take prompts from an entry of the run's `data` instead")
    command.add_argument("--limit", type=int, default=4, help="prompts taken from --data (default 4)")
    command.add_argument("--num-samples", type=int, default=1, help="responses of each prompt")
    command.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    command.add_argument("--max-response-tokens", type=int, help="default: the run's evaluation setting")
    command.add_argument("--seed", type=int, default=0)


def _generate(options: argparse.Namespace) -> None:
    from megatron_s2d.workflow.generate import GenerateRequest, generate

    _quiet_libraries()
    if not options.prompt and not options.data:
        raise UserError("give a --prompt or an entry of the data with --data")
    generate(
        GenerateRequest(
            options.run_dir,
            options.stage,
            tuple(options.prompt),
            options.data,
            options.limit,
            options.num_samples,
            options.temperature,
            options.max_response_length,
            options.seed,
        ),
        _console(),
    )


# ---------------------------------------------------------------------------------------------------- the rest


def _add_report(commands) -> None:
    command = _command(
        commands, "report", _report, "Write the report of a finished run again.", "s2d report runs/quickstart"
    )
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR")


def _report(options: argparse.Namespace) -> None:
    from megatron_s2d.workflow.runner import rewrite_report

    rewrite_report(options.run_dir, _console())


def _add_doctor(commands) -> None:
    command = _command(
        commands,
        "doctor",
        _doctor,
        "Show what is installed, which devices there are, and what each missing optional part would give.",
        "s2d doctor",
    )
    command.add_argument(
        "--constraints", type=Path, default=None, help="pins to compare with (default: the checkout's)"
    )


def _doctor(options: argparse.Namespace) -> int:
    from megatron_s2d.workflow.doctor import diagnose, print_diagnosis

    constraints = options.constraints or Path(__file__).resolve().parents[1] / "constraints.txt"
    return print_diagnosis(diagnose(constraints), _console())


def _add_cache(commands) -> None:
    command = _command(
        commands,
        "cache",
        _cache,
        "Describe or verify a teacher cache.",
        "s2d cache verify runs/quickstart/stages/cache_rl_teacher/cache",
    )
    command.add_argument("action", choices=("info", "verify"))
    command.add_argument("directory", type=Path, metavar="DIR")


def _cache(options: argparse.Namespace) -> None:
    from megatron_s2d.data.cache import cache_info, verify_cache

    info = cache_info(options.directory) if options.action == "info" else verify_cache(options.directory)
    table = Table(show_header=False)
    for key, value in info.items():
        table.add_row(key, str(value))
    _console().print(table)
    if options.action == "verify":
        print("every shard, row and sample matches its digest")


def _add_convert(commands) -> None:
    from megatron_s2d.conversion import cli

    cli.add_parser(commands)
    _finish_command(commands.choices["convert"], _convert)


def _finish_command(command: argparse.ArgumentParser, run) -> None:
    """What a command gets that another folder has described."""
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run)


def _convert(options: argparse.Namespace) -> None:
    from megatron_s2d.conversion import cli

    _quiet_libraries()
    cli.run(options)


def _add_launch(commands) -> None:
    from megatron_s2d.launchers import cli

    cli.add_parser(commands)
    _add_config(commands.choices["launch"])
    _finish_command(commands.choices["launch"], cli.run)


if __name__ == "__main__":
    sys.exit(main())
