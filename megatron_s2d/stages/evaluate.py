"""Evaluation of a stage's final weights: k graded samples per problem, one row per problem (methods.md M6)."""

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
    prompt_sets: Sequence[tuple[Sequence[Prompt], int]],
    *,
    sampling: SamplingConfig,
    seed: int,
    eval_batch_size: int,
) -> None:
    """Evaluate the final weights of the stage ``context.name``; rows go to ``evaluation.jsonl`` in its directory.

    prompt_sets: sets of problems, each with its number of samples per problem.
    Rows are written batch by batch, so that a killed evaluation resumes with the next batch.
    """
    partial = context.directory.path / _PARTIAL_NAME
    model = context.models.frozen(context.name)
    model_name = context.models.name_of(context.name)
    params = context.rollouts.sampling_params(sampling, model_name)
    batches = [
        (prompts[start : start + eval_batch_size], k)
        for prompts, k in prompt_sets
        for start in range(0, len(prompts), eval_batch_size)
    ]
    num_done = len({row["step"] for row in read_jsonl(partial)}) if partial.exists() else 0
    dist.barrier()
    if context.is_rank_zero:
        truncate_jsonl_after(partial, last=num_done)
    log, timer = open_log(context.directory, num_done, None), Timer()
    with RewardManager() as reward_manager:
        engine = context.rollouts.engine(model, model_name, params)
        worker = RolloutWorker(model.layout, engine, params, seed, context.inputs.tokenizer, reward_manager)
        for number, (batch, k) in enumerate(batches[num_done:], start=num_done + 1):
            samples = worker.sample(batch, k, 0)
            if context.is_rank_zero:
                append_line(partial, json.dumps({"step": number, "rows": rows_of(batch, samples)}))
            num_tokens, times = sum(sample.response_length for sample in samples), timer.collect_and_reset()
            speed = {"tokens_per_second": num_tokens / times["timing_s/step"]}
            log.write(number, response_metrics(samples) | speed | times)
            write_examples(context.directory, examples(number, samples, batch, context.inputs.tokenizer))
            if broadcast_flag(context.stop()) and number < len(batches):
                raise Stopped(f"stopped after batch {number} of {len(batches)}")
    if context.is_rank_zero:
        rows = [row for step in read_jsonl(partial) for row in step["rows"]]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write_text(context.directory.path / ROWS_NAME, text)


def rows_of(prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[dict]:
    """Return one row per problem from samples that are grouped by problem."""
    k = len(samples) // len(prompts)
    rows = []
    for index, prompt in enumerate(prompts):
        group = samples[index * k : (index + 1) * k]
        rows.append(
            {
                "problem_id": prompt.id,
                "domain": prompt.domain,
                "rewards": [sample.reward for sample in group],
                "response_lengths": [sample.response_length for sample in group],
                "finish_reasons": [sample.finish_reason for sample in group],
            }
        )
    return rows
