"""Servers that do not fit model or stage are refused before the first step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch")

from served_helpers import VOCAB_SIZE, make_engine

from megatron_s2d.config.base import UserError
from megatron_s2d.data.tokenizer import load_tokenizer
from megatron_s2d.rollout.engine import SamplingParams
from megatron_s2d.rollout.served.backend import ServerRequirements

pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer("task:modular_arithmetic", tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": {"is_generation": False}}, "serves embeddings"),
        ({"model": {"architectures": ["LlamaForCausalLM"]}}, "a LlamaForCausalLM, and the model is a Qwen3ForCausalLM"),
        ({"model": {"preferred_sampling_params": {"temperature": 0.6, "min_p": 0.1}}}, r"of its own .*\(min_p\)"),
        ({"info": {"max_req_input_len": 90}}, "sequences of at most 94 tokens, and the stage has some of 100.* 108"),
        ({"info": {"dtype": "bfloat16"}}, "has dtype bfloat16, and the trainer computes in float32"),
        ({"info": {"dtype": "auto", "quantization": "fp8"}}, "has quantization fp8"),
    ],
)
def test_incompatible_server_is_named_before_it_gets_weights(chunks, layout, servers, tmp_path, fields, message):
    for name, value in fields.items():
        setattr(servers[1], name, value)
    with pytest.raises(UserError, match=message) as error:
        make_engine(chunks, layout, tmp_path, servers, requirements=ServerRequirements(max_length=100))
    assert servers[1].url in str(error.value) and "\n" not in str(error.value)
    assert not [path for server in servers for path, _ in server.log if path.startswith("/update")]


@pytest.mark.parametrize("size", [VOCAB_SIZE - 1, VOCAB_SIZE + 1])
def test_server_of_another_vocabulary_is_named(chunks, layout, servers, tmp_path, size):
    servers[0].embedding = np.zeros((size, 4), np.float32)
    with pytest.raises(UserError, match=f"vocabulary of another size than the model's {VOCAB_SIZE}"):
        make_engine(chunks, layout, tmp_path, servers)


def test_precision_may_differ_with_an_explicit_tolerance(chunks, layout, servers, tmp_path):
    servers[0].info = {"dtype": "bfloat16"}
    make_engine(chunks, layout, tmp_path, servers, weight_check_tolerance=0.1)


class OtherTokenizer:
    """``tokenizer`` with the ids of two tokens swapped."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text):
        return {"input_ids": [{9: 10, 10: 9}.get(token, token) for token in self.tokenizer(text)["input_ids"]]}


def test_tokenizer_and_template_are_compared(chunks, layout, servers, tmp_path, tokenizer):
    for server in servers:
        server.tokenizer, server.template = tokenizer, ""
    requirements = ServerRequirements(params=SamplingParams(4, (1,), stop_strings=("7 8",)))
    make_engine(chunks, layout, tmp_path, servers, requirements, tokenizer).close()
    servers[1].template = "3 "
    with pytest.raises(UserError, match="another chat template"):
        make_engine(chunks, layout, tmp_path, servers, requirements, tokenizer)
    servers[1].template, servers[1].tokenizer = None, OtherTokenizer(tokenizer)
    with pytest.raises(UserError, match=r"another tokenizer .*'7 8' is \[10, 9\] there and \[9, 10\] here"):
        make_engine(chunks, layout, tmp_path, servers, requirements, tokenizer)
    servers[1].tokenizer = None
    with pytest.raises(UserError, match="no tokenizer, which stop strings need"):
        make_engine(chunks, layout, tmp_path, servers, requirements, tokenizer)


def test_temperature_is_checked_before_the_first_step(chunks, layout, servers, tmp_path):
    requirements = ServerRequirements(params=SamplingParams(6, (3,), temperature=0.7))
    make_engine(chunks, layout, tmp_path, servers, requirements).close()
    servers[1].original_log_probs = True
    for tolerance in (None, 50.0):  # even with a wide one
        with pytest.raises(UserError, match="at temperature 0.7 .*those of temperature 1") as error:
            make_engine(chunks, layout, tmp_path, servers, requirements, weight_check_tolerance=tolerance)
        assert servers[1].url in str(error.value)
    # At temperature 1 both are the same.
    make_engine(chunks, layout, tmp_path, servers, ServerRequirements(params=SamplingParams(6, (3,)))).close()


def test_limits_of_a_teacher_server_are_checked_before_the_first_step(chunks, layout, servers, tmp_path):
    requirements = ServerRequirements(max_length=60, top_k=8)
    make_engine(chunks, layout, tmp_path, servers, requirements).close()
    servers[0].cap = 7
    with pytest.raises(UserError, match="60 tokens, with the 8 likeliest at each, and did not: .* 7 likeliest tokens"):
        make_engine(chunks, layout, tmp_path, servers, requirements)
    servers[0].cap, servers[0].longest = None, 59
    for top_k in (0, 8):
        with pytest.raises(UserError, match="sequences of 60 tokens.* longer than the model's context") as error:
            make_engine(chunks, layout, tmp_path, servers, dataclasses.replace(requirements, top_k=top_k))
    assert servers[0].url in str(error.value)
