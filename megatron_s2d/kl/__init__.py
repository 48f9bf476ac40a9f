"""Exact KL divergences between language models whose vocabulary is sharded over tensor-parallel ranks.

This package needs PyTorch alone (Triton optionally, on CUDA); nothing here knows of trainers, models or Megatron.

Entry points:
    linear_divergence          hidden states and an output-layer shard -> loss, gradients and per-token values, without
                               ever storing full logits
    vocab_parallel_divergence  the same per-token values for logits that exist already, differentiable per token
    vocab_parallel_topk        the k most likely tokens over all shards, for a cached teacher
Describing the operands:
    VocabShard                 which global token ids this rank's columns are, and the process group of the others
    HiddenStates, Logits, TopK, GeometricTarget
                               the teacher: hidden states with an output layer, logits, a cached top-k, or
                               teacher^lambda * reference^(1 - lambda)
Results:
    TokenOutputs               log-probabilities, entropy, forward and reverse KL, JSD and skew KLs of every token

See docs/kl.md for an example on two ranks.
"""

from megatron_s2d.kl.fused import linear_divergence
from megatron_s2d.kl.logits import vocab_parallel_divergence, vocab_parallel_topk
from megatron_s2d.kl.outputs import TokenOutputs
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.kl.teachers import GeometricTarget, HiddenStates, Logits, TopK

__all__ = [
    "GeometricTarget",
    "HiddenStates",
    "Logits",
    "TokenOutputs",
    "TopK",
    "VocabShard",
    "linear_divergence",
    "vocab_parallel_divergence",
    "vocab_parallel_topk",
]
