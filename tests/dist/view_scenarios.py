"""A teacher that reads other prompts than the student, at any layout, and the same in float64 without Megatron.

Prompts in the teacher's view are longer for some samples and shorter for others, so that its micro-batches hold other
tokens, in another order, than the student's. Scenarios of ``training_worker.py``; ``reference`` runs on one rank.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import training_worker as worker

from megatron_s2d.config.hf_config import hf_config_from_spec
from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.data.sample_exchange import keep_own
from megatron_s2d.kl.reference import dense_outputs, dense_support_outputs
from megatron_s2d.models.weights import export_buckets
from megatron_s2d.objectives.distill import divergence_objective
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.teachers.frozen import FullTeacher, TeacherRouter, TopKTeacher
from megatron_s2d.teachers.views import PromptViews, behind

K = 3
FOUR_HEADS = {"num_attention_heads": 4, "num_query_groups": 4, "head_dim": 12}  # of the tiny student, which has two


def batch() -> list[Sample]:
    """Samples of two domains at two temperatures."""
    return [
        dataclasses.replace(
            sample,
            prompt_id=str(index),
            domain=("test", "other")[index % 2],
            temperature=(1.0, 0.7)[index % 3 == 0],
            advantages=None,
        )
        for index, sample in enumerate(worker.samples())
    ]


def views(domain: str | None = None) -> PromptViews:
    """Random prompts of 1 to 19 tokens. domain: only of its problems."""
    rng = np.random.default_rng(9)
    prompts = [
        Prompt(sample.prompt_id, rng.integers(0, worker.VOCAB, rng.integers(1, 20)), "", sample.domain, None, None)
        for sample in batch()
    ]
    return PromptViews({domain: PromptTable.of([p for p in prompts if domain in (None, p.domain)])})


def untrained_student(layout: Layout):
    """With four heads, for up to four tensor-parallel ranks."""
    return worker.policy("tiny-student", layout, 5, **FOUR_HEADS)


def models(layout: Layout, teacher_layout: Layout):
    """(student, teacher); one takes 40 tokens a micro-batch, the other 29."""
    student = untrained_student(layout)
    teacher = worker.policy("tiny-teacher", teacher_layout, 4, max_tokens=29)
    teacher.freeze()
    return student, teacher


def full(layout: Layout, teacher_layout: Layout | None = None) -> list[dict[str, float]]:
    """Two updates of exact reverse KL."""
    student, teacher = models(layout, teacher_layout or layout)
    columns = {"divergence_weight": worker.weights(batch(), "token_mean")}
    source = FullTeacher(student, TeacherRouter({None: teacher}, views()))
    return worker.train(student, batch(), divergence_objective("reverse_kl"), columns, source)


def by_domain(layout: Layout, teacher_layout: Layout | None = None) -> list[dict[str, float]]:
    """Two teachers of which only that of "other" has a view."""
    student, teacher = models(layout, teacher_layout or layout)
    student.packs_by_domain = True
    columns = {"divergence_weight": worker.weights(batch(), "token_mean")}
    source = FullTeacher(student, TeacherRouter({"test": teacher, "other": teacher}, views("other")))
    return worker.train(student, batch(), divergence_objective("reverse_kl"), columns, source)


def top_k(layout: Layout, teacher_layout: Layout | None = None) -> list[dict[str, float]]:
    """Forward KL on the student's and the teacher's likeliest tokens."""
    student, teacher = models(layout, teacher_layout or layout)
    columns = {"divergence_weight": worker.weights(batch(), "token_mean")}
    source = TopKTeacher(student, TeacherRouter({None: teacher}, views()), K, "union", "bucket")
    return worker.train(student, batch(), divergence_objective("forward_kl", tail="bucket"), columns, source)


def sampled(layout: Layout, teacher_layout: Layout | None = None) -> list[list[float]]:
    """The teacher's log-probabilities of the sampled tokens."""
    _, teacher = models(layout, teacher_layout or layout)
    scores = TeacherRouter({None: teacher}, views()).score(keep_own(batch(), layout), holders=layout)
    local = {index: score.tolist() for index, score in enumerate(scores) if score is not None and layout.is_dp_leader}
    gathered = worker.union(local)
    return [gathered[index] for index in range(len(scores))]


