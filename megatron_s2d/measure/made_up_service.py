"""A served teacher without a server: replies of the right shapes, and an output layer, without values."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.teacher_service import TeacherServiceConfig
from megatron_s2d.data.tokenizer import tokenizer_fingerprint
from megatron_s2d.teachers.service.client import Identity, TeacherClient
from megatron_s2d.teachers.service.info import PROTOCOL, TeacherInfo
from megatron_s2d.teachers.service.wire import ScoreRequest

_NUMPY = {"float32": np.float32, "bfloat16": np.uint16, "int32": np.int32}


class MadeUpTeacherClient(TeacherClient):
    """Answers like a teacher of architecture ``spec`` with the tokens of ``tokenizer``, and asks nobody."""

    def __init__(self, settings: TeacherServiceConfig, where: str, spec: ModelSpec, dtype: str, tokenizer: Any):
        """dtype: float32 or bfloat16, of hidden states and output layer."""
        super().__init__(settings.model_copy(update={"api_key_file": None}), where)
        self._identity = Identity("made up", [])
        self._info = TeacherInfo(
            protocol=PROTOCOL,
            instance="made up",
            weights_digest="",
            output_digests=[],
            output_block_rows=spec.vocab_size,
            spec=dataclasses.asdict(spec),
            dtype=dtype,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            max_request_tokens=1 << 30,
        )

    def connect(self, expected: Identity | None = None) -> None:
        """Do nothing."""

    def score(self, request: ScoreRequest) -> dict[str, np.ndarray]:
        """Return zeros; ids are distinct in a row."""
        info = self.info
        shapes = request.reply_shapes(info.vocab_size, info.hidden_size, info.dtype)
        reply = {name: np.zeros(shape, _NUMPY[kind]) for name, (kind, shape) in shapes.items()}
        if "ids" in reply:
            reply["ids"] += np.arange(reply["ids"].shape[1], dtype=np.int32)
        return reply

    def output_rows(self, start: int, stop: int) -> np.ndarray:
        """Return rows ``start`` to ``stop`` of an output layer of zeros [stop - start, h]."""
        return np.zeros((stop - start, self.info.hidden_size), _NUMPY[self.info.dtype])
