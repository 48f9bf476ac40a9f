"""The teacher cache: responses of a teacher with its distribution at every token (methods.md M2).

Prompts are generated in batches. Each data-parallel rank writes what it scored of a batch as a small cache, and a last
file says that the batch is complete, so that a killed stage resumes with the next one. At the end each data-parallel
rank copies an equal share of the samples, in their order, to its part of the cache. No rank has samples or
distributions of another one. Shapes: r response tokens of a sample, h hidden size, v vocabulary.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_s2d.artifacts.files import atomic_write_json, read_json_object, rename, tree_digest
from megatron_s2d.config.forward_kl import TeacherCacheConfig
from megatron_s2d.data.cache import (
    CachedDistribution,
    CacheHeader,
    CachePart,
    TeacherCache,
    check_rows,
    verify_cache,
)
from megatron_s2d.data.cache_writer import CacheWriter, join_parts
from megatron_s2d.data.packing import MicroBatch, MiniBatch
from megatron_s2d.data.row_digests import digests_by_position, row_digests
from megatron_s2d.data.tokenizer import template_fingerprint, tokenizer_fingerprint
from megatron_s2d.errors import UserError
from megatron_s2d.kl.logits import vocab_parallel_topk
from megatron_s2d.parallel.collectives import broadcast_flag, broadcast_from_rank0, max_over_ranks
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import AnySample, Prompt, Sample, own_samples
from megatron_s2d.rollout.sampler import RolloutWorker, examples, response_metrics
from megatron_s2d.stages.context import StageContext
from megatron_s2d.stages.inputs import StageInputs
from megatron_s2d.teachers.views import behind
from megatron_s2d.train.loop import Stopped, open_log, write_examples
from megatron_s2d.train.megatron_model import MegatronModel
from megatron_s2d.train.metrics import Timer
from megatron_s2d.verify import RewardManager

OUTPUT_LAYER_NAME = "output_layer.safetensors"
_PARTIAL_NAME, _BATCH_NAME = "partial", "batch.json"


def run_teacher_cache(context: StageContext) -> None:
    """Generate, select, score and write batch by batch; then merge the batches."""
    stage: TeacherCacheConfig = context.stage
    teacher = context.models.frozen(stage.teacher)
    params = context.rollouts.sampling_params(stage.sampling, context.models.name_of(stage.teacher))
    views = context.inputs.prompt_views(context.name, "teacher")
    engine = context.rollouts.engine(
        teacher, context.models.name_of(stage.teacher), params, longest_prompt=0 if views is None else views.longest
    )
    prompts = context.inputs.stage_prompts(context.name)
    header = cache_header(context.inputs, context.name, teacher)
    size = stage.generation_batch_size
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    partial = context.directory.path / _PARTIAL_NAME
    num_done = count_batches(partial)
    if num_done:
        check_header(batch_path(partial, 1), header)  # before more are generated, not when they are merged
    log, timer = open_log(context.directory, num_done), Timer()
    with RewardManager() as reward_manager:
        grader = reward_manager if stage.only_correct else None
        worker = RolloutWorker(
            teacher.layout,
            engine,
            params,
            context.seed,
            context.inputs.tokenizer,
            grader,
            context.rollouts.environments(context.models.name_of(stage.teacher), grader),
        )
        for number, batch in enumerate(batches[num_done:], start=num_done + 1):
            read = batch if views is None else views.prompts(batch)
            with timer.section("rollout"):
                samples = worker.sample(read, stage.num_generations, number, context.report_progress)
            selected = [sample for sample in samples if not stage.only_correct or sample.verifier_label == "correct"]
            with timer.section("teacher"):
                distributions = distributions_of(teacher, selected, header) if selected else {}
            if views is not None:
                distributions = behind_prompts(distributions, batch)
            with timer.section("save"):
                write_batch(batch_path(partial, number), len(selected), distributions, header, teacher.layout)
            times = timer.collect_and_reset()
            num_tokens = sum(sample.response_length for sample in samples)
            speed = {"kept": len(selected), "tokens_per_second": num_tokens / times["timing_s/step"]}
            speed["response_tokens_per_second"] = speed["tokens_per_second"]
            log.write(number, response_metrics(samples) | speed | times)
            write_examples(context.directory, examples(number, samples, read, context.inputs.tokenizer, teacher.layout))
            if broadcast_flag(context.stop()) and number < len(batches):
                raise Stopped(f"stopped after batch {number} of {len(batches)}")
    if header.representation == "hidden_states":
        save_output_layer(teacher, context.directory.path / OUTPUT_LAYER_NAME)
    merge_batches(partial, len(batches), context.directory.cache_path, header, teacher.layout)


def behind_prompts(
    distributions: Mapping[int, tuple[Sample, CachedDistribution]], prompts: Sequence[Prompt]
) -> dict[int, tuple[Sample, CachedDistribution]]:
    """Return samples that the teacher generated in its view, and their distributions, behind the student's prompts."""
    by_id = {prompt.id: prompt for prompt in prompts}
    result = {}
    for index, (sample, distribution) in distributions.items():
        check_rows(sample, distribution.token_digests, f"the teacher's view of {sample.prompt_id}")
        moved = behind(by_id[sample.prompt_id].token_ids, sample)
        result[index] = (
            moved,
            dataclasses.replace(distribution, token_digests=torch.from_numpy(row_digests(moved))),
        )
    return result


