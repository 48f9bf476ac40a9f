"""Prompts from a task or from files: columns of published schemas, templates, chat template, length filter, halves.

Templates and halves are methods.md M7. Left out: what labels mean (``verify``) and which stage uses which prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_s2d.config.base import UserError
from megatron_s2d.config.data import DataSource, FileSource, TaskSource
from megatron_s2d.config.workflow import HALVES, WorkflowConfig
from megatron_s2d.data.tasks import task_documents, task_prompts
from megatron_s2d.records import Prompt

TEMPLATES = {
    "math": "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
    "code": "{question}\nPlease write the solution as one fenced python block at the end of your answer.",
    "plain": "{question}",
}


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts of one source, and how many were left out because of their length."""

    prompts: list[Prompt]
    dropped_too_long: int


@dataclasses.dataclass(frozen=True)
class _Row:
    """One problem as every schema describes it."""

    id: str | None
    messages: list[dict[str, str]] | None  # given as a conversation
    question: str
    answer: str | None
    solution: str | None


def load_prompts(source: DataSource, tokenizer: Any, *, max_prompt_tokens: int | None) -> PromptSet:
    """The prompts of a task or of files, tokenized; those longer than ``max_prompt_tokens`` are dropped and counted.

    Raises ``UserError`` for a missing file or column, an empty data set, ids that come twice, and, with
    ``on_long_prompt: error``, a prompt beyond the limit.
    """
    if isinstance(source, TaskSource):
        prompts = task_prompts(source, tokenizer)
    else:
        prompts = _file_prompts(source, tokenizer)
    kept = [prompt for prompt in prompts if max_prompt_tokens is None or len(prompt.token_ids) <= max_prompt_tokens]
    if len(kept) < len(prompts) and getattr(source, "on_long_prompt", "drop") == "error":
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        raise UserError(
            f"prompt {longest.id} has {len(longest.token_ids)} tokens, max_prompt_tokens is {max_prompt_tokens}: raise "
            "the limit, or set on_long_prompt: drop"
        )
    if not kept:
        raise UserError(f"no prompt of {_name(source)} has at most max_prompt_tokens {max_prompt_tokens}; raise it")
    return PromptSet(kept, len(prompts) - len(kept))


def prompts_of(config: WorkflowConfig, name: str, tokenizer: Any) -> PromptSet:
    """The prompts of ``entry``, ``entry/1H`` or ``entry/2H`` of a workflow's ``data``."""
    entry, _, half = name.partition("/")
    try:
        found = load_prompts(config.data[entry], tokenizer, max_prompt_tokens=config.lengths.max_prompt_tokens)
    except UserError as error:
        raise UserError(f"data.{entry}: {error}") from None
    if half:
        halves = split_halves(found.prompts, config.split_seed)
        found = dataclasses.replace(found, prompts=halves[HALVES.index(half)])
    if not found.prompts:
        raise UserError(f"data.{name}: the half is empty; {entry} needs at least two prompts")
    return found


def is_corpus(source: DataSource) -> bool:
    """Whether ``source`` is an endless corpus rather than a set of prompts."""
    return isinstance(source, TaskSource) and source.split == "corpus"


def corpus_documents(source: TaskSource, tokenizer: Any, start: int, count: int) -> list[Prompt]:
    """Documents ``start`` to ``start + count`` of an endless corpus, with ``solution_token_ids``."""
    return task_documents(source, tokenizer, start, count)


