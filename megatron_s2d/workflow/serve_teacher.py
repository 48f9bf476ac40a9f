"""``s2d serve-teacher``: starts one process for each rank of a teacher, and ends all when one ends. No torch here."""

from __future__ import annotations

import ipaddress
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from megatron_s2d.config.base import apply_overrides, parse
from megatron_s2d.config.hf_config import published_files
from megatron_s2d.config.teacher_service import ServeTeacherConfig
from megatron_s2d.config.yaml_file import load_yaml
from megatron_s2d.data.model_tokenizers import has_tokenizer
from megatron_s2d.errors import UserError
from megatron_s2d.models.families import check_layout
from megatron_s2d.parallel.cuda_variables import set_cuda_variables
from megatron_s2d.workflow.process_pool import Scratch, num_gpus, stop_signals_blocked
from megatron_s2d.workflow.status import JobOutcome, RankAddress


def load_serve_config(path: Path | None, model: Path | None, overrides: list[str]) -> ServeTeacherConfig:
    """Return the settings of a file, of a model's directory alone, or of both; one-line ``UserError`` for mistakes."""
    document: dict[str, Any] = {} if path is None else load_yaml(path)
    if model is not None:
        document = {**document, "model": {"path": str(model)}}
    if path is None and model is None:
        raise UserError("serve-teacher: name a CONFIG file, or a model's directory with --model DIR")
    config = parse(ServeTeacherConfig, apply_overrides(document, overrides), str(path or "--model"))
    check_serve_config(config)
    return config


def check_serve_config(config: ServeTeacherConfig) -> None:
    """Raise ``UserError`` for what can be seen without loading the model."""
    path = config.model.path
    assert path is not None  # the configuration checks it
    if not path.is_dir():
        raise UserError(f"model.path: {path}: no such directory")
    check_layout(config.model.resolve(), config.parallel)
    if config.tokenizer is None and not has_tokenizer(published_files(path)):
        raise UserError(f"model.path: {path} has no tokenizer, with which clients compare theirs: set `tokenizer`")
    if config.api_key_file is None and not _is_loopback(config.host):
        raise UserError(
            f"host: {config.host} is reached by other machines: whoever reaches it could use the teacher and read its "
            "output layer; name a file with a key in api_key_file"
        )
    gpus = num_gpus()
    if 0 < gpus < config.parallel.world_size:
        raise UserError(f"parallel: the teacher needs {config.parallel.world_size} GPUs, this machine has {gpus}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run_server(config: ServeTeacherConfig, announce: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; ``UserError`` if a rank ends otherwise. announce: gets lines for the user."""
    world_size = config.parallel.world_size
    context = multiprocessing.get_context("spawn" if num_gpus() else "forkserver")
    if not num_gpus():
        context.set_forkserver_preload(["megatron_s2d.workflow.preload"])
    scratch, processes, pipes = Scratch(1), [], []
    handlers = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            address = RankAddress(rank, world_size, scratch.rendezvous)
            process = context.Process(target=_run_rank, args=(config, address, sender), daemon=True)
            with stop_signals_blocked():
                process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        outcome = _watch(pipes, announce)
    except KeyboardInterrupt:
        outcome = None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _end(processes)
        scratch.release()
    if outcome is not None and outcome.status != "finished":
        raise UserError(f"the teacher's server ended: {outcome.message}")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _watch(pipes: list[Connection], announce: Callable[[str], None]) -> JobOutcome:
    """Pass on the lines that ranks send, until one ends; return how it ended."""
    while True:
        for pipe in wait(pipes):
            try:
                message = pipe.recv()  # type: ignore[union-attr]  # only connections are waited for
            except EOFError:
                return JobOutcome("crash", "a rank process was killed (out of memory?)")
            if isinstance(message, JobOutcome):
                return message
            announce(message)


def _end(processes: list[Any]) -> None:
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def _run_rank(config: ServeTeacherConfig, address: RankAddress, pipe: Connection) -> None:
    set_cuda_variables([config.parallel], shares_memory=False)  # before the imports
    # Imported in the rank's process: the command itself loads no torch.
    import megatron_s2d.workflow.preload  # noqa: F401
    from megatron_s2d.workflow.teacher_rank import run_teacher_rank

    run_teacher_rank(config, address, pipe)
