"""``s2d eval``, ``generate``, ``watch`` and ``report``: look at runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_s2d.cli.parser import add_command, open_console
from megatron_s2d.errors import UserError


def add_eval(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "eval",
        _eval,
        "show the accuracies of a run, compare two arms, or evaluate a checkpoint",
        "Show avg@k and pass@k of a run's evaluations with standard errors over problems. With --against or "
        "--against-arm show the paired difference of two evaluations, with its interval and p-value. With --model and "
        "--data evaluate any checkpoint first, without a workflow file; the same command resumes.",
        "s2d eval runs/quickstart",
        "s2d eval runs/quickstart --arm rl_teacher_bridge --against-arm direct_student_grpo",
        "s2d eval runs/quickstart --arm rl_teacher_bridge --against runs/seed_2",
        "s2d eval --model DIR --data FILE --schema gsm8k --num-samples 4",
    )
    command.add_argument(
        "run_dir", type=Path, nargs="?", metavar="RUN_DIR", help="run directory, or an evaluation.jsonl file"
    )
    command.add_argument("--arm", help="arm, or evaluated stage (default: all)")
    command.add_argument(
        "--against", type=Path, metavar="RUN_DIR", help="compare with this run directory or evaluation.jsonl file"
    )
    command.add_argument("--against-arm", metavar="ARM", help="compare with this arm (default: the same as --arm)")
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_checkpoint(command)


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    """Add the arguments that evaluate a checkpoint."""
    group = command.add_argument_group("evaluate a checkpoint")
    group.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face directory, or a Megatron checkpoint")
    group.add_argument("--data", type=Path, metavar="FILE", help="labelled problems: .jsonl, .json or .parquet")
    group.add_argument("--schema", default="columns", help="format of the file (docs/data.md; default: columns)")
    group.add_argument("--tokenizer", metavar="DIR", help="tokenizer (default: that of the model)")
    group.add_argument("--num-samples", type=int, metavar="N", default=16, help="k of avg@k (default: 16)")
    group.add_argument("--temperature", type=float, metavar="T", default=1.0, help="0 is greedy (default: 1)")
    group.add_argument("--max-response-length", type=int, metavar="N", default=1024, help="in tokens (default: 1024)")
    group.add_argument("--limit", type=int, metavar="N", help="only this many problems")
    group.add_argument("--out", type=Path, metavar="DIR", help="run directory (default: runs/eval- and both names)")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="any key of the workflow that is run, for example --set evaluation.sampling.top_p=0.9",
    )


def _eval_checkpoint(options: argparse.Namespace) -> Path:
    """Evaluate ``--model`` on ``--data`` and return the run directory."""
    from megatron_s2d.workflow.checkpoint_evaluation import CheckpointEvaluation, checkpoint_workflow
    from megatron_s2d.workflow.runner import run_workflow

    if options.data is None:
        raise UserError("--model needs --data FILE: labelled problems to evaluate it on")
    config = checkpoint_workflow(
        CheckpointEvaluation(
            model=options.model,
            data=options.data,
            schema=options.schema,
            tokenizer=options.tokenizer,
            num_samples=options.num_samples,
            temperature=options.temperature,
            max_response_length=options.max_response_length,
            limit=options.limit,
        ),
        options.overrides,
    )
    run_dir = options.out or Path("runs") / config.name
    run_workflow(config, run_dir, open_console())
    return run_dir


def _eval(options: argparse.Namespace) -> None:
    from megatron_s2d.workflow.evaluations import print_comparison, print_evaluations

    if (options.model is None) == (options.run_dir is None):
        raise UserError("name a run directory, or a checkpoint with --model (and --data)")
    if options.model is not None:
        options.run_dir = _eval_checkpoint(options)
    if options.against is None and options.against_arm is None:
        print_evaluations(options.run_dir, options.arm, as_json=options.json, console=open_console())
        return
    other = options.against or options.run_dir
    print_comparison(
        (options.run_dir, options.arm),
        (other, options.against_arm or options.arm),
        as_json=options.json,
        console=open_console(),
    )


def add_generate(commands: argparse._SubParsersAction) -> None:
    command = add_command(
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
    command.add_argument(
        "--prompt",
        action="append",
        default=[],
        dest="prompts",
        help="message of a user, which the model's chat template renders; may be repeated",
    )
    command.add_argument("--raw", action="store_true", help="continue the texts of --prompt, without a chat template")
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
        raw=options.raw,
    )
    generate(request, open_console())


def add_watch(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "watch",
        _watch,
        "watch a run: stages, curves, speed, remaining time",
        "Show the stages of a run with their state, curves, speed and remaining time, until it is finished. Reads "
        "files only: the run may work on another machine, have ended or been killed. Without a terminal: plain text.",
        "s2d watch runs/quickstart",
        "s2d watch runs/quickstart --once",
    )
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory")
    command.add_argument("--once", action="store_true", help="print the present state and end")
    command.add_argument("--interval", type=float, metavar="N", default=2.0, help="seconds between looks (default: 2)")


def _watch(options: argparse.Namespace) -> None:
    from megatron_s2d.workflow.watch import watch

    if not options.interval > 0:
        raise UserError(f"--interval {options.interval:g}: must be more than 0")
    watch(options.run_dir, open_console(), once=options.once, interval=options.interval)


def add_report(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "report",
        _report,
        "write the report of a finished run again, or compare runs",
        "Write results.json, report.html, report.md and the plots of a finished run again, without training. With "
        "several runs, finished or not, write comparison.html into the first one: arms and curves side by side.",
        "s2d report runs/quickstart",
        "s2d report runs/quickstart runs/smoke",
    )
    command.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="run directory, or several")


def _report(options: argparse.Namespace) -> None:
    if len(options.run_dirs) > 1:
        from megatron_s2d.report.comparison import write_comparison

        page = write_comparison(options.run_dirs, options.run_dirs[0] / "comparison.html")
        open_console().print(f"comparison: {page}", markup=False, highlight=False, soft_wrap=True)
        return
    from megatron_s2d.workflow.runner import rewrite_report

    rewrite_report(options.run_dirs[0], open_console())
