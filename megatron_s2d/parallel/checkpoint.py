"""Megatron distributed checkpoints of weights, optimizer state and trainer state, loadable at any layout.

A checkpoint is a directory that is renamed into place when all of it is on disk, so a killed or failed save leaves the
previous checkpoint intact. Files: Megatron's ``dist_checkpointing`` shards with their SHA-256 manifest,
``model_spec.json`` (the model's dimensions) and ``trainer_state.json`` (steps and updates so far). Loading runs no
pickled code: see ``safe_load``; Megatron loads its common part with ``weights_only``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_s2d.parallel.plain_functions  # noqa: F401

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megatron_s2d.artifacts.files import file_digest, rename
from megatron_s2d.errors import UserError
from megatron_s2d.parallel.collectives import any_rank, broadcast_from_rank0, first_error, gather_json_on_rank0
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.parallel.manifest import MANIFEST_NAME, DamagedCheckpoint, check_manifest, read_json_object
from megatron_s2d.parallel.optimizer_state import read_in_place
from megatron_s2d.parallel.safe_load import no_pickled_code, read_metadata
from megatron_s2d.parallel.trainable_model import TrainableModel

# Optimizer state is saved parameter by parameter, so it follows the weights to any layout.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
_MODEL_PREFIX = "model."
_ADAPTER_PREFIX = _MODEL_PREFIX + "adapter."
_NEARLY_FULL_BYTES = 1 << 20
_VISIBLE_SECONDS = 90.0
_INITIAL_VALUES = "_high_precision_init_val"  # of parameters in FP8: Transformer Engine 2.19.0


def start_saving(
    directory: Path,
    chunks: list[torch.nn.Module],
    layout: Layout,
    *,
    model_spec: dict[str, Any],
    trainer_state: dict[str, Any],
    trainable: TrainableModel | None = None,
    async_save: bool = False,
) -> CheckpointSave:
    """Start to save a checkpoint to ``directory``, which must not exist until ``finish`` creates it. Collective.

    chunks: the model without DDP wrappers. trainable: adds the optimizer state. async_save: a thread writes a copy of
    the current state while training continues; otherwise the files are written when this returns. Raises ``UserError``,
    here or from ``finish``, if the disk is full or not writable; then ``directory`` does not exist and earlier
    checkpoints are intact.
    """
    saving = CheckpointSave(directory, model_spec, trainer_state)
    saving.start(chunks, layout, trainable, async_save)
    return saving


class CheckpointSave:
    """A checkpoint that is being written; at most one at a time in a process."""

    def __init__(self, directory: Path, model_spec: dict[str, Any], trainer_state: dict[str, Any]):
        self._directory, self._model_spec, self._trainer_state = directory, model_spec, trainer_state
        self._temporary = directory.with_name(directory.name + ".partial")
        self._request: AsyncRequest | None = None
        self._arguments: list[Any] = []  # of the request's function
        self._digests: dict[str, str] = {}  # of the files that this rank has written, by name
        self._failure: str | None = None  # of this rank
        self._thread: threading.Thread | None = None

    def start(
        self,
        chunks: list[torch.nn.Module],
        layout: Layout,
        trainable: TrainableModel | None,
        async_save: bool,
    ) -> None:
        """Plan which rank writes what, and write it or start the thread that does; collective."""
        failure = _on_rank_zero(lambda: _fresh_directory(self._temporary, self._directory))
        if failure is None:
            failure = _on_all_ranks(lambda: self._prepare(chunks, layout, trainable, async_save))
        if failure is not None:
            self._abort(failure)
        if async_save:
            self._thread = threading.Thread(target=self._write_in_thread, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write()

    def is_written(self) -> bool:
        """Return whether all ranks have written their files, so that ``finish`` does not wait. Collective."""
        return not any_rank(self._thread is not None and self._thread.is_alive())

    def finish(self) -> None:
        """Wait for the files, then rename the checkpoint into place; collective. Raises as ``start_saving``."""
        if self._thread is not None:
            self._thread.join()
        failure = first_error(self._failure)
        if failure is None:
            failure = _on_all_ranks(self._finalize)
        if failure is None:
            by_rank = gather_json_on_rank0(self._digests)
            digests = {name: digest for of_rank in by_rank for name, digest in of_rank.items()}
            failure = _on_rank_zero(
                lambda: _publish(self._temporary, self._directory, self._model_spec, self._trainer_state, digests)
            )
        if failure is not None:
            self._abort(failure)

    def _prepare(
        self, chunks: list[torch.nn.Module], layout: Layout, trainable: TrainableModel | None, async_save: bool
    ) -> None:
        # The writer reports through a queue. The default queue belongs to a manager process, which takes seconds to
        # start and which a writer in this process does not need.
        if filesystem_async._results_queue is None:
            filesystem_async._results_queue = queue.Queue()
        with layout.active():
            state = _sharded_state(chunks, trainable, loading=False)
            if async_save:
                _copy_live_tensors(state)
            self._request = dist_checkpointing.save(
                state,
                str(self._temporary),
                content_metadata=_METADATA,
                async_sharded_save=True,
                async_strategy="mcore",
            )
            self._arguments = list(self._request.async_fn_args)
            if self._request.preload_fn is not None:
                self._arguments[1] = self._request.preload_fn()  # off the GPU

    def _write(self) -> None:
        if self._request.async_fn is not None:
            self._failure = _failure_of(self._write_files)

    def _write_files(self) -> None:
        """Write the files of this rank and compute their digests.

        Megatron's own digests are computed by rank 0, which would read the checkpoint of all ranks while they wait.
        """
        paths = [Path(path) for path, _, _ in self._arguments[1]]
        self._request.async_fn(*self._arguments, **self._request.async_fn_kwargs)
        # Of a file that could not be written Megatron reports the failure when it finalizes.
        self._digests = {path.name: file_digest(path) for path in paths if path.is_file()}

    def _write_in_thread(self) -> None:
        try:
            self._write()
        except Exception as error:  # the boundary of a thread: ``finish`` reports it on every rank
            self._failure = f"{type(error).__name__}: {_one_line(error)}"

    def _finalize(self) -> None:
        for function in self._request.finalize_fns:
            function()

    def _abort(self, failure: str) -> None:
        if shutil.disk_usage(self._directory.parent).free < _NEARLY_FULL_BYTES:
            failure = "no space left on the disk"  # torch's writer reports this in several ways
        _on_rank_zero(lambda: shutil.rmtree(self._temporary, ignore_errors=True))
        raise UserError(f"{self._directory}: checkpoint not saved ({failure}); earlier checkpoints are intact")


def _copy_live_tensors(state: dict[str, Any]) -> None:
    """Copy tensors on the CPU, which training would change during the save; GPU tensors are copied off before."""
    for leaf in nested_values(state):
        if isinstance(leaf, (ShardedTensor, ShardedTensorFactory)) and leaf.data.device.type == "cpu":
            leaf.data = leaf.data.clone()


def load_checkpoint(
    directory: Path,
    chunks: list[torch.nn.Module],
    layout: Layout,
    *,
    model_spec: dict[str, Any],
    trainable: TrainableModel | None = None,
) -> dict[str, Any]:
    """Load weights (and optimizer state into ``trainable``) and return the saved trainer state; collective.

    Raises ``UserError`` if the checkpoint is missing, damaged or of another model, naming the first field that differs.
    """
    trainer_state = _verified_trainer_state(directory, model_spec)
    if trainable is not None:
        _init_optimizer_state(trainable)
    try:
        with layout.active():
            state = _sharded_state(chunks, trainable, loading=True)
            # Weights may be loaded without the optimizer state that the checkpoint also has.
            strict = StrictHandling.RAISE_ALL if trainable is not None else StrictHandling.RAISE_UNEXPECTED
            with no_pickled_code():
                loaded = dist_checkpointing.load(state, str(directory), strict=strict)
    except (CheckpointingException, CheckpointException, OSError, RuntimeError) as error:
        raise DamagedCheckpoint(f"{directory}: not a usable checkpoint ({_one_line(error)})") from error
    with layout.active():
        for index, chunk in enumerate(chunks):
            _load_weights(chunk, loaded[f"chunk{index}"], directory)
        if trainable is not None:
            _load_optimizer(trainable, loaded["optimizer"])
    if trainable is not None:
        trainable.set_scheduler_step(trainer_state["updates"])
    return trainer_state


def _verified_trainer_state(directory: Path, model_spec: dict[str, Any]) -> dict[str, Any]:
    """Compare all files with their digests and return the trainer state; the first error of a rank is that of all."""
    _wait_until_visible(directory)
    trainer_state: dict[str, Any] = {}

    def read() -> None:
        nonlocal trainer_state
        check_checkpoint(directory, model_spec)
        trainer_state = read_trainer_state(directory)
        _check_own_share(directory)

    _agree(directory, read)
    _agree(directory, lambda: read_metadata(directory))  # not before the ranks have compared all files
    return trainer_state


def _check_own_share(directory: Path) -> None:
    """Compare the files that this rank reads with their digests; every file is read by one rank."""
    digests = check_manifest(directory)
    for name in sorted(digests)[dist.get_rank() :: dist.get_world_size()]:
        try:
            found = file_digest(directory / name)
        except UserError as error:
            raise DamagedCheckpoint(str(error)) from None
        if found != digests[name]:
            raise DamagedCheckpoint(f"{directory}: not a usable checkpoint ({name} does not match its digest)")


def _agree(directory: Path, action: Callable[[], object]) -> None:
    """Run ``action``, and raise the first error of a rank on all of them."""
    damage, refusal = None, None
    try:
        action()
    except (CheckpointingException, OSError) as error:
        damage = f"{directory}: not a usable checkpoint ({_one_line(error)})"
    except DamagedCheckpoint as error:
        damage = str(error)
    except UserError as error:
        refusal = str(error)
    if (message := first_error(refusal)) is not None:
        raise UserError(message)
    if (message := first_error(damage)) is not None:
        raise DamagedCheckpoint(message)


def _wait_until_visible(directory: Path) -> None:
    """Wait for a checkpoint that rank 0 sees: NFS clients remember for up to a minute that a name did not exist."""
    if not broadcast_from_rank0(directory.is_dir):
        return
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not (directory / MANIFEST_NAME).is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
        os.listdir(directory.parent)  # makes the client look again


def check_checkpoint(directory: Path, model_spec: dict[str, Any]) -> None:
    """Raise ``UserError`` if ``directory`` is not a checkpoint of the model that ``model_spec`` describes."""
    saved = read_model_spec(directory)
    for key in sorted(set(saved) | set(model_spec)):
        if saved.get(key) != model_spec.get(key):
            raise UserError(
                f"{directory}: checkpoint of another model: {key} is {saved.get(key)!r} there and "
                f"{model_spec.get(key)!r} in the configuration"
            )


def read_model_spec(directory: Path) -> dict[str, Any]:
    """Return the model spec saved with a checkpoint."""
    return read_json_object(directory, "model_spec.json")


def read_trainer_state(directory: Path) -> dict[str, Any]:
    """Return the saved trainer state: ``step``, ``updates`` (of the optimizer) and the stage's ``StepData.state``."""
    return read_json_object(directory, "trainer_state.json")