def cache_header(inputs: StageInputs, stage_name: str, teacher: MegatronModel) -> CacheHeader:
    """Return the cache's header: what it holds, and of which teacher and tokenizer."""
    stage: TeacherCacheConfig = inputs.config.stages[stage_name]
    sampling_temperature = stage.sampling.temperature if stage.sampling.temperature > 0 else 1.0
    vocab_size = teacher.spec.vocab_size
    return CacheHeader(
        representation=stage.representation,
        teacher_digest=broadcast_from_rank0(lambda: tree_digest(inputs.model_path(stage.teacher))),  # reads all of it
        tokenizer_fingerprint=tokenizer_fingerprint(inputs.tokenizer),
        template_fingerprint=template_fingerprint(inputs.tokenizer, inputs.config.template_date),
        view_fingerprint=inputs.view_fingerprint(stage_name),
        temperature=1.0 if stage.representation == "hidden_states" else sampling_temperature,
        vocab_size=vocab_size,
        k=min(stage.top_k, vocab_size) if stage.representation == "top_k" else None,
        hidden_size=teacher.spec.hidden_size if stage.representation == "hidden_states" else None,
    )


@torch.no_grad()
def distributions_of(
    teacher: MegatronModel, samples: Sequence[AnySample], header: CacheHeader
) -> dict[int, tuple[Sample, CachedDistribution]]:
    """Return the samples that this rank scored, with the teacher's distributions at their response tokens.

    By index in ``samples``, on data-parallel leaders; empty on other ranks. Collective.
    """
    distributions: dict[int, tuple[Sample, CachedDistribution]] = {}
    if header.representation == "sampled_token":
        for index, (sample, score) in enumerate(zip(samples, teacher.score(samples), strict=True)):
            if isinstance(sample, Sample):
                log_probs = torch.from_numpy(score[sample.response_mask])
                distributions[index] = (
                    sample,
                    CachedDistribution(torch.from_numpy(row_digests(sample)), log_probs=log_probs),
                )
    else:
        mini_batch, _ = teacher.balance(MiniBatch(samples, {}))
        batches = teacher.pack(mini_batch.samples, {})
        states = teacher.hidden_states(batches)
        if teacher.layout.is_pipeline_last_stage:
            for batch, hidden in zip(batches, states, strict=True):
                distributions |= _of_batch(teacher, mini_batch.samples, batch, hidden, header)
    return distributions if teacher.layout.is_dp_leader else {}


def _of_batch(
    teacher: MegatronModel,
    samples: Sequence[AnySample],
    batch: MicroBatch,
    hidden: torch.Tensor,
    header: CacheHeader,
) -> dict[int, tuple[Sample, CachedDistribution]]:
    """Return the distributions of a micro-batch from its hidden states [t, h] (t / tp under sequence parallelism)."""
    rows = batch.unpack(teacher.gather_context_parallel(batch, teacher.gather_sequence_parallel(hidden)))
    digests = batch.unpack(torch.from_numpy(digests_by_position(samples, batch.plan)))
    own = own_samples([samples[index] for index in batch.indices])
    distributions = {}
    for index, sample, row, row_digest in zip(batch.indices, own, rows, digests, strict=True):
        mask = torch.from_numpy(sample.response_mask)
        distributions[index] = sample, _distribution(teacher, row[mask.to(row.device)], row_digest[mask], header)
    return distributions


def _distribution(
    teacher: MegatronModel, hidden: torch.Tensor, digests: torch.Tensor, header: CacheHeader
) -> CachedDistribution:
    """hidden [r, h] -> the fields of the cache's representation, on the CPU; collective over the TP group.

    digests: [r] int32 of the rows' tokens.
    """
    if header.representation == "hidden_states":
        return CachedDistribution(digests, hidden=hidden.cpu())
    logits = hidden.float() @ teacher.output_weight.float().t()
    if header.representation == "top_k":
        ids, log_probs, tail = vocab_parallel_topk(logits, header.k, teacher.shard, header.temperature)
        return CachedDistribution(
            digests, ids=ids.int().cpu(), log_probs=log_probs.float().cpu(), log_tail_mass=tail.float().cpu()
        )
    full_logits = torch.cat(list(teacher.shard.gather(logits)), dim=1)[:, : header.vocab_size]
    return CachedDistribution(digests, log_probs=torch.log_softmax(full_logits / header.temperature, dim=1).cpu())


def save_output_layer(teacher: MegatronModel, path: Path) -> None:
    """Write the teacher's full output layer [v, h] as a safetensors file; collective."""
    if teacher.layout.is_pipeline_last_stage and teacher.layout.dp_rank == 0:
        weight = teacher.shard.gather(teacher.output_weight.detach()).flatten(0, 1)[: teacher.spec.vocab_size]
        if teacher.layout.is_dp_leader:
            temporary = path.with_name(path.name + ".partial")
            save_file({"weight": weight.cpu().contiguous().clone()}, temporary)
            temporary.rename(path)
    dist.barrier()


