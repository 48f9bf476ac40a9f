"""Generation on one CPU thread: the Megatron engine compared with transformers' ``generate`` on the same weights.

    OMP_NUM_THREADS=1 python benchmarks/generation.py [--repeats 7] [--model DIR]

DIR: a Hugging Face directory such as real-model/student of benchmarks/real_model.py, instead of small random models.

Every response has the same fixed length, so both do the same work. transformers samples without log-probabilities, the
engine reports them. Greedy runs of both are compared first; different tokens stop the benchmark.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from common import interleaved_minima, published_model_twice, same_model_twice, start

from megatron_s2d.records import Prompt
from megatron_s2d.rollout.engine import Request, SamplingParams, sample_seed
from megatron_s2d.rollout.megatron.engine import MegatronEngine


@dataclasses.dataclass(frozen=True)
class Case:
    """``prompts`` distinct prompts with ``group`` responses each."""

    preset: str
    vocab_size: int
    prompts: int
    group: int
    prompt_tokens: int
    response_tokens: int


CASES = (
    Case("small-teacher", 512, 128, 1, 32, 96),
    Case("small-teacher", 512, 16, 8, 32, 96),
    Case("small-teacher", 512, 128, 1, 8, 24),
    Case("tiny-teacher", 25, 512, 1, 10, 8),
    Case("tiny-teacher", 25, 64, 8, 10, 8),
    Case("tiny-student", 25, 64, 8, 10, 8),
    Case("tiny-student", 25, 384, 16, 10, 8),
)

REAL_CASES = ((4, 4, 64),)  # prompts, group, response tokens


def make_requests(case: Case, **params) -> list[Request]:
    generator = np.random.default_rng(0)
    params = SamplingParams(max_new_tokens=case.response_tokens, stop_token_ids=(), **params)
    requests = []
    for number in range(case.prompts):
        token_ids = generator.integers(0, case.vocab_size, case.prompt_tokens)
        prompt = Prompt(f"p{number}", token_ids, "", "math", None, None)
        for index in range(case.group):
            seed = sample_seed(1, 0, prompt.id, index)
            requests.append(Request(f"p{number}#{index}@0", prompt, f"p{number}@0.0", seed, params))
    return requests


def measure(case: Case, layout, repeats: int, models) -> str:
    """Return one row of the table. models: of ``same_model_twice``."""
    spec, chunks, reference = models
    reference.eval()
    engine = MegatronEngine(chunks, spec.vocab_size, layout)
    requests = make_requests(case)
    token_ids = torch.from_numpy(np.stack([request.prompt.token_ids for request in requests]))

    def transformers_generate(do_sample: bool) -> torch.Tensor:
        return reference.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=case.response_tokens,
            min_new_tokens=case.response_tokens,
            do_sample=do_sample,
            top_k=0 if do_sample else None,
            pad_token_id=0,
        )

    greedy = np.stack([sample.token_ids for sample in engine.generate(make_requests(case, temperature=0.0))])
    # Tokens whose logits tie to the last bit may differ; a wrong implementation differs nearly everywhere.
    agreement = float((greedy == transformers_generate(False).numpy()).mean())
    assert agreement > 0.99, f"only {agreement:.1%} of the greedy tokens agree"
    seconds = interleaved_minima(
        {"ours": lambda: engine.generate(requests), "transformers": lambda: transformers_generate(True)}, repeats
    )
    tokens = len(requests) * case.response_tokens
    return (
        f"| {case.preset} ({spec.num_layers} x {spec.hidden_size}) | {case.prompts} x {case.group} "
        f"| {case.prompt_tokens} + {case.response_tokens} | {tokens / seconds['ours']:,.0f} "
        f"| {tokens / seconds['transformers']:,.0f} | {seconds['ours'] / seconds['transformers']:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--model", type=Path, help="Hugging Face directory to measure instead")
    arguments = parser.parse_args()
    layout = start()
    print("| model | prompts x group | prompt + response | engine tokens/s | transformers tokens/s | time ratio |")
    print("|---|---|---|---|---|---|")
    if arguments.model is not None:
        models = published_model_twice(arguments.model, layout)
        name, vocab_size = arguments.model.name, models[0].vocab_size
        for prompts, group, response_tokens in REAL_CASES:
            case = Case(name, vocab_size, prompts, group, 50, response_tokens)
            print(measure(case, layout, arguments.repeats, models), flush=True)
        return
    for case in CASES:
        models = same_model_twice(case.preset, case.vocab_size, layout)
        print(measure(case, layout, arguments.repeats, models), flush=True)


if __name__ == "__main__":
    main()
