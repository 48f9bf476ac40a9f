"""The contract of engines by request, and a weight update in the middle of episodes, with a real SGLang server."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed (extra `sglang`)"),
    pytest.mark.slow,  # starts a server of its own
]

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "rollout"))

import engine_contract as contract
from s2d import metrics, s2d
from sglang_model import VOCAB_SIZE, change

from megatron_s2d.rollout.engine import SamplingParams


def likely_token(policy, prompts) -> int:
    """Return the token that follows 10 % of the prompts' tokens: the server draws as it likes, and both ends occur."""
    with torch.no_grad():
        logits = [policy.chunks[0](torch.from_numpy(tokens)[None], None, None)[0, :, :VOCAB_SIZE] for tokens in prompts]
    return int((torch.softmax(torch.cat(logits), dim=-1).mean(dim=0) - 0.1).abs().argmin())


def subject_of(policy, engine) -> contract.Subject:
    """The engine with the trainer's scores, of older weights too."""
    states: dict[int, dict] = {}

    def state() -> dict:
        return {name: value.clone() for name, value in policy.chunks[0].state_dict().items() if value is not None}

    def score(version, token_ids, temperature):
        now = state()
        policy.chunks[0].load_state_dict(states.get(version, now), strict=False)
        with torch.no_grad():
            logits = policy.chunks[0](torch.from_numpy(token_ids)[None], None, None)[0, :, :VOCAB_SIZE].double()
        policy.chunks[0].load_state_dict(now, strict=False)
        log_probs = torch.log_softmax(logits / temperature, dim=-1)
        values = log_probs[:-1].gather(1, torch.from_numpy(token_ids)[1:, None]).squeeze(1)
        return np.concatenate([[0.0], values.numpy()])

    subject = contract.Subject(engine, score, VOCAB_SIZE, -1, tolerance=1e-4, seeds_count=False, num_requests=24)
    subject.stop_id = likely_token(policy, contract.prompts_of(subject))

    def update() -> int:
        version = engine.version
        states[version] = state()
        change(policy, 0.02)
        engine.update_weights(policy.chunks, version + 1)
        return version + 1

    subject.update = update
    return subject


@pytest.mark.parametrize("check", ["log_probs_and_ends", "seeds", "turns", "abort", "errors"])
def test_sglang_keeps_the_contract(policy, attach, check):
    getattr(contract, f"check_{check}")(subject_of(policy, attach()))


def test_tokens_carry_the_version_of_their_weights(policy, attach):
    subject = subject_of(policy, attach())
    contract.check_versions(subject, subject.update)


def test_a_push_in_the_middle_of_an_episode_splits_a_completion(policy, attach):
    subject = subject_of(policy, attach())
    params, second_turn = SamplingParams(150, ()), threading.Event()

    def conversation(number: int):
        async def episode(client):
            tokens, turns = contract.prompts_of(subject)[number], []
            for turn in range(2):
                if turn:
                    second_turn.set()
                completion = await client.sample(tokens, params, seed=number, request_id=f"e{number}.{turn}")
                turns.append((tokens, completion))
                tokens = np.concatenate([tokens, completion.token_ids, [2]])
            return turns

        return episode

    subject.engine.start({str(number): conversation(number) for number in range(4)})
    assert second_turn.wait(300)
    subject.engine.pause(interrupt=True)
    version = subject.update()
    spans = set()
    for (_, first), (tokens, second) in subject.engine.wait(lambda ended: len(ended) == 4).values():
        contract.check_record(subject, tokens, second, params)
        assert {span.version for span in first.weight_versions} <= {version - 1, version}
        spans.add(tuple(span.version for span in second.weight_versions))
    assert (version - 1, version) in spans, spans


def test_a_run_trains_on_episodes_with_a_calculator(url, key_file, tmp_path):
    """Updates interrupt episodes, which go on: over-sampled, up to two steps old."""
    config = yaml.safe_load(Path(__file__).with_name("async_tools.yaml").read_text())
    config["rollout"] |= {
        "async_mode": "partial_rollout", "sglang": {"urls": {"student": [url]}, "api_key_file": str(key_file)},
    }  # fmt: skip
    config["stages"]["base"]["steps"] = 60
    config["stages"]["grpo"]["steps"] = 5
    (tmp_path / "tools.yaml").write_text(yaml.safe_dump(config))
    finished = s2d("run", tmp_path / "tools.yaml", "--out", tmp_path / "run")
    assert finished.returncode == 0, finished.stderr
    rows = metrics(tmp_path / "run", "stages/grpo")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and max(row["num_turns_max"] for row in rows) > 1
    assert max(row["rollout/staleness_max"] for row in rows) in (1, 2) and rows[0]["policy_lag_max"] == 0
    rollouts = [json.loads(line) for line in (tmp_path / "run/stages/grpo/rollouts.jsonl").read_text().splitlines()]
    episodes = [[part["role"] for part in row["episode"]] for row in rollouts if "episode" in row]
    assert episodes and all(roles[:3] == ["model", "environment", "model"] for roles in episodes)
