"""The prompts of the embedded task or of files: length filter, halves (methods.md M7), and what a stage reads of them.

Files are read by ``data/problems.py``, rendered by ``data/rendering.py`` and kept by ``data/prompt_cache.py``; labels
are interpreted by ``verify``.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_s2d.artifacts.files import read_jsonl
from megatron_s2d.config.base import dump
from megatron_s2d.config.data import DataSource, FileSource, TaskSource
from megatron_s2d.config.stage import PromptFilterConfig
from megatron_s2d.config.teacher_view import TeacherViewConfig
from megatron_s2d.config.workflow import DEFAULT_DATA_CACHE, HALVES, WorkflowConfig
from megatron_s2d.data.hub import as_files
from megatron_s2d.data.problems import DUPLICATES, ProblemBatch, convert_problems, id_prefixes
from megatron_s2d.data.prompt_cache import table_of_files
from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.data.rendering import PromptRenderer
from megatron_s2d.data.tasks import task_documents, task_prompts
from megatron_s2d.data.text_tokens import TextTokens
from megatron_s2d.data.tokenizer import template_fingerprint, tokenizer_fingerprint
from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt

if TYPE_CHECKING:
    import pyarrow

# Settings of a source that say where its rows are, or what is done with its prompts.
_NOT_OF_PROMPTS = ("path", "on_long_prompt")


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts of one source, and the numbers of dropped ones."""

    prompts: PromptTable
    dropped_too_long: int  # longer than max_prompt_length
    dropped_duplicates: int = 0  # rows with a repeated id (on_duplicate_id: drop)


def load_prompts(
    source: DataSource,
    tokenizer: Any,
    *,
    max_prompt_length: int | None,
    date: datetime.date,
    cache_dir: Path | None = None,
    view: TeacherViewConfig | None = None,
) -> PromptSet:
    """Return the prompts of a source; drop and count those longer than ``max_prompt_length``.

    ``date`` is the day for chat templates that write today's date; tables of large files are kept in ``cache_dir`` (by
    default the one of ``data_cache_dir``). view: the prompts as a teacher reads them; ``tokenizer`` has its template.

    Raises ``UserError`` for a missing file or column, an empty data set, repeated ids, and, with
    ``on_long_prompt: error``, a prompt that is too long.
    """
    counts: dict[str, int] = {}
    if isinstance(source, TaskSource):
        prompts = PromptTable.of(task_prompts(source, tokenizer, view))
    else:
        cache_dir = (cache_dir or DEFAULT_DATA_CACHE).expanduser()
        source = as_files(source, cache_dir)
        prompts, counts = _file_prompts(source, tokenizer, date, cache_dir, view)
    fitting = prompts.up_to(max_prompt_length)
    dropped = len(prompts) - len(fitting)
    if max_prompt_length is not None and dropped and getattr(source, "on_long_prompt", "drop") == "error":
        longest = prompts.longest_beyond(max_prompt_length)
        assert longest is not None
        raise UserError(
            f"prompt {longest.id} has {len(longest.token_ids)} tokens, max_prompt_length is {max_prompt_length}: "
            "increase it, or set on_long_prompt: drop"
        )
    if not fitting:
        raise UserError(
            f"all prompts of {_name(source)} are longer than max_prompt_length {max_prompt_length}; increase it"
        )
    return PromptSet(fitting, dropped, counts.get(DUPLICATES, 0))


def _file_prompts(
    source: FileSource, tokenizer: Any, date: datetime.date, cache_dir: Path, view: TeacherViewConfig | None
) -> tuple[PromptTable, dict[str, int]]:
    settings = {key: value for key, value in dump(source).items() if key not in _NOT_OF_PROMPTS}
    if source.skip == 0:
        del settings["skip"]  # of tables from before the key existed
    settings |= {
        "prefixes": id_prefixes(source.paths),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat_template": template_fingerprint(tokenizer, date),
    }
    if view is not None:
        settings["view"] = dump(view)
        source = source.with_context_columns(view.columns)

    def read(counts: dict[str, int], processes: int, *, deferred: bool) -> Iterator[ProblemBatch[pyarrow.RecordBatch]]:
        convert = PromptRenderer(source, tokenizer, date, view, deferred=deferred)
        return convert_problems(source, counts, convert, processes)

    return table_of_files(source.paths, settings, cache_dir, read, TextTokens(tokenizer))


def prompts_of(config: WorkflowConfig, name: str, tokenizer: Any, others: Sequence[Any] = ()) -> PromptSet:
    """Return the prompts of ``entry``, ``entry/1H`` or ``entry/2H`` of a workflow's ``data``.

    others: tokenizers that render the entry for other models. A prompt that is too long for one of them is left out for
    all, so that every stage has the same halves and every evaluation the same problems.
    """
    entry, _, half = name.partition("/")
    limit, date, cache_dir = config.lengths.max_prompt_length, config.template_date, config.data_cache_dir
    try:
        prompt_set = load_prompts(
            config.data[entry], tokenizer, max_prompt_length=limit, date=date, cache_dir=cache_dir
        )
        for other in others:
            if other is tokenizer or isinstance(config.data[entry], TaskSource):  # a task has no template
                continue
            fitting = load_prompts(config.data[entry], other, max_prompt_length=limit, date=date, cache_dir=cache_dir)
            prompt_set = _in_both(prompt_set, fitting.prompts)
    except UserError as error:
        raise UserError(f"data.{entry}: {error}") from None
    if half:
        halves = split_halves(prompt_set.prompts, config.split_seed)
        prompt_set = dataclasses.replace(prompt_set, prompts=halves[HALVES.index(half)])
    if not prompt_set.prompts:
        raise UserError(f"data.{name}: this half is empty; {entry} needs at least two prompts")
    return prompt_set


