"""What a teacher server says about itself, and how the client tells one teacher from another. No torch here."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from megatron_s2d.artifacts.files import json_digest
from megatron_s2d.teachers.service.wire import ScoreRequest, WireError

PROTOCOL = 1
_NUM_PROBES, _PROBE_TOKENS = 4, 24


@dataclasses.dataclass(frozen=True)
class TeacherInfo:
    """A served teacher; the reply to GET /info."""

    protocol: int
    instance: str  # of this start of the server
    weights_digest: str  # of the files that the weights came from
    output_digests: list[str]  # of the blocks of the output layer in memory
    output_block_rows: int
    spec: dict[str, Any]  # architecture
    dtype: str  # of hidden states and output layer: float32 or bfloat16
    tokenizer_fingerprint: str
    max_request_tokens: int

    @property
    def vocab_size(self) -> int:
        """Size of the output layer, with rows that no token has."""
        return int(self.spec["vocab_size"])

    @property
    def hidden_size(self) -> int:
        return int(self.spec["hidden_size"])

    @property
    def max_positions(self) -> int:
        return int(self.spec["max_position_embeddings"])

    @property
    def weights(self) -> str:
        """Digest of what makes two servers the same teacher: files, output layer in memory, architecture, dtype."""
        return json_digest([self.weights_digest, self.output_digests, self.spec, self.dtype])

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, content: bytes) -> TeacherInfo:
        """Raise ``WireError`` for anything that is no such reply, and for another version of the protocol."""
        try:
            document = json.loads(content)
            info = cls(**{field.name: document[field.name] for field in dataclasses.fields(cls)})
            if min(info.vocab_size, info.hidden_size, info.max_positions, info.output_block_rows) < 1:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise WireError("it is no `s2d serve-teacher`") from None
        if info.protocol != PROTOCOL or info.dtype not in ("float32", "bfloat16"):
            raise WireError(f"it speaks version {info.protocol} of the protocol, this client version {PROTOCOL}")
        return info


def probe_request(vocab_size: int, max_positions: int) -> ScoreRequest:
    """Return fixed sequences whose log-probabilities tell teachers apart."""
    length = min(_PROBE_TOKENS, max_positions)
    rng = np.random.default_rng(17)
    mask = np.ones((_NUM_PROBES, length), dtype=np.uint8)
    mask[:, 0] = 0
    return ScoreRequest(
        "sampled",
        rng.integers(0, vocab_size, _NUM_PROBES * length).astype(np.int32),
        np.full(_NUM_PROBES, length, dtype=np.int32),
        mask.reshape(-1),
        np.ones(_NUM_PROBES, dtype=np.float32),
    )
