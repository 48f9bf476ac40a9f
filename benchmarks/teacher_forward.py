"""Forward pass and output layer of one tensor-parallel rank of a Llama-70B-shaped teacher.

    python benchmarks/teacher_forward.py [--json OUT]

One of eight ranks: 8 query heads, one key head, an eighth of the MLP and of the vocabulary, all 80 layers, run alone,
without the two all-reduces per layer of eight ranks. Its tokens per second are those of the teacher if communication
were free.
"""

from __future__ import annotations

import functools

from device_common import (
    ON_GPU,
    Setup,
    begin,
    forward_flops,
    mfu,
    random_policy,
    random_samples,
    release,
    seconds_of,
    spec_of,
)

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.precision import Fp8Config
from megatron_s2d.estimate.layers import ModelShard
from megatron_s2d.parallel import device

RANKS = 8


def shard_spec() -> ModelSpec:
    """Return the shard of one of ``RANKS`` tensor-parallel ranks as a model of its own."""
    full = spec_of("llama-3.3-70b") if ON_GPU else spec_of("tiny-llama", num_attention_heads=8, num_query_groups=8)
    return spec_of(
        "llama-3.3-70b" if ON_GPU else "tiny-llama",
        num_attention_heads=full.num_attention_heads // RANKS,
        num_query_groups=full.num_query_groups // RANKS,
        head_dim=full.head_dim,
        ffn_hidden_size=full.ffn_hidden_size // RANKS,
        vocab_size=full.vocab_size // RANKS if ON_GPU else full.vocab_size,
    )


def measure(spec: ModelSpec, recipe: str | None, setup: Setup) -> None:
    """Add the rows of one precision: the pass for exact distributions and the one for sampled tokens."""
    teacher = random_policy(spec, setup.layout, fp8=None if recipe is None else Fp8Config(recipe=recipe))
    teacher.freeze()
    shard = ModelShard(spec, ParallelConfig(), 0)
    for count, length in ((4, 4096), (1, 16384)) if ON_GPU else ((2, 16),):
        samples = random_samples(spec, count, length)
        batches, flops = teacher.pack(samples, {}), forward_flops(shard, samples)
        outputs = sum(shard.output_flops(int(sample.response_mask[1:].sum())) for sample in samples)
        steps = {
            "hidden states": (functools.partial(teacher.hidden_states, batches), flops - outputs),
            "log-probabilities": (functools.partial(teacher.score, samples), flops),
        }
        for gives, (step, operations) in steps.items():
            seconds = seconds_of(step, setup.repeats)
            setup.add(
                gives=gives,
                sequences=count,
                length=length,
                precision=recipe or ("bfloat16" if ON_GPU else "float32"),
                transformer_engine=device.capabilities().transformer_engine,
                seconds=seconds,
                tokens_per_second=count * length / seconds,
                mfu=mfu(operations, seconds),
            )


def main(arguments: list[str] | None = None) -> None:
    setup = begin(__doc__.splitlines()[0], arguments, repeats=3)
    spec = shard_spec()
    for recipe in (None, "tensorwise") if device.capabilities().transformer_engine else (None,):
        measure(spec, recipe, setup)
        release()


if __name__ == "__main__":
    main()