def part_path(directory: Path, number: int) -> Path:
    """Return the directory that data-parallel rank ``number`` writes in a batch or in the cache."""
    return directory / f"part_{number:05d}"


def batch_path(partial: Path, number: int) -> Path:
    """Return the directory of batch ``number`` (counted from 1)."""
    return partial / f"batch_{number:05d}"


def count_batches(partial: Path) -> int:
    """Return the number of intact batches, which are written in order; delete a damaged one and those after it.

    Collective: each rank reads some of the batches.
    """
    count = broadcast_from_rank0(lambda: _count_complete(partial))
    damaged = []
    for number in range(1 + dist.get_rank(), count + 1, dist.get_world_size()):
        try:
            for part in _parts_of(batch_path(partial, number)):
                verify_cache(part)
        except UserError as error:
            print(f"{error}: this batch and those after it are generated again", flush=True)
            damaged.append(number)
    intact = min(count, -max_over_ranks(-min(damaged, default=count + 1)) - 1)

    def remove_others() -> None:
        for path in partial.glob("batch_*"):
            if int(path.name.removeprefix("batch_")) > intact:
                shutil.rmtree(path)

    broadcast_from_rank0(remove_others)
    return intact


def _count_complete(partial: Path) -> int:
    number = 0
    while (batch_path(partial, number + 1) / _BATCH_NAME).exists():
        number += 1
    return number


def _parts_of(batch: Path) -> list[Path]:
    return [part_path(batch, number) for number in range(read_json_object(batch / _BATCH_NAME)["parts"])]


def check_header(batch: Path, header: CacheHeader) -> None:
    """Raise ``UserError`` if a batch was written with another header."""
    for part in _parts_of(batch)[:1]:
        TeacherCache.open(part, expect=header)


def write_batch(
    batch: Path,
    num_samples: int,
    distributions: dict[int, tuple[Sample, CachedDistribution]],
    header: CacheHeader,
    layout: Layout,
) -> None:
    """Write what each data-parallel rank has of a batch, then that the batch is complete. Collective.

    num_samples: of all ranks. distributions: of ``distributions_of``.
    """
    if layout.is_dp_leader:
        with CacheWriter(part_path(batch, layout.dp_rank), header) as writer:
            for index in sorted(distributions):
                writer.add(*distributions[index], position=index)
    dist.barrier()
    if dist.get_rank() == 0:
        atomic_write_json(batch / _BATCH_NAME, {"samples": num_samples, "parts": layout.dp_size})


def merge_batches(partial: Path, count: int, target: Path, header: CacheHeader, layout: Layout) -> None:
    """Write one cache of all batches, then delete the batches; collective. A rank copies sample by sample."""
    temporary = target.with_name(target.name + ".partial")

    def sizes_of_batches() -> list[int] | None:
        if target.exists():
            return None
        sizes = [
            read_json_object(batch_path(partial, number) / _BATCH_NAME)["samples"] for number in range(1, count + 1)
        ]
        if not sum(sizes):
            raise UserError("the verifier accepts no response of the teacher: there is nothing to train on")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        return sizes

    sizes = broadcast_from_rank0(sizes_of_batches)
    if sizes is not None:
        shares = np.linspace(0, sum(sizes), min(layout.dp_size, sum(sizes)) + 1).astype(int)
        if layout.is_dp_leader and layout.dp_rank < len(shares) - 1:
            first, last = shares[layout.dp_rank : layout.dp_rank + 2]
            with CacheWriter(part_path(temporary, layout.dp_rank), header) as writer:
                _copy(partial, sizes, range(first, last), header, writer)
        dist.barrier()

        def publish() -> None:
            join_parts(temporary, [part_path(temporary, number).name for number in range(len(shares) - 1)], header)
            rename(temporary, target)

        broadcast_from_rank0(publish)
    broadcast_from_rank0(lambda: shutil.rmtree(partial, ignore_errors=True))


def _copy(partial: Path, sizes: Sequence[int], share: range, header: CacheHeader, writer: CacheWriter) -> None:
    """Copy the samples ``share`` of all batches, in the order in which the stage generated them."""
    start = 0
    for number, size in enumerate(sizes, start=1):
        wanted = range(max(share.start - start, 0), min(share.stop - start, size))
        start += size
        if wanted:
            rows = _rows_in_order(batch_path(partial, number), header, size)
            for position in wanted:
                part, row = rows[position]
                sample = part.sample(row)
                writer.add(sample, part.distribution(sample, row, header))


def _rows_in_order(batch: Path, header: CacheHeader, size: int) -> list[tuple[CachePart, Any]]:
    """Return where each sample of a batch is, in their order."""
    rows: list[Any] = [None] * size
    for path in _parts_of(batch):
        part = TeacherCache.open(path, expect=header).part(0)
        for number in range(len(part.index)):
            row = part.index.row(number)
            rows[int(row["position"])] = part, row
    return rows
