"""What a real SGLang server returns as hidden states: the states that enter the output layer, after the final norm."""

from __future__ import annotations

import importlib.util

import httpx
import numpy as np
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed (extra `sglang`)"),
]

torch = pytest.importorskip("torch")

from sglang_model import SPEC, VOCAB_SIZE, change, make_engine

from megatron_s2d.models.weights import export_buckets
from megatron_s2d.records import Sample
from megatron_s2d.rollout.sglang.api_key import authorization, read_api_key

LENGTH = 24


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_states_of_a_prompt_with_the_output_layer_are_the_teacher_s_distribution(policy, tokenizer, tmp_path):
    """In float64 from the server's states and our output layer: the log-probabilities of server and trainer."""
    change(policy, 0.05)  # so that no norm has weights of one
    engine = make_engine(policy, tokenizer, tmp_path, extra_args=["--enable-return-hidden-states"])
    try:
        tokens = np.random.default_rng(4).integers(0, VOCAB_SIZE, LENGTH)
        body = {
            "input_ids": tokens.tolist(), "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True, "logprob_start_len": 0, "return_hidden_states": True,
        }  # fmt: skip
        headers = authorization(read_api_key(engine._server_group.directory / "api-key"))
        reply = httpx.post(f"{engine.urls[0]}/generate", json=body, headers=headers, timeout=300).json()["meta_info"]
    finally:
        engine.close()
    states = np.array(reply["hidden_states"][0], dtype=np.float64)
    weights = {
        name: tensor.double().numpy()
        for bucket in export_buckets(policy.chunks, SPEC, policy.layout, bucket_bytes=1 << 30)
        for name, tensor in bucket
    }
    norm, output = weights["model.norm.weight"], weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    assert states.shape == (LENGTH, SPEC.hidden_size)
    rms = np.sqrt(np.mean((states / norm) ** 2, axis=1))
    assert np.abs(rms - 1).max() < 1e-4, f"states before the norm have a root mean square of {rms}"
    log_probs = log_softmax(states @ output.T)[np.arange(LENGTH - 1), tokens[1:]]
    of_server = np.array([value for value, *_ in reply["input_token_logprobs"][1:]])
    sample = Sample(
        id="s", prompt_id="s", group_id="s", domain="d", seed=0, token_ids=tokens,
        response_mask=np.arange(LENGTH) > 0, temperature=1.0, finish_reason="length",
    )  # fmt: skip
    (of_trainer,) = policy.score_replicated([sample])
    differences = np.abs(log_probs - of_server).max(), np.abs(log_probs - of_trainer[1:]).max()
    print(f"largest differences in nats: to the server {differences[0]:.1e}, to the trainer {differences[1]:.1e}")
    assert max(differences) < 1e-4 and np.ptp(log_probs) > 1
