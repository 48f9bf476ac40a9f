"""The teacher cache: responses of a teacher with its distribution at every token (methods.md M2).

The work is cut into rounds, each written as a small cache of its own, so a killed stage goes on with the next round; at
the end they are joined into one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_s2d.artifacts.files import tree_digest
from megatron_s2d.config.forward_kl import TeacherCacheConfig
from megatron_s2d.data.cache import (
    CachedDistribution,
    CacheHeader,
    CacheWriter,
    TeacherCache,
)
from megatron_s2d.data.tokenizer import template_fingerprint, tokenizer_fingerprint
from megatron_s2d.errors import UserError
from megatron_s2d.kl.logits import vocab_parallel_topk
from megatron_s2d.parallel.collectives import broadcast_flag, gather_dicts
from megatron_s2d.records import Sample
from megatron_s2d.rollout.sampler import RolloutWorker, examples, response_metrics
from megatron_s2d.stages.context import StageContext
from megatron_s2d.train.loop import Stopped, open_log, write_examples
from megatron_s2d.train.metrics import Timer
from megatron_s2d.train.policy import MegatronModel
from megatron_s2d.verify import RewardManager

OUTPUT_LAYER_NAME = "output_layer.safetensors"


def run_teacher_cache(context: StageContext) -> None:
    """Generate, keep, score, write round by round; then join the rounds."""
    stage: TeacherCacheConfig = context.stage
    teacher = context.frozen(stage.teacher)
    model = context.config.model_of(stage.teacher)
    params = context.sampling(stage.sampling, model)
    engine = context.engine(teacher, model, params)
    prompts = context.prompts(stage.prompts)
    header = cache_header(context, stage, teacher)
    rounds = [prompts[i : i + stage.generation_batch_size] for i in range(0, len(prompts), stage.generation_batch_size)]
    parts = context.directory.path / "rounds"
    done = count_rounds(parts)
    log, timer = open_log(context.directory, done, None), Timer()
    with RewardManager() as graders:
        judge = graders if stage.only_correct else None
        sampler = RolloutWorker(teacher.layout, engine, params, context.seed, context.tokenizer, judge)
        for number, part in enumerate(rounds[done:], start=done + 1):
            samples = sampler.sample(part, stage.num_generations, number)
            kept = [sample for sample in samples if not stage.only_correct or sample.reward == 1.0]
            distributions = distributions_of(teacher, kept, header) if kept else {}
            if context.is_rank_zero:
                with CacheWriter(round_path(parts, number), header) as writer:
                    for index, sample in enumerate(kept):
                        writer.add(sample, distributions[index])
            dist.barrier()
            times = timer.collect_and_reset()
            tokens = sum(sample.response_length for sample in samples)
            measured = {"kept": len(kept), "tokens_per_second": tokens / times["timing_s/step"]}
            log.write(number, response_metrics(samples) | measured | times)
            write_examples(context.directory, examples(number, samples, part, context.tokenizer))
            if broadcast_flag(context.stop()) and number < len(rounds):
                raise Stopped(f"stopped after round {number} of {len(rounds)}")
    if header.representation == "hidden_states":
        save_output_layer(teacher, context.directory.path / OUTPUT_LAYER_NAME)
    if context.is_rank_zero:
        join_rounds(parts, len(rounds), context.directory.cache_path, header)
    dist.barrier()


def cache_header(context: StageContext, stage: TeacherCacheConfig, teacher: MegatronModel) -> CacheHeader:
    """What the cache will say of itself."""
    sampled_at = stage.sampling.temperature if stage.sampling.temperature > 0 else 1.0
    vocab_size = teacher.spec.vocab_size
    return CacheHeader(
        representation=stage.representation,
        teacher_digest=tree_digest(context.model_directory(stage.teacher)),
        tokenizer_fingerprint=tokenizer_fingerprint(context.tokenizer),
        template_fingerprint=template_fingerprint(context.tokenizer),
        temperature=1.0 if stage.representation == "hidden_states" else sampled_at,
        vocab_size=vocab_size,
        k=min(stage.top_k, vocab_size) if stage.representation == "top_k" else None,
        hidden_size=teacher.spec.hidden_size if stage.representation == "hidden_states" else None,
    )


@torch.no_grad()
def distributions_of(
    teacher: MegatronModel, samples: list[Sample], header: CacheHeader
) -> dict[int, CachedDistribution]:
    """The teacher at the response tokens of every sample, on rank 0, which writes; keys are places in ``samples``."""
    if header.representation == "sampled_token":
        scores = teacher.score(samples)
        return {
            index: CachedDistribution(log_probs=torch.from_numpy(score[sample.response_mask]))
            for index, (sample, score) in enumerate(zip(samples, scores, strict=True))
        }
    batches = teacher.pack(samples, {})
    states = teacher.hidden_states(batches)
    found = {}
    if teacher.layout.is_pipeline_last_stage:
        for batch, hidden in zip(batches, states, strict=True):
            rows = batch.unpack(teacher.all_positions(batch, teacher.whole_sequences(hidden)))
            for index, row in zip(batch.indices, rows, strict=True):
                mask = torch.from_numpy(samples[index].response_mask).to(row.device)
                found[index] = _distribution(teacher, row[mask], header)
    return gather_dicts(found if teacher.is_dp_leader else {}, first_only=True)


def _distribution(teacher: MegatronModel, hidden: torch.Tensor, header: CacheHeader) -> CachedDistribution:
    """hidden [R, d] -> the fields of the cache's kind, on the CPU; collective over the tensor-parallel group."""
    if header.representation == "hidden_states":
        return CachedDistribution(hidden=hidden.cpu())
    logits = hidden.float() @ teacher.output_weight.float().t()
    if header.representation == "top_k":
        shard = teacher.shard
        ids, log_probs, tail = vocab_parallel_topk(logits, header.k, shard, header.temperature)
        return CachedDistribution(
            ids=ids.int().cpu(), log_probs=log_probs.float().cpu(), log_tail_mass=tail.float().cpu()
        )
    whole = torch.cat(list(teacher.shard.gather(logits)), dim=1)[:, : header.vocab_size]
    return CachedDistribution(log_probs=torch.log_softmax(whole / header.temperature, dim=1).cpu())


