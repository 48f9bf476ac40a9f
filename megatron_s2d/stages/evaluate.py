"""Evaluation of a stage's final weights: k graded samples per problem, one row per problem (methods.md M6).

``evaluation.jsonl`` has the numbers, ``responses.jsonl`` every response with its verdict.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_s2d.artifacts.files import append_line, atomic_write_text, read_jsonl, truncate_jsonl_after
from megatron_s2d.config.reward import read_verifier
from megatron_s2d.config.training import SamplingConfig
from megatron_s2d.parallel.collectives import broadcast_flag, broadcast_from_rank0
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import AnySample, Prompt, Sample
from megatron_s2d.rollout.sampler import RolloutWorker, examples, response_metrics, response_text
from megatron_s2d.stages.context import StageContext
from megatron_s2d.train.loop import Stopped, open_log, write_examples
from megatron_s2d.train.metrics import Timer
from megatron_s2d.verify import RewardManager

ROWS_NAME = "evaluation.jsonl"
RESPONSES_NAME = "responses.jsonl"
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
    # Rank 0 decides: another node may not see the rows yet.
    num_done = broadcast_from_rank0(
        lambda: len({row["step"] for row in read_jsonl(partial)}) if partial.exists() else 0
    )
    if context.is_rank_zero:
        truncate_jsonl_after(partial, last=num_done)
        truncate_jsonl_after(context.directory.path / RESPONSES_NAME, last=num_done)
    log, timer = open_log(context.directory, num_done, *context.tracked), Timer()
    with RewardManager() as reward_manager:
        engine = context.rollouts.engine(model, model_name, params)
        environments = context.rollouts.environments(model_name, reward_manager)
        tokenizer = context.inputs.tokenizer
        worker = RolloutWorker(model.layout, engine, params, seed, tokenizer, reward_manager, environments)
        for number, (batch, k) in enumerate(batches[num_done:], start=num_done + 1):
            samples = worker.sample(batch, k, 0, context.report_progress)
            lines = response_lines(number, batch, samples, context.inputs.tokenizer, model.layout)
            if context.is_rank_zero:
                for line in lines:
                    append_line(context.directory.path / RESPONSES_NAME, line)
                append_line(partial, json.dumps({"step": number, "rows": rows_of(batch, samples)}))
            num_tokens, times = sum(sample.response_length for sample in samples), timer.collect_and_reset()
            speed = {"tokens_per_second": num_tokens / times["timing_s/step"]}
            speed["response_tokens_per_second"] = speed["tokens_per_second"]
            log.write(number, response_metrics(samples) | speed | times)
            write_examples(context.directory, examples(number, samples, batch, context.inputs.tokenizer, model.layout))
            if broadcast_flag(context.stop()) and number < len(batches):
                log.close()
                raise Stopped(f"stopped after batch {number} of {len(batches)}")
    if context.is_rank_zero:
        rows = [row for step in read_jsonl(partial) for row in step["rows"]]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write_text(context.directory.path / ROWS_NAME, text)
        log.write_result(len(batches), evaluation_results(rows))
    log.close()


def evaluation_results(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return avg@k with its standard error over problems, and shares of verdicts, for trackers. rows: ``rows_of``."""
    means = np.array([np.mean(row["rewards"]) for row in rows], dtype=np.float64)
    verdicts = Counter(label for row in rows for label in row["verifier_labels"])
    results = {"evaluation/avg_at_k": float(means.mean()), "evaluation/num_problems": float(len(means))}
    if len(means) > 1:
        results["evaluation/avg_at_k_std_err"] = float(means.std(ddof=1) / len(means) ** 0.5)
    total = verdicts.total()
    return results | {f"evaluation/verdict/{label or 'none'}": count / total for label, count in verdicts.items()}


def rows_of(prompts: Sequence[Prompt], samples: Sequence[AnySample]) -> list[dict]:
    """Return one row per problem from samples that are grouped by problem."""
    k = len(samples) // len(prompts)
    rows = []
    for index, prompt in enumerate(prompts):
        group = samples[index * k : (index + 1) * k]
        row = {
            "problem_id": prompt.id,
            "domain": prompt.domain,
            "rewards": [sample.reward for sample in group],
            "response_lengths": [sample.response_length for sample in group],
            "finish_reasons": [sample.finish_reason for sample in group],
            "verifier_labels": [sample.verifier_label or "" for sample in group],
        }
        has_settings = prompt.verifier is not None and not isinstance(read_verifier(prompt.verifier), str)
        if has_settings:  # verifiers with a name have the reward 1 for a correct response, and 0
            row["correct"] = [sample.verifier_label == "correct" for sample in group]
        rows.append(row)
    return rows


def response_lines(
    step: int, prompts: Sequence[Prompt], samples: Sequence[AnySample], tokenizer: Any, layout: Layout
) -> list[str]:
    """Return a JSON line for each response on rank 0, in the order of ``samples``; collective over replicas.

    Other ranks return their own lines.
    """
    k = len(samples) // len(prompts)
    own = {
        index: json.dumps(
            {
                "step": step,
                "problem_id": sample.prompt_id,
                "sample": index % k,
                "response": response_text(tokenizer, sample),
                "reward": sample.reward,
                "verifier_label": sample.verifier_label or "",
                **({} if sample.verifier_detail is None else {"verifier_detail": sample.verifier_detail}),
                "finish_reason": sample.finish_reason,
                "response_length": sample.response_length,
            },
            ensure_ascii=False,
        )
        for index, sample in enumerate(samples)
        if isinstance(sample, Sample)
    }
    if layout.is_replica_root and layout.dp_rank > 0:
        layout.host_dp.send(np.frombuffer(json.dumps(own).encode(), dtype=np.uint8).copy(), 0)
    elif layout.is_replica_root:
        for rank in range(1, layout.dp_size):
            theirs = json.loads(layout.host_dp.receive(rank).tobytes())
            own |= {int(index): line for index, line in theirs.items()}
    return [own[index] for index in sorted(own)]
