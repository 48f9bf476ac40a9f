"""``s2d init``: writes a commented workflow for a user's models, data and hardware from a recipe. No torch here."""

from __future__ import annotations

import dataclasses
import json
import re
import string
import tempfile
from pathlib import Path

import psutil

from megatron_s2d.artifacts.files import atomic_write_text
from megatron_s2d.config.base import parse
from megatron_s2d.config.data import FileSource
from megatron_s2d.config.hardware import AssumptionsConfig, gpu_of
from megatron_s2d.config.hf_config import published_files, spec_from_directory
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import MicroBatchConfig
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.data.problems import read_problems
from megatron_s2d.errors import UserError
from megatron_s2d.estimate.roofline import Machine
from megatron_s2d.workflow.layout_search import Proposal, propose
from megatron_s2d.workflow.preflight import Preflight, check_workflow

_FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = {
    "grpo": "GRPO: train the student on verified rewards",
    "opd": "On-policy distillation of the teacher into the student",
    "four-stages": "GRPO on the teacher, forward-KL warm-up, on-policy distillation, GRPO on the student",
    "sft": "Supervised fine-tuning of the student on solutions",
    "self-distillation": "On-policy distillation of the student into itself, which as the teacher reads solutions",
}
NEEDS_TEACHER = ("opd", "four-stages")
_MAX_TOKENS = 16384  # of a micro-batch, where memory allows
_SHARE_OF_MEMORY = 0.5  # of a machine without GPUs: the estimate is of tensors, and other programs run too
_EVAL_ROWS = 200  # held out of a file without a second one for the evaluation


@dataclasses.dataclass(frozen=True)
class NewWorkflow:
    """Arguments of ``s2d init``."""

    recipe: str
    student: Path
    teacher: Path | None
    data: Path
    eval_data: Path | None  # None: the first rows of ``data``
    schema: str
    solution_column: str | None  # of schema columns
    num_gpus: int  # 0: CPU
    gpu: str
    max_prompt_length: int
    max_response_length: int
    lora_rank: int | None = None  # of adapters that are trained instead of the weights; None: all weights


def write_recipe(request: NewWorkflow, target: Path) -> Path:
    """Write the workflow and check it as ``--dry-run`` does; return ``target``.

    With GPUs the layout is the one that ``s2d plan`` proposes. Raises ``UserError`` for models and data that do not fit
    the recipe, and if ``target`` exists; a file that does not pass the check is not written.
    """
    if target.exists():
        raise UserError(f"{target}: exists already; remove it, or name another file")
    if request.recipe in NEEDS_TEACHER and request.teacher is None:
        raise UserError(f"recipe {request.recipe} needs --teacher DIR")
    for path in filter(None, (request.student, request.teacher)):
        spec_from_directory(path)  # says what is wrong with it
    text = render_recipe(request, target)
    with tempfile.TemporaryDirectory() as scratch:
        draft = Path(scratch) / (target.name or "workflow.yaml")
        draft.write_text(text, encoding="utf-8")
        preflight = check_workflow(load_workflow(draft), Path(scratch))
        if request.num_gpus:
            machine = Machine(gpu_of(request.gpu), parse(AssumptionsConfig, {}, "--gpu"))
            text = render_recipe(request, target, propose(preflight, machine, request.num_gpus)[0])
        else:
            text = render_recipe(request, target, max_tokens=largest_micro_batch(preflight))
        draft.write_text(text, encoding="utf-8")
        load_workflow(draft)
    atomic_write_text(target, text)
    return target


