"""What SGLang returns as hidden states of a prompt: final-norm states, which with the output layer give its logits.

Documented in docs/teachers.md: exact KL from an SGLang server would be possible, at the price of JSON and of its prefix
cache. Skipped if sglang is not installed.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed (extra `sglang`)"),
]

torch = pytest.importorskip("torch")

import requests
from sglang_model import VOCAB_SIZE, make_engine

from megatron_s2d.records import Sample


def sample(token_ids: np.ndarray) -> Sample:
    mask = np.arange(len(token_ids)) > 0
    return Sample("a", "a", "a", "math", 0, token_ids, mask, 1.0, "data")


def test_prompt_hidden_states_are_those_behind_the_final_norm(policy, tokenizer, tmp_path):
    engine = make_engine(policy, tokenizer, tmp_path, extra_args=["--enable-return-hidden-states"])
    try:
        token_ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, 20)
        key = (engine._server_group.directory / "api-key").read_text().strip()

        def ask() -> tuple[torch.Tensor, int]:
            body = {
                "input_ids": token_ids.tolist(),
                "sampling_params": {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True},
                "return_hidden_states": True,
            }
            headers = {"Authorization": f"Bearer {key}"}
            reply = requests.post(f"{engine.urls[0]}/generate", json=body, headers=headers, timeout=300)
            states = reply.json()["meta_info"]["hidden_states"]
            return torch.tensor(states[0]), len(reply.content)

        hidden, num_bytes = ask()
        (expected,) = policy.score_replicated([sample(token_ids)])
        log_probs = torch.log_softmax(hidden.double() @ policy.output_weight.detach().double().t(), 1)
        found = log_probs[:-1].gather(1, torch.from_numpy(token_ids[1:, None])).squeeze(1).numpy()
        print(
            f"largest difference {np.abs(found - expected[1:]).max():.1e} nats, "
            f"{num_bytes / len(token_ids):.0f} bytes a token of {hidden.shape[1]} numbers"
        )
        assert found == pytest.approx(expected[1:], abs=1e-4)
        # What the prefix cache holds is not returned again: the second reply lacks most positions.
        again, _ = ask()
        print(f"{len(hidden)} positions at first, {len(again)} with the prompt in the prefix cache")
        assert len(hidden) == len(token_ids) and len(again) < len(hidden)
    finally:
        engine.close()
