"""Offloading frees device memory; the in-process engine agrees with a scoring pass. Needs a GPU."""

import dataclasses

import numpy as np
import torch
from parity_case import SPEC, OptimizerConfig, policy, samples, train

from megatron_s2d.records import Prompt
from megatron_s2d.rollout.engine import Request, SamplingParams
from megatron_s2d.rollout.megatron.engine import MegatronEngine


def test_optimizer_offload_frees_memory_and_trains_the_same(layout, record_property):
    losses, allocated = {}, {}
    for offload in (False, True):
        model = policy(layout, "bfloat16")
        before = torch.cuda.memory_allocated()
        model.prepare_training(OptimizerConfig(lr=1e-3), 10, offload=offload)
        losses[offload] = train(model, 4)
        allocated[offload] = torch.cuda.memory_allocated() - before
        del model
    record_property("bytes held", f"{allocated[False]} -> {allocated[True]}")
    parameters = SPEC.num_parameters
    # Twelve bytes of masters and moments and four of gradients, of which none is left; activations are gone on both.
    assert allocated[False] - allocated[True] >= 15 * parameters
    np.testing.assert_allclose(losses[True], losses[False], rtol=5e-3)


def test_frozen_model_offloads_and_reloads(layout):
    model = policy(layout, "bfloat16")
    model.freeze()
    before, allocated = model.score(samples()), torch.cuda.memory_allocated()
    for _ in range(2):
        model.offload()
        assert allocated - torch.cuda.memory_allocated() >= 1.9 * SPEC.num_parameters
        addresses = [parameter.data_ptr() for parameter in model.chunks[0].parameters()]
        model.onload()
        for one, other in zip(model.score(samples()), before, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    model.offload()
    assert addresses == [parameter.data_ptr() for parameter in model.chunks[0].parameters()]  # no further copies


def test_generated_log_probs_are_those_of_a_scoring_pass(layout, record_property):
    """Left-padded prompts of several lengths; bf16 on either side."""
    model = policy(layout, "bfloat16", packed=False)
    rng = np.random.default_rng(0)
    params = SamplingParams(max_new_tokens=24, stop_token_ids=(), temperature=1.0)
    prompts = [Prompt(str(i), rng.integers(0, SPEC.vocab_size, 3 + 5 * i), "", "d", None, None) for i in range(6)]
    requests = [Request(prompt.id, prompt, prompt.id, i, params) for i, prompt in enumerate(prompts)]
    generated = MegatronEngine(model.chunks, SPEC.vocab_size, layout).generate(requests)
    scores = model.score([dataclasses.replace(sample) for sample in generated])
    gaps = [
        np.abs(score - sample.rollout_log_probs)[sample.response_mask]
        for sample, score in zip(generated, scores, strict=True)
    ]
    gaps = np.concatenate(gaps)
    record_property("mean gap", f"{gaps.mean():.4g}")
    assert gaps.mean() <= 0.03 and gaps.max() <= 0.3
