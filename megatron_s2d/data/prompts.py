"""Builds prompts from the embedded task or from files: templates, chat template, length filter, halves.

Templates and halves are methods.md M7; the code template is that of G-OPD (arXiv 2602.12125, appendix D). Files are
read by ``data/files.py``, labels are interpreted by ``verify``.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_s2d.config.data import DataSource, FileSource, TaskSource
from megatron_s2d.config.workflow import HALVES, WorkflowConfig
from megatron_s2d.data.files import Problem, read_problems
from megatron_s2d.data.tasks import task_documents, task_prompts
from megatron_s2d.data.tokenizer import render
from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt

TEMPLATES = {
    "math": "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
    "code": "{question}\nWrite Python code to solve the problem. Present the code in\n```python\nYour code\n```\n"
    "at the end.\nYou need to think first then write the Python code.",
    "plain": "{question}",
}


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts of one source, and the numbers of dropped ones."""

    prompts: list[Prompt]
    dropped_too_long: int  # longer than max_prompt_length
    dropped_duplicates: int = 0  # rows with a repeated id (on_duplicate_id: drop)


def load_prompts(
    source: DataSource, tokenizer: Any, *, max_prompt_length: int | None, date: datetime.date
) -> PromptSet:
    """Tokenize the prompts of a task or of files; drop and count those longer than ``max_prompt_length``.

    ``date`` is the day for chat templates that write today's date.

    Raises ``UserError`` for a missing file or column, an empty data set, repeated ids, and, with
    ``on_long_prompt: error``, a prompt that is too long.
    """
    num_duplicates = 0
    if isinstance(source, TaskSource):
        prompts = task_prompts(source, tokenizer)
    else:
        problems, num_duplicates = read_problems(source)
        prompts = [_prompt(source, problem, tokenizer, date) for problem in problems]
    fitting = [prompt for prompt in prompts if max_prompt_length is None or len(prompt.token_ids) <= max_prompt_length]
    if len(fitting) < len(prompts) and getattr(source, "on_long_prompt", "drop") == "error":
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        raise UserError(
            f"prompt {longest.id} has {len(longest.token_ids)} tokens, max_prompt_length is {max_prompt_length}: "
            "increase it, or set on_long_prompt: drop"
        )
    if not fitting:
        raise UserError(
            f"all prompts of {_name(source)} are longer than max_prompt_length {max_prompt_length}; increase it"
        )
    return PromptSet(fitting, len(prompts) - len(fitting), num_duplicates)


def prompts_of(config: WorkflowConfig, name: str, tokenizer: Any) -> PromptSet:
    """Return the prompts of ``entry``, ``entry/1H`` or ``entry/2H`` of a workflow's ``data``."""
    entry, _, half = name.partition("/")
    try:
        prompt_set = load_prompts(
            config.data[entry], tokenizer, max_prompt_length=config.lengths.max_prompt_length, date=config.template_date
        )
    except UserError as error:
        raise UserError(f"data.{entry}: {error}") from None
    if half:
        halves = split_halves(prompt_set.prompts, config.split_seed)
        prompt_set = dataclasses.replace(prompt_set, prompts=halves[HALVES.index(half)])
    if not prompt_set.prompts:
        raise UserError(f"data.{name}: this half is empty; {entry} needs at least two prompts")
    return prompt_set


def is_corpus(source: DataSource) -> bool:
    """Return whether ``source`` is an endless corpus rather than a set of prompts."""
    return isinstance(source, TaskSource) and source.split == "corpus"


def corpus_documents(source: TaskSource, tokenizer: Any, start: int, count: int) -> list[Prompt]:
    """Return documents ``start`` to ``start + count`` of an endless corpus, with ``solution_token_ids``."""
    return task_documents(source, tokenizer, start, count)


def split_halves(prompts: Sequence[Prompt], seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Split into two random halves (1H, 2H) that depend on the prompts' ids and the seed, not on their order."""
    ordered = sorted(prompts, key=lambda prompt: prompt.id)
    permutation = np.random.default_rng(seed).permutation(len(ordered))
    middle = (len(ordered) + 1) // 2
    return [ordered[index] for index in permutation[:middle]], [ordered[index] for index in permutation[middle:]]


def _name(source: DataSource) -> str:
    return f"task {source.task}" if isinstance(source, TaskSource) else ", ".join(map(str, source.paths))


def _prompt(source: FileSource, problem: Problem, tokenizer: Any, date: datetime.date) -> Prompt:
    question = TEMPLATES[source.template].format(question=problem.question)
    messages = [*problem.context, {"role": "user", "content": question}]
    if source.system_prompt is not None:
        if messages[0]["role"] == "system":
            raise UserError(f"prompt {problem.id} already has a system message; remove system_prompt")
        messages.insert(0, {"role": "system", "content": source.system_prompt})
    text = render(messages, tokenizer, date)
    # A chat template writes the start token itself; plain text needs the tokenizer's special tokens.
    ids = tokenizer(text, add_special_tokens=tokenizer.chat_template is None)["input_ids"]
    if not ids:
        raise UserError(f"prompt {problem.id} is empty")
    solution = None
    if problem.solution is not None:
        solution_ids = tokenizer(problem.solution, add_special_tokens=False)["input_ids"]
        solution = np.asarray([*solution_ids, tokenizer.eos_token_id], dtype=np.int64)
    return Prompt(
        id=problem.id,
        token_ids=np.asarray(ids, dtype=np.int64),
        text=text,
        domain=source.domain,
        verifier=source.verifier,
        answer=problem.answer if source.verifier is not None else None,
        solution_token_ids=solution,
    )
