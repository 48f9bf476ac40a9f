"""Stand-ins for models and the rollout buffer, so that a stage's source runs on one process without a model."""

from __future__ import annotations

import types

import numpy as np
import pytest
from toy_models import LAYOUT, ToyModel, ToyWorkflow

from megatron_s2d.parallel.layout import initialize_distributed
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.rollout.buffer import Batch

PROMPT_LENGTH = 2


class Scorer:
    """A model that scores token i of sample ``id`` at ``values[id] + i / 100``; entropies are twice that."""

    layout = LAYOUT

    def __init__(self, values: dict[str, float]):
        self.values = values

    def score(self, samples, output="log_probs", *, holders=None):
        scores = []
        for sample in samples:
            response = self.values[sample.id] + np.arange(sample.response_length, dtype=np.float32) / 100
            score = np.zeros(len(sample.token_ids), dtype=np.float32)
            score[sample.response_mask] = response if output == "log_probs" else 2 * response
            scores.append(score)
        return scores


class Buffer:
    """Returns the same samples at every step."""

    def __init__(self, samples, loader=None, worker=None):
        tokenizer = types.SimpleNamespace(decode=lambda ids, **_: "text")
        self.samples, self.loader = samples, loader
        self.worker = worker or types.SimpleNamespace()
        self.worker.tokenizer, self.worker.layout = tokenizer, LAYOUT
        self.train_batch_size = len({sample.prompt_id for sample in samples})

    def next_batch(self, step):
        prompts = [make_prompt(id_) for id_ in dict.fromkeys(sample.prompt_id for sample in self.samples)]
        return Batch(prompts, list(self.samples), list(self.samples))

    def state(self):
        return {}


def make_prompt(id_: str, domain: str = "math") -> Prompt:
    return Prompt(id_, np.arange(PROMPT_LENGTH), f"text of {id_}", domain, "math", "1")


def make_sample(id_: str, length: int, *, group: int = 0, reward: float | None = None, reason: str = "stop") -> Sample:
    """A sample of prompt ``p<group>`` with a response of ``length`` tokens."""
    size = PROMPT_LENGTH + length
    return Sample(
        id=id_,
        prompt_id=f"p{group}",
        group_id=f"p{group}@1.0",
        domain="math",
        seed=0,
        token_ids=np.arange(size),
        response_mask=np.arange(size) >= PROMPT_LENGTH,
        temperature=1.0,
        finish_reason=reason,
        reward=reward,
        verifier_label=None if reward is None else "correct" if reward == 1.0 else "wrong",
    )


@pytest.fixture
def fakes():
    return types.SimpleNamespace(Scorer=Scorer, Buffer=Buffer, prompt=make_prompt, sample=make_sample)


@pytest.fixture(scope="session")
def _tokenizer_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture
def workflow(tmp_path, _tokenizer_cache):
    """Toy models as finished stages, and a function to run a stage after them."""
    initialize_distributed()
    models = {name: ToyModel(seed) for seed, name in enumerate(("student", "teacher", "reference"), 1)}
    models["reference"].move_towards(models["student"], 0.8)  # a penalty to a strange model would explode
    return ToyWorkflow(tmp_path, _tokenizer_cache, models)
