"""What only a GPU shows of memory that is given up and of the in-process engine."""

import dataclasses

import numpy as np
import torch
from parity_case import SPEC, OptimizerConfig, policy, samples, train

from megatron_s2d.records import Prompt
from megatron_s2d.rollout.engine import Request, SamplingParams
from megatron_s2d.rollout.megatron.engine import MegatronEngine


def test_a_waiting_optimizer_gives_its_memory_up_and_trains_alike(layout, record_property):
    found, held = {}, {}
    for offload in (False, True):
        model = policy(layout, "bfloat16")
        before = torch.cuda.memory_allocated()
        model.prepare_training(OptimizerConfig(lr=1e-3), 10, offload=offload)
        found[offload] = train(model, 4)
        held[offload] = torch.cuda.memory_allocated() - before
        del model
    record_property("bytes held", f"{held[False]} -> {held[True]}")
    parameters = SPEC.num_parameters
    # Twelve bytes of masters and moments and four of gradients, of which none is left; activations are gone on both.
    assert held[False] - held[True] >= 15 * parameters
    np.testing.assert_allclose(found[True], found[False], rtol=5e-3)


def test_a_frozen_model_moves_to_the_host_and_back(layout):
    model = policy(layout, "bfloat16")
    model.freeze()
    before, held = model.score(samples()), torch.cuda.memory_allocated()
    for _ in range(2):
        model.offload()
        assert held - torch.cuda.memory_allocated() >= 1.9 * SPEC.num_parameters
        places = [parameter.data_ptr() for parameter in model.chunks[0].parameters()]
        model.onload()
        for one, other in zip(model.score(samples()), before, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    model.offload()
    assert places == [parameter.data_ptr() for parameter in model.chunks[0].parameters()]  # no further copies


def test_generated_log_probs_are_those_of_a_scoring_pass(layout, record_property):
    """Left-padded prompts of several lengths; bf16 on either side."""
    model = policy(layout, "bfloat16", packed=False)
    rng = np.random.default_rng(0)
    params = SamplingParams(max_new_tokens=24, stop_token_ids=(), temperature=1.0)
    prompts = [
        Prompt(str(i), rng.integers(0, SPEC.vocab_size, 3 + 5 * i), "", "d", None, None) for i in range(6)
    ]
    requests = [Request(prompt.id, prompt, prompt.id, i, params) for i, prompt in enumerate(prompts)]
    found = MegatronEngine(model.chunks, SPEC.vocab_size, layout).generate(requests)
    scores = model.score([dataclasses.replace(sample) for sample in found])
    gaps = [
        np.abs(score - sample.rollout_log_probs)[sample.response_mask]
        for sample, score in zip(found, scores, strict=True)
    ]
    gaps = np.concatenate(gaps)
    record_property("mean gap", f"{gaps.mean():.4g}")
    assert gaps.mean() <= 0.03 and gaps.max() <= 0.3
