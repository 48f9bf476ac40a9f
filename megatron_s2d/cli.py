"""The ``s2d`` command: parses arguments, calls the package and prints errors as one line.

Commands import what they need when they run, so that ``--help`` and mistakes in arguments answer at once.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from megatron_s2d.errors import UserError
from megatron_s2d.workflow.status import RESUME_HINT, Interrupted, JobCrashed

if TYPE_CHECKING:
    from megatron_s2d.config.workflow import WorkflowConfig

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
        return _fail(f"internal error: {error} {_DEBUG_HINT}", options.debug, _EXIT_CRASH, error.traceback)
    except Exception as error:
        message = f"internal error: {type(error).__name__}: {error} {_DEBUG_HINT}"
        return _fail(message, options.debug, _EXIT_CRASH)


def _fail(message: str, debug: bool, code: int, trace: str = "") -> int:
    """Print the message as one line, after the traceback if asked for; return the exit code."""
    if debug:
        sys.stderr.write(trace or traceback.format_exc())
    print(" ".join(message.split("\n")), file=sys.stderr)
    return code


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands without importing torch."""
    parser = argparse.ArgumentParser(
        prog="s2d",
        description="Sparse-to-dense post-training on Megatron-Core: RL with verifiable rewards on a teacher, then "
        "forward-KL warm-up and on-policy distillation into a student, as one resumable run.",
        epilog=_EPILOG,
        formatter_class=_HelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _add_run(commands)
    _add_plan(commands)
    _add_launch(commands)
    _add_sweep(commands)
    _add_simulate(commands)
    _add_eval(commands)
    _add_generate(commands)
    _add_report(commands)
    _add_cache(commands)
    _add_convert(commands)
    _add_doctor(commands)
    return parser


class _HelpFormatter(argparse.HelpFormatter):
    """Wraps descriptions to the terminal and leaves examples as they are written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return super()._fill_text(text, width, indent)


def _add_command(
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
    _finish_command(command, run)
    return command


def _finish_command(command: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int | None]) -> None:
    """Add what every command has: ``--debug`` and its function."""
    command.add_argument("--debug", action="store_true", help="print the traceback of an error")
    command.set_defaults(run=run)


def _add_config(command: argparse.ArgumentParser) -> None:
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


def _load(options: argparse.Namespace) -> tuple[WorkflowConfig, Path]:
    """Return the workflow and its run directory."""
    from megatron_s2d.config.workflow import load_workflow

    config = load_workflow(options.config, options.overrides)
    return config, (options.out or Path("runs") / config.name)


def _console() -> Console:
    """Return the terminal's console; output to a file or pipe gets wide lines instead of truncated cells."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def _silence_libraries() -> None:
    """Hide warnings of torch and Megatron-Core from the terminal (runs write them to their log files)."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=SyntaxWarning)
    warnings.filterwarnings("ignore", module=r"(megatron\.core|torch)\b")
    for name in ("megatron", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


# ---------------------------------------------------------------------------------------------------- run and plan


def _add_run(commands: argparse._SubParsersAction) -> None:
    command = _add_command(
        commands,
        "run",
        _run,
        "train, evaluate and report a workflow; run it again to resume",
        "Run the stages that a workflow's arms need, evaluate the arms and write report.html. Run the same command again "
        "to resume: finished stages are reused, an unfinished one resumes from its last checkpoint, and a stage whose "
        "settings, data or inputs changed runs again.",
        "s2d run configs/quickstart.yaml",
        "s2d run configs/quickstart.yaml --dry-run",
        "s2d run configs/quickstart.yaml --set seed=2 --out runs/seed_2",
        "s2d run configs/quickstart.yaml --stage teacher_base",
    )
    _add_config(command)
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
    command.set_defaults(gpu=None, num_gpus=None, assume=[])  # --dry-run prints a plan


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


def _add_plan(commands: argparse._SubParsersAction) -> None:
    command = _add_command(
        commands,
        "plan",
        _plan,
        "check a workflow and estimate its memory, time and layout",
        "Check a workflow and print what would run: stages, sizes, labels and the memory of a rank. With --gpu also the "
        "time and traffic of a step on that GPU, and with --num-gpus the fastest layout that fits. No GPU is needed.",
        "s2d plan configs/quickstart.yaml",
        "s2d plan configs/quickstart.yaml --gpu h200 --num-gpus 8",
        "s2d plan configs/quickstart.yaml --gpu h100 --assume matmul_efficiency=0.4",
    )
    _add_config(command)
    command.add_argument("--gpu", metavar="NAME", help="GPU to estimate for: h200, h100, a100-80, b200 or l40s")
    command.add_argument("--num-gpus", type=int, metavar="N", help="propose a layout for N GPUs")
    command.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace an assumption of the estimate, for example --assume matmul_efficiency=0.6; may be repeated",
    )


def _plan(options: argparse.Namespace) -> None:
    import tempfile

    from megatron_s2d.workflow.plan import make_plan
    from megatron_s2d.workflow.plan_estimate import machine_from_options, print_estimate
    from megatron_s2d.workflow.plan_table import print_plan
    from megatron_s2d.workflow.preflight import check_workflow

    machine = machine_from_options(options.gpu, options.num_gpus, options.assume)
    config, run_dir = _load(options)
    with tempfile.TemporaryDirectory() as scratch:
        preflight = check_workflow(config, Path(scratch))
    print_plan(preflight, make_plan(config, run_dir), run_dir, _console())
    print_estimate(preflight, machine, options.num_gpus, _console())


def _add_launch(commands: argparse._SubParsersAction) -> None:
    from megatron_s2d.launchers import cli

    cli.add_parser(commands)
    _add_config(commands.choices["launch"])
    _finish_command(commands.choices["launch"], cli.run)


# ---------------------------------------------------------------------------------------------------- sweep, simulate


def _add_sweep(commands: argparse._SubParsersAction) -> None:
    from megatron_s2d.launchers.cli import add_cluster

    command = _add_command(
        commands,
        "sweep",
        _sweep,
        "run a grid of workflows and tabulate results, contrasts and power laws",
        "Run every point of a grid of workflows, or resume one, and write their results, contrasts and power laws to one "
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
        print_points(sweep, out, _console())
        return 0
    if options.submit:
        from megatron_s2d.launchers.slurm import submitter

        run_sweep(sweep, out, _console(), submitter(options.cluster, options.cluster_overrides))
        print(f"after the jobs have finished: s2d sweep {options.sweep} --out {out} --collect")
        return 0
    from megatron_s2d.studies.sweep_report import write_sweep
    from megatron_s2d.studies.sweep_results import collect_sweep

    points = expand_points(sweep) if options.collect else run_sweep(sweep, out, _console())
    failures = unfinished_points(points, out)
    page = write_sweep(collect_sweep(sweep, out, points, failures), out, _console())
    print(f"report: {page}")
    return _EXIT_ERROR if failures else 0


def _add_simulate(commands: argparse._SubParsersAction) -> None:
    command = _add_command(
        commands,
        "simulate",
        _simulate,
        "predict time and memory of on-policy distillation on many GPUs",
        "Predict the seconds, tokens per second and memory of an on-policy distillation step on many GPUs, from measured "
        "kernel times and bandwidths where the file has them, else from data sheets and printed assumptions.",
        "s2d simulate configs/simulations/llama_70b_to_8b.yaml",
        "s2d simulate configs/simulations/llama_70b_to_8b.yaml --out runs/prediction",
    )
    command.add_argument("simulation", type=Path, metavar="SIMULATION", help="simulation file (YAML)")
    command.add_argument("--out", type=Path, metavar="DIR", help="also write tables and plots to DIR")


def _simulate(options: argparse.Namespace) -> None:
    from megatron_s2d.studies.simulate import load_simulation, print_simulation

    print_simulation(load_simulation(options.simulation), options.out, _console())


# ---------------------------------------------------------------------------------------------------- finished runs


def _add_eval(commands: argparse._SubParsersAction) -> None:
    command = _add_command(
        commands,
        "eval",
        _eval,
        "show the accuracies of a run, or compare two arms problem by problem",
        "Show avg@k and pass@k of a run's evaluations with standard errors over problems. With --against or --against-arm "
        "show the paired difference of two evaluations, with its interval and p-value.",
        "s2d eval runs/quickstart",
        "s2d eval runs/quickstart --arm rl_teacher_bridge --against-arm direct_student_grpo",
        "s2d eval runs/quickstart --arm rl_teacher_bridge --against runs/seed_2",
    )
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory, or an evaluation.jsonl file")
    command.add_argument("--arm", help="arm, or evaluated stage (default: all)")
    command.add_argument(
        "--against", type=Path, metavar="RUN_DIR", help="compare with this run directory or evaluation.jsonl file"
    )
    command.add_argument("--against-arm", metavar="ARM", help="compare with this arm (default: the same as --arm)")
    command.add_argument("--json", action="store_true", help="print JSON")


def _eval(options: argparse.Namespace) -> None:
    from megatron_s2d.workflow.evaluations import print_comparison, print_evaluations

    if options.against is None and options.against_arm is None:
        print_evaluations(options.run_dir, options.arm, as_json=options.json, console=_console())
        return
    other = options.against or options.run_dir
    print_comparison(
        (options.run_dir, options.arm),
        (other, options.against_arm or options.arm),
        as_json=options.json,
        console=_console(),
    )


def _add_generate(commands: argparse._SubParsersAction) -> None:
    command = _add_command(
        commands,
        "generate",
        _generate,
        "sample responses from a finished stage",
        "Sample responses from the final weights of a finished stage. Responses to prompts of --data are graded.",
        's2d generate runs/quickstart opd_rl --prompt "7 + 5 * 3 - 2 + 8 =" --num-samples 4',
        "s2d generate runs/quickstart rl_teacher_bridge --data problems --temperature 0",
    )
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory")
    command.add_argument("stage", metavar="STAGE", help="finished stage of the run, or an arm")
    command.add_argument("--prompt", action="append", default=[], dest="prompts", help="prompt text; may be repeated")
    command.add_argument("--data", metavar="ENTRY", help="take the prompts from this entry of the config's `data`")
    command.add_argument("--limit", type=int, metavar="N", default=4, help="prompts taken from --data (default: 4)")
    command.add_argument(
        "--num-samples", type=int, metavar="N", default=1, help="responses to each prompt (default: 1)"
    )
    command.add_argument(
        "--temperature", type=float, metavar="T", default=1.0, help="sampling temperature; 0 is greedy (default: 1)"
    )
    command.add_argument(
        "--max-response-length", type=int, metavar="N", help="limit in tokens (default: that of the run's evaluation)"
    )
    command.add_argument("--seed", type=int, metavar="N", default=0, help="seed of the sampler (default: 0)")


def _generate(options: argparse.Namespace) -> None:
    from megatron_s2d.workflow.generate import GenerateRequest, generate

    _silence_libraries()
    if not options.prompts and not options.data:
        raise UserError("no prompts: name a text with --prompt, or an entry of the config's `data` with --data")
    request = GenerateRequest(
        run_dir=options.run_dir,
        stage=options.stage,
        prompts=tuple(options.prompts),
        data=options.data,
        limit=options.limit,
        num_samples=options.num_samples,
        temperature=options.temperature,
        max_response_length=options.max_response_length,
        seed=options.seed,
    )
    generate(request, _console())


def _add_report(commands: argparse._SubParsersAction) -> None:
    command = _add_command(
        commands,
        "report",
        _report,
        "write the report of a finished run again",
        "Write results.json, report.html, report.md and the plots of a finished run again, without training.",
        "s2d report runs/quickstart",
    )
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory")


def _report(options: argparse.Namespace) -> None:
    from megatron_s2d.workflow.runner import rewrite_report

    rewrite_report(options.run_dir, _console())


# ---------------------------------------------------------------------------------------------------- tools


def _add_cache(commands: argparse._SubParsersAction) -> None:
    command = _add_command(
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
    _console().print(table)
    if options.action == "verify":
        print("verified: every shard, row and sample matches its checksum")


def _add_convert(commands: argparse._SubParsersAction) -> None:
    from megatron_s2d.conversion import cli

    cli.add_parser(commands)
    _finish_command(commands.choices["convert"], _convert)


def _convert(options: argparse.Namespace) -> None:
    from megatron_s2d.conversion import cli

    _silence_libraries()
    cli.run(options)


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    command = _add_command(
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
    print_diagnosis(diagnosis, _console())
    return diagnosis.exit_code


if __name__ == "__main__":
    sys.exit(main())