def _sharded_state(chunks: list[torch.nn.Module], trainable: TrainableModel | None, *, loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for index, chunk in enumerate(chunks):
        sharded = chunk.sharded_state_dict(prefix=_MODEL_PREFIX)
        # With the optimizer the state of training: of a model with a LoRA adapter (models/lora.py) that is all. Without
        # it the weights, which the adapter is merged into.
        has_adapter = hasattr(chunk, "adapter")
        state[f"chunk{index}"] = {
            key: value
            for key, value in sharded.items()
            if "_extra_state" not in key
            and (not has_adapter or key.startswith(_ADAPTER_PREFIX) == (trainable is not None))
        }
    if trainable is not None:
        # Not merged: chunks have equal local names.
        with contextlib.nullcontext() if loading else read_in_place(trainable.optimizer):
            state["optimizer"] = trainable.optimizer.sharded_state_dict(
                dict(state), is_loading=loading, metadata=_METADATA
            )
    return state


def _load_weights(chunk: torch.nn.Module, loaded: dict[str, torch.Tensor], directory: Path) -> None:
    weights = {key.removeprefix(_MODEL_PREFIX): value for key, value in loaded.items()}
    missing, unexpected = chunk.load_state_dict(weights, strict=False)
    missing = [key for key in missing if "_extra_state" not in key]
    if hasattr(chunk, "adapter"):  # a checkpoint has the adapter or the weights beside it, and all of either
        has_adapter = any(key.startswith("adapter.") for key in weights)
        missing = [key for key in missing if key.startswith("adapter.") == has_adapter]
    if missing or unexpected:
        raise UserError(f"{directory}: checkpoint of another model: missing {missing}, unexpected {unexpected}")
    for name, parameter in chunk.named_parameters():
        if hasattr(parameter, _INITIAL_VALUES):
            set_high_precision_init_val(parameter, weights[name])


def set_high_precision_init_val(parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
    """Start the float32 master of an FP8 parameter from ``values`` instead of their FP8 rounding.

    Transformer Engine stores the values that it initialised such a parameter with, for the optimizer to read once;
    weights that are loaded later must replace them. No-op for other parameters.
    """
    if hasattr(parameter, _INITIAL_VALUES):
        setattr(parameter, _INITIAL_VALUES, values.detach().to("cpu", parameter.dtype))


def _init_optimizer_state(trainable: TrainableModel) -> None:
    """Create the state of torch's Adam, which otherwise does not exist before the first step; TE and apex have one."""
    for optimizer in getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer]):
        inner = optimizer.optimizer
        if not isinstance(inner, torch.optim.Adam):
            continue
        for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
            if parameter not in inner.state:
                zeros = [torch.zeros_like(parameter) for _ in range(2)]
                inner.state[parameter] = {"step": torch.tensor(0.0), "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}


def _load_optimizer(trainable: TrainableModel, state: dict[str, Any]) -> None:
    """Load the optimizer state, around a defect of Megatron 0.19.2 with torch's AdamW (without TE and apex).

    It saves ``step`` in the parameter groups, but loads it from the tensors of each parameter, and then lets all
    parameters share one counter.
    """
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


def _publish(
    temporary: Path,
    directory: Path,
    model_spec: dict[str, Any],
    trainer_state: dict[str, Any],
    digests: dict[str, str],
) -> None:
    """Write the manifest and rename the checkpoint into place. digests: of the files that ranks wrote, by name."""
    for name, content in (("model_spec.json", model_spec), ("trainer_state.json", trainer_state)):
        (temporary / name).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    own = [path for path in temporary.iterdir() if path.is_file() and path.name not in digests]
    files = dict(sorted((digests | {path.name: file_digest(path) for path in own}).items()))
    manifest = temporary / MANIFEST_NAME
    manifest.write_text(json.dumps({"algorithm": "sha256", "files": files}, indent=1) + "\n", encoding="utf-8")
    for path in [*own, manifest, temporary]:  # the other files are on the disk: Megatron's writers wait for it
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    rename(temporary, directory)


def _on_all_ranks(action: Callable[[], object]) -> str | None:
    """Run ``action`` on every rank; return the first failure of any rank, in one line, on all ranks."""
    return first_error(_failure_of(action))


def _failure_of(action: Callable[[], object]) -> str | None:
    try:
        action()
    except (CheckpointingException, CheckpointException, OSError, RuntimeError, MemoryError, UserError) as error:
        logging.getLogger(__name__).debug("save failed", exc_info=True)
        return _one_line(error)
    return None


def _on_rank_zero(action: Callable[[], object]) -> str | None:
    return _on_all_ranks(action if dist.get_rank() == 0 else lambda: None)


def _one_line(error: BaseException) -> str:
    text = str(error)
    if "No space left" in text or getattr(error, "errno", None) == errno.ENOSPC:
        return "no space left on the disk"
    return text.strip().splitlines()[-1][:300] if text.strip() else type(error).__name__
