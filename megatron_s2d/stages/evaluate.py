"""k graded samples of every problem, one row a problem (methods.md M6)."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch.distributed as dist

from megatron_s2d.artifacts.files import append_line, atomic_write_text, read_jsonl, truncate_jsonl_after
from megatron_s2d.config.training import SamplingConfig
from megatron_s2d.parallel.collectives import broadcast_flag
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.rollout.sampler import RolloutWorker, examples, response_metrics
from megatron_s2d.stages.context import StageContext
from megatron_s2d.train.loop import Stopped, open_log, write_examples
from megatron_s2d.train.metrics import Timer
from megatron_s2d.verify import RewardManager

ROWS_NAME = "evaluation.jsonl"
_PARTIAL_NAME = "partial.jsonl"


def run_evaluation(
    context: StageContext,
    parts: Sequence[tuple[Sequence[Prompt], int]],
    *,
    sampling: SamplingConfig,
    seed: int,
    eval_batch_size: int,
) -> None:
    """Evaluate the final weights of the stage ``context.name``; rows go to ``evaluation.jsonl`` in its directory.

    parts: sets of problems, each with its samples per problem.
    Rounds of problems are kept as they come, so a killed evaluation goes on with the next round.
    """
    partial = context.directory.path / _PARTIAL_NAME
    policy = context.frozen(context.name)
    model = context.config.model_of(context.name)
    params = context.sampling(sampling, model)
    rounds = [
        (prompts[start : start + eval_batch_size], k)
        for prompts, k in parts
        for start in range(0, len(prompts), eval_batch_size)
    ]
    done = len({row["step"] for row in read_jsonl(partial)}) if partial.exists() else 0
    dist.barrier()
    if context.is_rank_zero:
        truncate_jsonl_after(partial, last=done)
    log, timer = open_log(context.directory, done, None), Timer()
    with RewardManager() as graders:
        sampler = RolloutWorker(
            policy.layout, context.engine(policy, model, params), params, seed, context.tokenizer, graders
        )
        for number, (part, k) in enumerate(rounds[done:], start=done + 1):
            samples = sampler.sample(part, k, 0)
            if context.is_rank_zero:
                append_line(partial, json.dumps({"step": number, "rows": rows_of(part, samples)}))
            tokens, times = sum(sample.response_length for sample in samples), timer.collect_and_reset()
            log.write(
                number, response_metrics(samples) | {"tokens_per_second": tokens / times["timing_s/step"]} | times
            )
            write_examples(context.directory, examples(number, samples, part, context.tokenizer))
            if broadcast_flag(context.stop()) and number < len(rounds):
                raise Stopped(f"stopped after round {number} of {len(rounds)}")
    if context.is_rank_zero:
        rows = [row for step in read_jsonl(partial) for row in step["rows"]]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write_text(context.directory.path / ROWS_NAME, text)


def rows_of(prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[dict]:
    """One row a problem from samples that come problem by problem."""
    k = len(samples) // len(prompts)
    rows = []
    for place, prompt in enumerate(prompts):
        own = samples[place * k : (place + 1) * k]
        rows.append(
            {
                "problem_id": prompt.id,
                "domain": prompt.domain,
                "rewards": [sample.reward for sample in own],
                "response_lengths": [sample.response_length for sample in own],
                "finish_reasons": [sample.finish_reason for sample in own],
            }
        )
    return rows
