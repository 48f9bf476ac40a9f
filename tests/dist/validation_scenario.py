"""Validation of a model in training at a layout: the same rows and the same decision as on one rank."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from episode_scenario import VOCAB, Tokenizer

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.base import parse
from megatron_s2d.config.validation import ValidationConfig
from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.parallel.collectives import broadcast_from_rank0
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import Prompt
from megatron_s2d.rollout.engine import SamplingParams
from megatron_s2d.rollout.megatron.engine import MegatronEngine
from megatron_s2d.rollout.sampler import RolloutWorker
from megatron_s2d.stages.validation import StageValidation
from megatron_s2d.verify import Verdict

RULE = {"rule": "plateau", "metric": "letters/reward", "mode": "min", "patience": 1}
CONFIG = {"interval_steps": 1, "data": {"letters": "x"}, "samples_per_prompt": 2, "batch_size": 3, "until": [RULE]}


class Rewards:
    """A response is correct by its last letter, and longer ones have a larger reward."""

    def grade(self, prompts, texts):
        return [Verdict(float(len(text)), "correct" if ord(text[-1]) % 2 else "wrong") for text in texts]


def validated(layout: Layout, policy, step) -> dict:
    """Return the rows of validations between the updates ``step(model)``, and at which of them the stage ended."""
    model = policy("tiny-llama", layout, 2)
    rng = np.random.default_rng(2)
    prompts = PromptTable.of(
        [Prompt(str(n), rng.integers(0, VOCAB, 2 + n % 4), "", "math", "math", "1") for n in range(7)]
    )
    with tempfile.TemporaryDirectory() as scratch:
        directory = StageDirectory(Path(broadcast_from_rank0(lambda: scratch)))
        if is_rank_zero := directory.path == Path(scratch):
            directory.begin({}, {}, {})
        engine = MegatronEngine(model.chunks, VOCAB, layout, max_batch_size=5)
        validation = StageValidation(
            config=parse(ValidationConfig, CONFIG, "x"),
            steps=9,
            directory=directory,
            prompts={"letters": prompts},
            worker=RolloutWorker(layout, engine, SamplingParams(12, (5,)), 3, Tokenizer(), Rewards()),
            model=model,
            pushes_weights=True,
            stop=lambda: False,
            progress=lambda done, total: None,
            is_rank_zero=is_rank_zero,
        )
        ended = [validation.run(1, 0)]
        for number in (2, 3):
            step(model)
            ended.append(validation.run(number, number))
        rows = broadcast_from_rank0(directory.validations)
    return {"ended": ended, "reasons": [row["ended"] for row in rows], "data": [row["data"]["letters"] for row in rows]}