def save_output_layer(teacher: MegatronModel, path: Path) -> None:
    """The teacher's whole output layer as a safetensors file; collective."""
    if teacher.layout.is_pipeline_last_stage and teacher.layout.dp_rank == 0:
        whole = teacher.shard.gather(teacher.output_weight.detach()).flatten(0, 1)[: teacher.spec.vocab_size]
        if teacher.is_dp_leader:
            temporary = path.with_name(path.name + ".partial")
            save_file({"weight": whole.cpu().contiguous().clone()}, temporary)
            temporary.rename(path)
    dist.barrier()


def round_path(parts: Path, number: int) -> Path:
    """Directory of round ``number`` (counted from 1)."""
    return parts / f"round_{number:05d}"


def count_rounds(parts: Path) -> int:
    """Rounds that are complete; they are written in order."""
    number = 0
    while (round_path(parts, number + 1) / "header.json").exists():
        number += 1
    return number


def join_rounds(parts: Path, count: int, target: Path, header: CacheHeader) -> None:
    """One cache of all rounds; the rounds go when it stands."""
    if not target.exists():
        rounds = [TeacherCache.open(round_path(parts, number), expect=header) for number in range(1, count + 1)]
        if not any(part.samples for part in rounds):
            raise UserError("the verifier accepts no response of the teacher: there is nothing to train on")
        with CacheWriter(target, header) as writer:
            for part in rounds:
                for sample in part.samples:
                    writer.add(sample, part.distribution(sample))
    shutil.rmtree(parts, ignore_errors=True)
