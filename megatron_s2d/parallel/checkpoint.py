"""Megatron distributed checkpoints: weights, optimizer state and position, loadable at any layout.

A checkpoint is a directory that appears in one rename when all of it is on disk, so a killed or failed save leaves the
previous one as it was. Files: Megatron's ``dist_checkpointing`` shards with their SHA-256 manifest, ``model_spec.json``
(which model this is) and ``position.json`` (where training stands). Nothing is unpickled: Megatron loads its common
part with ``weights_only``.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import queue
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_s2d.config.base import UserError
from megatron_s2d.parallel import device
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.parallel.step import TrainableModel

device.prepare()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.core import CheckpointingException  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.dist_checkpointing.validation import StrictHandling  # noqa: E402

# Optimizer state is saved parameter by parameter, so it follows the weights to any layout.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
_MODEL_PREFIX = "model."
_NEARLY_FULL_BYTES = 1 << 20


def save_checkpoint(
    directory: Path,
    chunks: list[torch.nn.Module],
    layout: Layout,
    *,
    model_spec: dict[str, Any],
    position: dict[str, Any],
    trainable: TrainableModel | None = None,
) -> None:
    """Write a checkpoint to ``directory`` (which must not exist); collective.

    ``chunks`` are the bare models; ``trainable`` adds the optimizer state. Raises ``UserError`` when the disk is full
    or not writable; then ``directory`` does not exist and whatever was saved before is untouched.
    """
    temporary = directory.with_name(directory.name + ".partial")
    failure = _on_rank_zero(lambda: _fresh_directory(temporary, directory))
    if failure is None:
        failure = _everyone(lambda: _save_shards(temporary, chunks, layout, trainable))
        if failure is not None and shutil.disk_usage(directory.parent).free < _NEARLY_FULL_BYTES:
            failure = "no space left on the disk"  # torch's writer says that in words of its own
    if failure is None:
        failure = _on_rank_zero(lambda: _finish(temporary, directory, model_spec, position))
    if failure is not None:
        _on_rank_zero(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise UserError(f"{directory}: checkpoint not saved ({failure}); earlier checkpoints are intact")


def load_checkpoint(
    directory: Path,
    chunks: list[torch.nn.Module],
    layout: Layout,
    *,
    model_spec: dict[str, Any],
    trainable: TrainableModel | None = None,
) -> dict[str, Any]:
    """Load weights (and optimizer state into ``trainable``); collective. Returns the saved position.

    Raises ``UserError`` for a missing, damaged or foreign checkpoint, naming the first field of the model that differs.
    """
    check_checkpoint(directory, model_spec)
    if trainable is not None:
        _make_optimizer_state(trainable)
    try:
        with layout.active():
            state = _sharded_state(chunks, trainable, loading=True)
            # Weights alone may be taken from a checkpoint that has optimizer state as well.
            strict = StrictHandling.RAISE_ALL if trainable is not None else StrictHandling.RAISE_UNEXPECTED
            loaded = dist_checkpointing.load(state, str(directory), strict=strict, verify_integrity=True)
    except (CheckpointingException, CheckpointException, OSError, RuntimeError) as error:
        raise UserError(f"{directory}: not a usable checkpoint ({_one_line(error)})") from error
    with layout.active():
        for index, chunk in enumerate(chunks):
            _load_weights(chunk, loaded[f"chunk{index}"], directory)
        if trainable is not None:
            _load_optimizer(trainable, loaded["optimizer"])
    position = read_position(directory)
    if trainable is not None:
        trainable.restart_schedule_at(position["updates"])
    return position


def check_checkpoint(directory: Path, model_spec: dict[str, Any]) -> None:
    """Refuse a directory that is not a checkpoint of the model ``model_spec`` describes."""
    saved = read_model_spec(directory)
    for key in sorted(set(saved) | set(model_spec)):
        if saved.get(key) != model_spec.get(key):
            raise UserError(
                f"{directory}: checkpoint of another model: {key} is {saved.get(key)!r} there and "
                f"{model_spec.get(key)!r} in the configuration"
            )


def read_model_spec(directory: Path) -> dict[str, Any]:
    """The model description saved with a checkpoint."""
    return _read_json(directory, "model_spec.json")


def read_position(directory: Path) -> dict[str, Any]:
    """Where training stood when the checkpoint was written (``step``, ``updates`` and what the stage added)."""
    return _read_json(directory, "position.json")


def _read_json(directory: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((directory / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{directory}: not a checkpoint (no {name})") from None
    except ValueError as error:
        raise UserError(f"{directory}/{name}: damaged ({error})") from None


def _sharded_state(
    chunks: list[torch.nn.Module], trainable: TrainableModel | None, *, loading: bool
) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for index, chunk in enumerate(chunks):
        sharded = chunk.sharded_state_dict(prefix=_MODEL_PREFIX)
        state[f"chunk{index}"] = {key: value for key, value in sharded.items() if "_extra_state" not in key}
    if trainable is not None:
        model_state = {key: value for part in state.values() for key, value in part.items()}
        state["optimizer"] = trainable.optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=_METADATA)
    return state


def _save_shards(
    directory: Path, chunks: list[torch.nn.Module], layout: Layout, trainable: TrainableModel | None
) -> None:
    # The saver reports through a queue; the default one lives in a manager process whose start takes seconds, which a
    # save that runs in this process does not need.
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
    with layout.active():
        dist_checkpointing.save(
            _sharded_state(chunks, trainable, loading=False),
            str(directory),
            content_metadata=_METADATA,
            verify_integrity=True,
        )


def _load_weights(chunk: torch.nn.Module, loaded: dict[str, torch.Tensor], directory: Path) -> None:
    weights = {key.removeprefix(_MODEL_PREFIX): value for key, value in loaded.items()}
    missing, unexpected = chunk.load_state_dict(weights, strict=False)
    missing = [key for key in missing if "_extra_state" not in key]
    if missing or unexpected:
        raise UserError(f"{directory}: checkpoint of another model: missing {missing}, unexpected {unexpected}")


def _make_optimizer_state(trainable: TrainableModel) -> None:
    """Give torch's Adam, which makes its state in the first step, a state to load into; TE's and apex's have one."""
    for optimizer in getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer]):
        inner = optimizer.optimizer
        if not isinstance(inner, torch.optim.Adam):
            continue
        for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
            if parameter not in inner.state:
                zeros = [torch.zeros_like(parameter) for _ in range(2)]
                inner.state[parameter] = {"step": torch.tensor(0.0), "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}


def _load_optimizer(trainable: TrainableModel, state: dict[str, Any]) -> None:
    """Megatron 0.19.2 with torch's AdamW (no TE, no apex) keeps ``step`` in the parameter groups of a checkpoint, but
    looks for it among the tensors of each parameter, and then lets all parameters share one counter."""
    optimizers = getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer])
    for optimizer in optimizers:
        original = type(optimizer)._set_main_param_and_optimizer_states.__get__(optimizer)
        optimizer._set_main_param_and_optimizer_states = lambda parameter, tensors, original=original: original(
            parameter, {"step": None, **tensors}
        )
    try:
        trainable.optimizer.load_state_dict(state)
    finally:
        for optimizer in optimizers:
            del optimizer._set_main_param_and_optimizer_states
    for optimizer in optimizers:
        for values in optimizer.optimizer.state.values():
            if isinstance(values.get("step"), torch.Tensor):
                values["step"] = values["step"].clone()


def _fresh_directory(temporary: Path, directory: Path) -> None:
    if directory.exists():
        raise FileExistsError(errno.EEXIST, "already exists")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _finish(temporary: Path, directory: Path, model_spec: dict[str, Any], position: dict[str, Any]) -> None:
    for name, content in (("model_spec.json", model_spec), ("position.json", position)):
        (temporary / name).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for path in [*temporary.iterdir(), temporary]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    os.rename(temporary, directory)


def _everyone(action) -> str | None:
    """Run ``action`` on every rank; the first failure, on whichever rank, as one line on all."""
    problem = None
    try:
        action()
    except (CheckpointingException, CheckpointException, OSError, RuntimeError) as error:
        logging.getLogger(__name__).debug("save failed", exc_info=True)
        problem = _one_line(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((text for text in problems if text is not None), None)


def _on_rank_zero(action) -> str | None:
    return _everyone(action if dist.get_rank() == 0 else lambda: None)


def _one_line(error: BaseException) -> str:
    text = str(error)
    if "No space left" in text or getattr(error, "errno", None) == errno.ENOSPC:
        return "no space left on the disk"
    return text.strip().splitlines()[-1][:300] if text.strip() else type(error).__name__
