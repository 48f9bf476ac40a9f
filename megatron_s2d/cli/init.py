"""``s2d init``: write a workflow for one's own models and data."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_s2d.cli.parser import add_command
from megatron_s2d.errors import UserError

_RECIPES = ("grpo", "opd", "four-stages", "sft", "self-distillation")


def add_init(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "init",
        _init,
        "write a workflow for your models, data and hardware",
        "Write a commented workflow file from a recipe and check it as --dry-run does. What is not given is asked for"
        " on a terminal. With --num-gpus the layout is the one that `s2d plan` proposes.",
        "s2d init my.yaml --recipe opd --student DIR --teacher DIR --data FILE",
        "s2d init my.yaml --recipe grpo --student DIR --data FILE --schema gsm8k --num-gpus 8 --gpu h200",
    )
    command.add_argument("file", type=Path, metavar="FILE", help="workflow to write; it must not exist")
    command.add_argument("--recipe", choices=_RECIPES, help="what to train")
    command.add_argument("--student", type=Path, metavar="DIR", help="Hugging Face directory or Megatron checkpoint")
    command.add_argument("--teacher", type=Path, metavar="DIR", help="likewise, for opd and four-stages")
    command.add_argument("--data", type=Path, metavar="FILE", help="problems: .jsonl, .json or .parquet")
    command.add_argument(
        "--eval-data", type=Path, metavar="FILE", help="problems to evaluate on (default: the first rows of --data)"
    )
    command.add_argument("--schema", default="columns", help="format of the files (docs/data.md; default: columns)")
    command.add_argument(
        "--solution-column", metavar="NAME", help="column of reference solutions, for sft and self-distillation"
    )
    command.add_argument(
        "--lora-rank", type=int, metavar="N", help="train LoRA adapters of this rank instead of all weights"
    )
    command.add_argument("--num-gpus", type=int, metavar="N", help="GPUs to train on; 0: CPU")
    command.add_argument("--gpu", metavar="NAME", default="h200", help="kind of GPU (default: h200)")
    command.add_argument("--max-prompt-length", type=int, metavar="N", default=1024, help="in tokens (default: 1024)")
    command.add_argument("--max-response-length", type=int, metavar="N", default=2048, help="in tokens (default: 2048)")


def _init(options: argparse.Namespace) -> None:
    from megatron_s2d.workflow.recipes import NEEDS_TEACHER, RECIPES, NewWorkflow, write_recipe

    recipes = "; ".join(f"{name}: {text}" for name, text in RECIPES.items())
    recipe = options.recipe or _ask("recipe", f"recipe ({recipes})")
    if recipe not in RECIPES:
        raise UserError(f"no recipe '{recipe}' (recipes: {', '.join(RECIPES)})")
    request = NewWorkflow(
        recipe=recipe,
        student=options.student or Path(_ask("student", "directory of the student")),
        teacher=options.teacher
        or (Path(_ask("teacher", "directory of the teacher")) if recipe in NEEDS_TEACHER else None),
        data=options.data or Path(_ask("data", "file with problems")),
        eval_data=options.eval_data,
        schema=options.schema,
        solution_column=options.solution_column,
        num_gpus=_whole(_ask("num-gpus", "number of GPUs (0: CPU)")) if options.num_gpus is None else options.num_gpus,
        gpu=options.gpu,
        max_prompt_length=options.max_prompt_length,
        max_response_length=options.max_response_length,
        lora_rank=options.lora_rank,
    )
    path = write_recipe(request, options.file)
    print(f"wrote {path}, which passes the checks; next:")
    print(f"  s2d run {path} --dry-run     # the plan")
    print(f"  s2d run {path}               # train; run it again to resume")


def _ask(option: str, question: str) -> str:
    if not sys.stdin.isatty():
        raise UserError(f"give --{option} (there is no terminal to ask on)")
    answer = input(f"{question}: ").strip()
    if not answer:
        raise UserError(f"give --{option}")
    return answer


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"'{text}' is not a number of GPUs")
    return int(text)
