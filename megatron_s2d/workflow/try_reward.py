"""Grades a file of responses with the reward of a data entry, to try it before a run. No torch here."""

from __future__ import annotations

import collections
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.model_tokenizers import ModelTokenizers
from megatron_s2d.data.prompts import is_corpus, prompts_of
from megatron_s2d.errors import UserError
from megatron_s2d.formatting import printable
from megatron_s2d.records import Prompt
from megatron_s2d.verify import RewardManager, check_labels

_SHOWN = 200  # characters of a remark


def try_reward(config: WorkflowConfig, entry: str, responses: Path | None, limit: int | None, console: Console) -> None:
    """Print a verdict for every response, then labels, rewards and speed.

    responses: JSON lines with ``id`` (or ``problem_id``, as in ``rollouts.jsonl``) and ``response``; None: the prompts'
    labels are the responses. limit: the first so many. Raises ``UserError`` for what a run would refuse, too.
    """
    name = entry.partition("/")[0]
    if name not in config.data or is_corpus(config.data[name]):
        raise UserError(f"--data {entry}: no entry of `data` with prompts ({', '.join(config.data)})")
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer, *others = ModelTokenizers(config, Path(scratch)).of_prompts()
        table = prompts_of(config, entry, tokenizer, others).prompts
    if responses is None:
        prompts = [prompt for prompt in table[:limit] if prompt.answer is not None]
        texts = [str(prompt.answer) for prompt in prompts]
        if not prompts:
            raise UserError(f"data '{entry}' has no labels to grade: give a file with --responses")
    else:
        rows = _read(responses)[:limit]
        by_id = {prompt.id: prompt for prompt in table}
        if unknown := [name for name, _ in rows if name not in by_id]:
            raise UserError(
                f"{responses}: {len(unknown)} rows have an id that '{entry}' lacks, for example {unknown[0]}"
            )
        prompts, texts = [by_id[name] for name, _ in rows], [text for _, text in rows]
    check_labels(prompts)
    start = time.perf_counter()
    with RewardManager() as manager:
        verdicts = manager.grade(prompts, texts)
    seconds = time.perf_counter() - start
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        detail = "" if verdict.detail is None else f"   {printable(verdict.detail)[:_SHOWN]}"
        console.print(f"{verdict.reward:8.4g}  {verdict.label:12} {prompt.id}{detail}", markup=False, highlight=False)
    _print_summary(prompts, [(verdict.reward, verdict.label) for verdict in verdicts], seconds, console)


def _print_summary(
    prompts: Sequence[Prompt], verdicts: Sequence[tuple[float, str]], seconds: float, console: Console
) -> None:
    count, rewards = len(prompts), [reward for reward, _ in verdicts]
    labels = collections.Counter(label for _, label in verdicts)
    shares = ", ".join(f"{label} {number} ({number / count:.1%})" for label, number in labels.most_common())
    console.print(f"{count} responses: {shares}", markup=False, highlight=False)
    console.print(
        f"reward: mean {sum(rewards) / count:.4g}, lowest {min(rewards):.4g}, highest {max(rewards):.4g}; "
        f"{count / max(seconds, 1e-9):.3g} responses/s",
        markup=False,
        highlight=False,
    )


def _read(path: Path) -> list[tuple[str, str]]:
    """Return (id, response) of each row."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        fields = (row.get("id", row.get("problem_id")), row.get("response")) if isinstance(row, dict) else ()
        if not fields or not all(isinstance(value, str) for value in fields):
            raise UserError(f'{path}, line {number}: expected {{"id": "...", "response": "..."}}, both texts')
        rows.append(fields)
    if not rows:
        raise UserError(f"{path}: no responses")
    return rows
