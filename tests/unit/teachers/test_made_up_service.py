"""A served teacher in a measurement: answers of the right shapes, and no server is asked."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.teacher_service import TeacherServiceConfig
from megatron_s2d.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from megatron_s2d.measure.made_up_service import MadeUpTeacherClient
from megatron_s2d.teachers.service.wire import ScoreRequest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("payload", "source"), [
    ("sampled", "teacher"), ("hidden", "teacher"), ("top_k", "teacher"), ("top_k", "student"), ("top_k", "union"),
])  # fmt: skip
def test_a_made_up_teacher_answers_every_request_without_a_server(tmp_path, dtype, payload, source):
    """The key's file does not exist and the port is closed."""
    spec = ModelConfig(preset="tiny-student").resolve(25)
    tokenizer = load_tokenizer("task:modular_arithmetic", tmp_path)
    settings = TeacherServiceConfig(url="http://127.0.0.1:9", api_key_file=tmp_path / "missing", max_attempts=1)
    client = MadeUpTeacherClient(settings, "stages.opd.teacher_service", spec, dtype, tokenizer)
    client.connect()
    ids = np.zeros((4, 3), dtype=np.int32) if source != "teacher" else None
    mask = np.array([0, 1, 1, 0, 1, 1], dtype=np.uint8)
    lengths, temperatures = np.array([3, 3], dtype=np.int32), np.ones(2, dtype=np.float32)
    request = ScoreRequest(payload, np.zeros(6, np.int32), lengths, mask, temperatures, 3, source, ids)
    request.check_reply(client.score(request), spec.vocab_size, spec.hidden_size, dtype)
    assert client.output_rows(3, 9).shape == (6, spec.hidden_size) and client.identity.weights
    assert client.info.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