def _in_both(prompt_set: PromptSet, other: PromptTable) -> PromptSet:
    """Keep the prompts that ``other`` has; both are of the same rows, rendered by two tokenizers."""
    kept = prompt_set.prompts.select(np.isin(prompt_set.prompts.rows, other.rows, assume_unique=True))
    dropped = prompt_set.dropped_too_long + len(prompt_set.prompts) - len(kept)
    return dataclasses.replace(prompt_set, prompts=kept, dropped_too_long=dropped)


def fitting_prompts(config: WorkflowConfig, stage_name: str, entry: str, prompts: Sequence[Prompt]) -> PromptTable:
    """Return those ``prompts`` of ``entry`` that stage ``stage_name`` reads: within its own ``max_prompt_length``,
    and with a pass rate in the range of its ``prompt_filter``.

    The halves are formed before, so that those of stages with different limits do not overlap. Raises ``UserError`` if
    none is left and, with ``on_long_prompt: error``, if one is too long.
    """
    table = short_prompts(config, stage_name, entry, prompts)
    settings = getattr(config.stages[stage_name], "prompt_filter", None)
    return table if settings is None else _with_pass_rate(settings, f"stages.{stage_name}.prompt_filter", entry, table)


def _with_pass_rate(settings: PromptFilterConfig, where: str, entry: str, table: PromptTable) -> PromptTable:
    if not settings.evaluation.is_file():
        raise UserError(f"{where}: {settings.evaluation}: no such file")
    rates = _pass_rates(settings.evaluation, settings.evaluation.stat().st_mtime_ns)
    unknown = table.distinct("id") - rates.keys()
    if unknown:
        raise UserError(
            f"{where}: {settings.evaluation} has no row for {len(unknown)} prompts of '{entry}' ({min(unknown)}): "
            "evaluate these prompts, or name the entry that was evaluated"
        )
    fits = np.array([settings.min_pass_rate <= rates[prompt.id] <= settings.max_pass_rate for prompt in table], bool)
    if not fits.any():
        raise UserError(f"{where}: no prompt of '{entry}' has a pass rate in this range; widen it")
    return table.select(fits)


@functools.lru_cache(maxsize=8)
def _pass_rates(path: Path, modified: int) -> dict[str, float]:
    """Return the share of correct responses by the id of the problem. modified: time of the file, for the cache."""
    try:
        return {row["problem_id"]: float(np.mean(row.get("correct") or row["rewards"])) for row in read_jsonl(path)}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not an evaluation.jsonl ({type(error).__name__}: {error})") from error


def short_prompts(config: WorkflowConfig, stage_name: str, entry: str, prompts: Sequence[Prompt]) -> PromptTable:
    """Return those ``prompts`` that are within the stage's ``max_prompt_length``; see ``fitting_prompts``."""
    table = PromptTable.of(prompts)
    limit = getattr(config.stages[stage_name], "max_prompt_length", None)
    fitting = table.up_to(limit)
    where = f"stages.{stage_name}.max_prompt_length: {limit}"
    if not fitting:
        raise UserError(f"{where}: all prompts of '{entry}' are longer; increase it")
    source = config.data[entry.partition("/")[0]]
    if limit is not None and len(fitting) < len(table) and getattr(source, "on_long_prompt", "drop") == "error":
        longest = table.longest_beyond(limit)
        assert longest is not None
        raise UserError(
            f"{where}: prompt {longest.id} of '{entry}' has {len(longest.token_ids)} tokens: increase it, or set "
            "on_long_prompt: drop"
        )
    return fitting


def is_corpus(source: DataSource) -> bool:
    """Return whether ``source`` is an endless corpus rather than a set of prompts."""
    return isinstance(source, TaskSource) and source.split == "corpus"


def corpus_documents(source: TaskSource, tokenizer: Any, start: int, count: int) -> list[Prompt]:
    """Return documents ``start`` to ``start + count`` of an endless corpus, with ``solution_token_ids``."""
    return task_documents(source, tokenizer, start, count)


def split_halves(prompts: Sequence[Prompt], seed: int) -> tuple[PromptTable, PromptTable]:
    """Split into two random halves (1H, 2H) that depend on the prompts' ids and the seed, not on their order."""
    table = PromptTable.of(prompts)
    permutation, middle = np.random.default_rng(seed).permutation(len(table)), (len(table) + 1) // 2
    by_id = table.sorted_by_id()
    return table.select(by_id[permutation[:middle]]), table.select(by_id[permutation[middle:]])


def _name(source: DataSource) -> str:
    return f"task {source.task}" if isinstance(source, TaskSource) else ", ".join(map(str, source.paths))