def self_taught(layout: Layout, teacher_layout: Layout | None = None) -> list[dict[str, float]]:
    """The student is its own teacher, with the weights of the moment, in another view."""
    student, _ = models(layout, layout)
    columns = {"divergence_weight": worker.weights(batch(), "token_mean")}
    source = FullTeacher(student, TeacherRouter({None: student}, views()))
    return worker.train(student, batch(), divergence_objective("reverse_kl"), columns, source)


SCENARIOS = {
    "view_full": full,
    "view_by_domain": by_domain,
    "view_top_k": top_k,
    "view_self": self_taught,
    "view_sampled": sampled,
}


def reference(layout: Layout) -> dict[str, dict[str, float] | list[list[float]]]:
    """Loss and gradient norm of the first update of each scenario, from transformers' models in float64."""
    student, teacher = (in_float64(model, layout) for model in models(layout, layout))
    result: dict = {"view_sampled": []}
    prompts = {prompt.id: prompt.token_ids for prompt in views().tables[None]}
    read = [behind(prompts[sample.prompt_id], sample) for sample in batch()]
    count = sum(sample.response_length for sample in batch())
    totals = dict.fromkeys(("view_full", "view_by_domain", "view_top_k", "view_self"), 0.0)
    for sample, as_read in zip(batch(), read, strict=True):
        z, y, plain = logits(student, sample), logits(teacher, as_read), logits(teacher, sample)
        totals["view_full"] += dense_outputs(z, y, ("reverse_kl",)).reverse_kl.sum() / count
        other = y if sample.domain == "other" else plain
        totals["view_by_domain"] += dense_outputs(z, other, ("reverse_kl",)).reverse_kl.sum() / count
        itself = logits(student, as_read).detach()
        totals["view_self"] += dense_outputs(z, itself, ("reverse_kl",)).reverse_kl.sum() / count
        ids, log_q, log_tail = union_support(z, y)
        outputs = dense_support_outputs(z, ids, log_q, log_tail, "bucket", ("forward_kl",))
        totals["view_top_k"] += outputs.forward_kl.sum() / count
        scores = np.zeros(sample.length)
        targets = torch.from_numpy(sample.token_ids[sample.response_mask])
        log_probs = torch.log_softmax(y, -1).gather(1, targets[:, None]).squeeze(1)
        scores[sample.response_mask] = log_probs.detach().numpy()
        result["view_sampled"].append(scores.tolist())
    for name, total in totals.items():
        gradients = torch.autograd.grad(total, list(student.parameters()), retain_graph=True)
        norm = sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5
        result[name] = {"loss": float(total), "grad_norm": norm}
    return result


def in_float64(model, layout: Layout) -> torch.nn.Module:
    """Return transformers' model with the weights of ``model``."""
    import transformers

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(hf_config_from_spec(model.spec, "float32")))
        config = transformers.AutoConfig.from_pretrained(directory)
    result = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    weights = dict(chain.from_iterable(export_buckets(model.chunks, model.spec, layout)))
    missing, unexpected = result.load_state_dict(
        {name: value.double() for name, value in weights.items()}, strict=False
    )
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    result.tie_weights()
    return result


def logits(model: torch.nn.Module, sample: Sample) -> torch.Tensor:
    """Return the logits [r, v] that predict the response, over the sample's temperature."""
    values = model(torch.from_numpy(sample.token_ids)[None]).logits[0, :-1]
    return values[torch.from_numpy(sample.response_mask[1:])] / sample.temperature


def union_support(z: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (ids, the teacher's log-probabilities, log tail mass): the student's K, then as many of the teacher's."""
    rows = []
    for of_student, of_teacher in zip(z.detach(), y.detach(), strict=True):
        ids = of_student.topk(K).indices.tolist()
        ids += [index for index in of_teacher.argsort(descending=True).tolist() if index not in ids][:K]
        rows.append(ids)
    ids = torch.tensor(rows)
    log_q = torch.log_softmax(y.detach(), -1)
    inside = torch.zeros_like(log_q, dtype=torch.bool).scatter_(1, ids, True)
    return ids, log_q.gather(1, ids), torch.logsumexp(log_q.masked_fill(inside, -torch.inf), -1)