def split_halves(prompts: Sequence[Prompt], seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Two random halves (1H, 2H) that depend on the prompts' ids and the seed, not on their order."""
    ordered = sorted(prompts, key=lambda prompt: prompt.id)
    places = np.random.default_rng(seed).permutation(len(ordered))
    middle = (len(ordered) + 1) // 2
    return [ordered[place] for place in places[:middle]], [ordered[place] for place in places[middle:]]


def _name(source: DataSource) -> str:
    return f"task {source.task}" if isinstance(source, TaskSource) else ", ".join(map(str, source.paths))


# ------------------------------------------------------------------------------------------------------------ files


def _file_prompts(source: FileSource, tokenizer: Any) -> list[Prompt]:
    prompts, seen = [], set()
    for path in source.paths:
        table = _read_table(path)
        for number in range(len(table) if source.limit is None else min(source.limit - len(prompts), len(table))):
            prompt = _prompt(source, _row(source, table[number], path, number), path, number, tokenizer)
            if prompt.id in seen:
                raise UserError(f"{path}: row {number + 1}: the id '{prompt.id}' comes twice; ids must be unique")
            seen.add(prompt.id)
            prompts.append(prompt)
    return prompts


def _read_table(path: Path) -> Any:
    """The rows of a file, read by ``datasets`` without a network or a cache that outlives the call."""
    import tempfile

    import datasets

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(path.suffix)
    if kind is None:
        raise UserError(f"{path}: give a .jsonl, .json or .parquet file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        try:
            table = datasets.load_dataset(
                kind, data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True
            )
        except Exception as error:  # datasets wraps whatever its readers raise
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise UserError(f"{path}: cannot be read as {kind} ({reason})") from error
    if not len(table):
        raise UserError(f"{path}: no rows")
    return table


def _row(source: FileSource, row: Mapping[str, Any], path: Path, number: int) -> _Row:
    def get(column: str) -> Any:
        if column not in row:
            raise UserError(
                f"{path}: no column '{column}' for schema {source.schema_} (columns: {', '.join(row)}); choose another "
                "`schema`, or name the `columns`"
            )
        return row[column]

    def text(column: str | None) -> str | None:
        if column is None:
            return None
        value = get(column)
        if value is None:
            raise UserError(f"{path}: row {number + 1}: '{column}' is empty")
        return str(value)

    schema = source.schema_
    if schema == "columns":
        names = source.columns
        return _Row(text(names.id), None, text(names.question), text(names.answer), text(names.solution))
    if schema == "dapo":
        label = row["label"] if "label" in row else get("reward_model")["ground_truth"]
        extra = row.get("extra_info") or {}
        messages = [dict(message) for message in get("prompt")]
        return _Row(extra.get("index"), messages, messages[-1]["content"], str(label), None)
    if schema == "deepmath":
        return _Row(None, None, text("question"), text("final_answer"), row.get("r1_solution_1"))
    if schema == "gsm8k":
        solution = text("answer")
        return _Row(None, None, text("question"), solution.rpartition("####")[2].strip().replace(",", ""), solution)
    if schema == "math500":
        return _Row(row.get("unique_id"), None, text("problem"), text("answer"), text("solution"))
    return _Row(text("id"), None, text("problem"), text("answer"), None)


def _prompt(source: FileSource, row: _Row, path: Path, number: int, tokenizer: Any) -> Prompt:
    messages = row.messages
    if messages is None:
        question = TEMPLATES[source.template].format(question=row.question)
        messages = [{"role": "user", "content": question}]
        if source.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": source.system_prompt})
    text = render(messages, tokenizer)
    token_ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
    if not token_ids.size:
        raise UserError(f"{path}: row {number + 1}: the prompt is empty")
    solution = None
    if row.solution is not None:
        ids = tokenizer(row.solution, add_special_tokens=False)["input_ids"]
        solution = np.asarray([*ids, tokenizer.eos_token_id], dtype=np.int64)
    labelled = source.verifier is not None
    return Prompt(
        id=f"{path.stem}/{row.id if row.id is not None else number}",
        token_ids=token_ids,
        text=text,
        domain=source.domain,
        verifier=source.verifier,
        answer=row.answer if labelled else None,
        solution_token_ids=solution,
    )


def render(messages: list[dict[str, str]], tokenizer: Any) -> str:
    """The conversation through the tokenizer's chat template, thinking off; without a template, its last message."""
    if getattr(tokenizer, "chat_template", None) is None:
        return messages[-1]["content"]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