def largest_micro_batch(preflight: Preflight) -> int:
    """Return the tokens of a micro-batch with which every stage is estimated to fit this machine's CPU rank.

    The workflow's own, halved until it fits or only the longest sample does.
    """
    config, limit = preflight.config, _SHARE_OF_MEMORY * psutil.virtual_memory().total
    tokens = max(stage.micro_batch.max_tokens_per_gpu for stage in config.stages.values())
    longest = max(shape.length for shape in preflight.shapes.values())
    while True:
        micro_batch = {"micro_batch": MicroBatchConfig(max_tokens_per_gpu=tokens)}
        stages = {name: stage.model_copy(update=micro_batch) for name, stage in config.stages.items()}
        changed = dataclasses.replace(preflight, config=config.model_copy(update={"stages": stages}))
        fits = all(memory.total <= limit for memory in changed.memory(on_gpu=False).values())
        if fits or tokens // 2 < longest:
            return tokens
        tokens //= 2


def render_recipe(
    request: NewWorkflow, target: Path, layout: Proposal | None = None, max_tokens: int = _MAX_TOKENS
) -> str:
    """Return the text of the workflow; without a layout for one rank, with micro-batches of ``max_tokens``."""
    recompute, sizes = "none", {}
    if layout is not None:
        recompute, max_tokens, defaults = layout.recompute, layout.max_tokens, ParallelConfig().model_dump()
        sizes = {key: value for key, value in layout.parallel.model_dump().items() if value != defaults[key]}
    parallel = "{" + ", ".join(f"{key}: {json.dumps(value)}" for key, value in sizes.items()) + "}"
    eval_rows, train_rows = "", ""
    if request.eval_data is None:
        count = min(_EVAL_ROWS, max(1, _num_rows(request) // 5))
        eval_rows, train_rows = f"    limit: {count} # the first rows\n", f"    skip: {count} # those of eval\n"
    has_teacher = request.recipe in NEEDS_TEACHER
    values = {
        "title": RECIPES[request.recipe],
        "file": str(target),
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", target.stem).lstrip("._-") or "workflow",
        "tokenizer": _quoted(published_files(request.student)),
        "precision": "bfloat16" if request.num_gpus else "float32",
        "parallel": parallel,
        "recompute": recompute,
        "max_tokens": str(max_tokens),
        "max_prompt_length": str(request.max_prompt_length),
        "max_response_length": str(request.max_response_length),
        "student": _quoted(request.student),
        "teacher_model": f"  teacher: {{path: {_quoted(request.teacher)}, recompute: {recompute}}}\n"
        if has_teacher
        else "",
        "data": _quoted(request.data),
        "eval_data": _quoted(request.eval_data or request.data),
        "schema": request.schema + _columns(request),
        "train_rows": train_rows,
        "eval_rows": eval_rows,
    }
    parts = [(_FOLDER / f"{part}.yaml").read_text(encoding="utf-8") for part in ("head", request.recipe, "tail")]
    text = string.Template("".join(parts)).substitute(values)
    return text if request.lora_rank is None else _with_adapters(text, request.lora_rank)


def _with_adapters(text: str, rank: int) -> str:
    """Return the workflow with a LoRA adapter in every stage that trains, at ten times the learning rate."""

    def adapted(match: re.Match[str]) -> str:
        indent, rate = match.groups()
        lora = f"{indent}lora: {{rank: {rank}}} # adapters of all linear layers; docs/lora.md\n"
        return f"{lora}{indent}optimizer: {{lr: {float(rate) * 10:.1e}"

    return re.sub(r"( +)optimizer: \{lr: ([0-9.e-]+)", adapted, text)


def _columns(request: NewWorkflow) -> str:
    """Return the line of the columns, of which only that of the solutions is not the default."""
    if request.solution_column is None:
        return ""
    return f"\n    columns: {{solution: {json.dumps(request.solution_column, ensure_ascii=False)}}}"


def _num_rows(request: NewWorkflow) -> int:
    source = parse(FileSource, {"path": str(request.data), "schema": request.schema, "verifier": None}, "--data")
    return sum(1 for _ in read_problems(source, {}))


def _quoted(path: Path | None) -> str:
    """Return a path as YAML text."""
    return json.dumps(str(path), ensure_ascii=False)
