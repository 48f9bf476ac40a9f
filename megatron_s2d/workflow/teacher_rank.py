"""One rank of ``s2d serve-teacher``: loads its part of the teacher and answers requests with the other ranks."""

from __future__ import annotations

import secrets
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from megatron_s2d.artifacts.files import json_digest, tree_digest
from megatron_s2d.config.hf_config import is_megatron_checkpoint, published_files
from megatron_s2d.config.teacher_service import ServeTeacherConfig
from megatron_s2d.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from megatron_s2d.errors import UserError
from megatron_s2d.models.hf_checkpoint import HfCheckpoint
from megatron_s2d.parallel.collectives import broadcast_from_rank0
from megatron_s2d.parallel.layout import build_layout, initialize_distributed, seed_everything, shutdown_distributed
from megatron_s2d.stages.model_factory import load_weights
from megatron_s2d.teachers.service.client import read_key
from megatron_s2d.teachers.service.info import PROTOCOL, TeacherInfo
from megatron_s2d.teachers.service.scorer import OUTPUT_BLOCK_ROWS, output_layer
from megatron_s2d.teachers.service.server import TeacherServer, serve
from megatron_s2d.train.megatron_model import MegatronModel
from megatron_s2d.workflow.status import STOP_SIGNALS, RankAddress
from megatron_s2d.workflow.worker import StopOnSignal, capture_outcome, exit_with_runner


def run_teacher_rank(config: ServeTeacherConfig, address: RankAddress, pipe: Connection) -> None:
    """Serve until SIGTERM, or until the process that started this one ends; send the outcome to ``pipe``."""
    exit_with_runner(pipe)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the command, which ends its ranks
    stop = StopOnSignal()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # blocked since the start of this process
    pipe.send(capture_outcome(lambda: _serve(config, address, pipe, stop)))


def _serve(config: ServeTeacherConfig, address: RankAddress, pipe: Connection, stop: StopOnSignal) -> None:
    torch.set_num_threads(config.threads_per_rank or max(1, torch.get_num_threads() // address.world_size))
    initialize_distributed(rank=address.rank, world_size=address.world_size, rendezvous=address.rendezvous)
    seed_everything(0)
    path = config.model.path
    assert path is not None  # the configuration checks it
    model = MegatronModel(
        config.model.resolve(),
        build_layout(config.parallel),
        precision=config.precision,
        max_tokens=config.micro_batch.max_tokens_per_gpu,
        packed=config.micro_batch.sequence_packing,
        options=config.model,
    )
    load_weights(model, path)
    model.freeze()
    digest = broadcast_from_rank0(lambda: weights_digest(path))
    layer = output_layer(model)
    if layer is None:
        serve(model, None, stop)
    else:
        rows, digests = layer
        tokenizer = load_tokenizer(config.tokenizer or str(published_files(path)), address.rendezvous.parent)
        info = TeacherInfo(
            PROTOCOL,
            secrets.token_hex(16),
            digest,
            digests,
            OUTPUT_BLOCK_ROWS,
            model.spec.to_dict(),
            config.precision,
            tokenizer_fingerprint(tokenizer),
            config.max_request_tokens,
        )
        key = read_key(config.api_key_file, "api_key_file")
        text = tokenizer_text(tokenizer)
        server = TeacherServer(info, rows, text, api_key=key, max_waiting=config.max_waiting_requests)
        with server.listening(config.host, config.port):
            pipe.send(f"teacher at http://{config.host}:{server.port}, weights_digest {digest}")
            serve(model, server, stop)
    shutdown_distributed()


def weights_digest(path: Path) -> str:
    """Return the digest of the files with the weights; reads all of them."""
    if is_megatron_checkpoint(path):
        return tree_digest(path)
    return json_digest(HfCheckpoint(path).file_digests())


def tokenizer_text(tokenizer: object) -> str:
    """Return the tokenizer.json; ``UserError`` for a tokenizer that has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("tokenizer: it has no tokenizer.json (a slow tokenizer): clients could not compare theirs")
    text: str = backend.to_str()
    return text
