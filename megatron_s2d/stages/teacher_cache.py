"""The teacher cache: responses of a teacher with its distribution at every token (methods.md M2).

Prompts are generated in batches, each written as a small cache of its own, so that a killed stage resumes with the next
batch; at the end they are merged into one. Shapes: r response tokens of a sample, h hidden size, v vocabulary.
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
from megatron_s2d.stages.inputs import StageInputs
from megatron_s2d.train.loop import Stopped, open_log, write_examples
from megatron_s2d.train.megatron_model import MegatronModel
from megatron_s2d.train.metrics import Timer
from megatron_s2d.verify import RewardManager

OUTPUT_LAYER_NAME = "output_layer.safetensors"
_PARTIAL_NAME = "partial"


def run_teacher_cache(context: StageContext) -> None:
    """Generate, select, score and write batch by batch; then merge the batches."""
    stage: TeacherCacheConfig = context.stage
    teacher = context.models.frozen(stage.teacher)
    params = context.rollouts.sampling_params(stage.sampling, context.models.name_of(stage.teacher))
    engine = context.rollouts.engine(teacher, context.models.name_of(stage.teacher), params)
    prompts = context.inputs.prompts(stage.prompts)
    header = cache_header(context.inputs, stage, teacher)
    size = stage.generation_batch_size
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    partial = context.directory.path / _PARTIAL_NAME
    num_done = count_batches(partial)
    log, timer = open_log(context.directory, num_done, None), Timer()
    with RewardManager() as reward_manager:
        worker = RolloutWorker(
            teacher.layout,
            engine,
            params,
            context.seed,
            context.inputs.tokenizer,
            reward_manager if stage.only_correct else None,
        )
        for number, batch in enumerate(batches[num_done:], start=num_done + 1):
            samples = worker.sample(batch, stage.num_generations, number)
            selected = [sample for sample in samples if not stage.only_correct or sample.reward == 1.0]
            distributions = distributions_of(teacher, selected, header) if selected else {}
            if context.is_rank_zero:
                with CacheWriter(batch_path(partial, number), header) as writer:
                    for index, sample in enumerate(selected):
                        writer.add(sample, distributions[index])
            dist.barrier()
            times = timer.collect_and_reset()
            num_tokens = sum(sample.response_length for sample in samples)
            speed = {"kept": len(selected), "tokens_per_second": num_tokens / times["timing_s/step"]}
            log.write(number, response_metrics(samples) | speed | times)
            write_examples(context.directory, examples(number, samples, batch, context.inputs.tokenizer))
            if broadcast_flag(context.stop()) and number < len(batches):
                raise Stopped(f"stopped after batch {number} of {len(batches)}")
    if header.representation == "hidden_states":
        save_output_layer(teacher, context.directory.path / OUTPUT_LAYER_NAME)
    if context.is_rank_zero:
        merge_batches(partial, len(batches), context.directory.cache_path, header)
    dist.barrier()


def cache_header(inputs: StageInputs, stage: TeacherCacheConfig, teacher: MegatronModel) -> CacheHeader:
    """Return the cache's header: what it holds, and of which teacher and tokenizer."""
    sampling_temperature = stage.sampling.temperature if stage.sampling.temperature > 0 else 1.0
    vocab_size = teacher.spec.vocab_size
    return CacheHeader(
        representation=stage.representation,
        teacher_digest=tree_digest(inputs.model_path(stage.teacher)),
        tokenizer_fingerprint=tokenizer_fingerprint(inputs.tokenizer),
        template_fingerprint=template_fingerprint(inputs.tokenizer, inputs.config.template_date),
        temperature=1.0 if stage.representation == "hidden_states" else sampling_temperature,
        vocab_size=vocab_size,
        k=min(stage.top_k, vocab_size) if stage.representation == "top_k" else None,
        hidden_size=teacher.spec.hidden_size if stage.representation == "hidden_states" else None,
    )


@torch.no_grad()
def distributions_of(
    teacher: MegatronModel, samples: list[Sample], header: CacheHeader
) -> dict[int, CachedDistribution]:
    """Return the teacher's distributions at each sample's response tokens, by index, on rank 0; collective."""
    if header.representation == "sampled_token":
        scores = teacher.score(samples)
        return {
            index: CachedDistribution(log_probs=torch.from_numpy(score[sample.response_mask]))
            for index, (sample, score) in enumerate(zip(samples, scores, strict=True))
        }
    batches = teacher.pack(samples, {})
    states = teacher.hidden_states(batches)
    distributions = {}
    if teacher.layout.is_pipeline_last_stage:
        for batch, hidden in zip(batches, states, strict=True):
            rows = batch.unpack(teacher.gather_context_parallel(batch, teacher.gather_sequence_parallel(hidden)))
            for index, row in zip(batch.indices, rows, strict=True):
                mask = torch.from_numpy(samples[index].response_mask).to(row.device)
                distributions[index] = _distribution(teacher, row[mask], header)
    return gather_dicts(distributions if teacher.layout.is_dp_leader else {}, first_only=True)


def _distribution(teacher: MegatronModel, hidden: torch.Tensor, header: CacheHeader) -> CachedDistribution:
    """hidden [r, h] -> the fields of the cache's representation, on the CPU; collective over the TP group."""
    if header.representation == "hidden_states":
        return CachedDistribution(hidden=hidden.cpu())
    logits = hidden.float() @ teacher.output_weight.float().t()
    if header.representation == "top_k":
        ids, log_probs, tail = vocab_parallel_topk(logits, header.k, teacher.shard, header.temperature)
        return CachedDistribution(
            ids=ids.int().cpu(), log_probs=log_probs.float().cpu(), log_tail_mass=tail.float().cpu()
        )
    full_logits = torch.cat(list(teacher.shard.gather(logits)), dim=1)[:, : header.vocab_size]
    return CachedDistribution(log_probs=torch.log_softmax(full_logits / header.temperature, dim=1).cpu())


def save_output_layer(teacher: MegatronModel, path: Path) -> None:
    """Write the teacher's full output layer [v, h] as a safetensors file; collective."""
    if teacher.layout.is_pipeline_last_stage and teacher.layout.dp_rank == 0:
        weight = teacher.shard.gather(teacher.output_weight.detach()).flatten(0, 1)[: teacher.spec.vocab_size]
        if teacher.layout.is_dp_leader:
            temporary = path.with_name(path.name + ".partial")
            save_file({"weight": weight.cpu().contiguous().clone()}, temporary)
            temporary.rename(path)
    dist.barrier()


def batch_path(partial: Path, number: int) -> Path:
    """Return the directory of batch ``number`` (counted from 1)."""
    return partial / f"batch_{number:05d}"


def count_batches(partial: Path) -> int:
    """Return the number of complete batches; they are written in order."""
    number = 0
    while (batch_path(partial, number + 1) / "header.json").exists():
        number += 1
    return number


def merge_batches(partial: Path, count: int, target: Path, header: CacheHeader) -> None:
    """Write one cache of all batches, then delete the batches."""
    if not target.exists():
        batches = [TeacherCache.open(batch_path(partial, number), expect=header) for number in range(1, count + 1)]
        if not any(batch.samples for batch in batches):
            raise UserError("the verifier accepts no response of the teacher: there is nothing to train on")
        with CacheWriter(target, header) as writer:
            for batch in batches:
                for sample in batch.samples:
                    writer.add(sample, batch.distribution(sample))
    shutil.rmtree(partial, ignore_errors=True)
