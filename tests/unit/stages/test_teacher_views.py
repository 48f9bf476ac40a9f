"""A teacher that reads other prompts than the student, in stages on toy models (docs/teachers.md).

A toy's next token depends on the last one alone, so the first response token shows which prompt a model has read.
"""

import dataclasses
import json
import types

import numpy as np
import pytest
import torch
from test_run_opd import SETTINGS, policy_loss, run, scores_of
from toy_models import assert_matches, log_probs_of, model_log_probs

from megatron_s2d.data.packing import pack
from megatron_s2d.errors import UserError
from megatron_s2d.records import Sample
from megatron_s2d.stages.policy_loss import policy_loss_weights
from megatron_s2d.teachers.views import behind, from_view
from megatron_s2d.train.pass_metrics import _kl_of_parts

VIEW = {"context": "{solution} {question} 3"}


def in_view(context, samples, relation="teacher"):
    views = context.inputs.prompt_views("opd", relation)
    return [behind(prompt.token_ids, sample) for sample, prompt in zip(samples, _prompts(views, samples), strict=True)]


def _prompts(views, samples):
    found = views.tables[None].find([sample.prompt_id for sample in samples])
    return [found[sample.prompt_id] for sample in samples]


def test_teacher_and_reference_score_the_response_behind_prompts_of_their_own(workflow):
    updates, samples, context = run(
        workflow, kl_estimator="sampled_token", reward_scale=1.5, reference="reference", teacher_view=VIEW,
        reference_view={"context": "4 {prompt} 5"},
    )  # fmt: skip
    for update, batch in zip(updates, samples, strict=True):
        student, teacher, reference = (
            torch.cat([model_log_probs(model, sample) for sample in read]).numpy()
            for model, read in [
                (update, batch),
                (workflow.models["teacher"], in_view(context, batch)),
                (workflow.models["reference"], in_view(context, batch, "reference")),
            ]
        )
        assert_matches(update, policy_loss(batch, (teacher - student) + 0.5 * (teacher - reference)))
        read = in_view(context, batch)
        assert {len(a.token_ids) - len(b.token_ids) for a, b in zip(read, batch, strict=True)} == {6}
    tokenizer = context.inputs.tokenizer
    text = tokenizer.decode(read[0].token_ids[~read[0].response_mask].tolist()).split()
    answer = context.inputs.prompts("pool").find([batch[0].prompt_id])[batch[0].prompt_id].answer
    assert text[-2:] == ["=", "3"] and text[2:5] == ["[", answer, "]"]  # two steps, the answer, the question


def test_an_equal_view_changes_nothing(workflow):
    context = workflow.context("opd", **SETTINGS, teacher_view={"context": "{prompt}"})
    assert context.inputs.prompt_views("opd", "teacher") is None
    assert workflow.context("opd", **SETTINGS).inputs.prompt_views("opd", "teacher") is None


def test_a_view_leaves_out_prompts_that_are_too_long_in_it(workflow, tmp_path):
    rows = [{"question": "1 + 2 =", "solution": "3 [ 3 ]"}, {"question": "1 + 2 + 3 =", "solution": "3 6 [ 6 ]"}] * 3
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    workflow.data["rows"] = {"type": "file", "path": str(path), "template": "plain", "verifier": None,
                             "columns": {"solution": "solution"}}  # fmt: skip
    settings = SETTINGS | {"prompts": "rows", "teacher_view": VIEW | {"max_prompt_length": 9}}
    context = workflow.context("opd", **settings)
    assert [prompt.text for prompt in context.inputs.stage_prompts("opd")] == ["1 + 2 ="] * 3
    views = context.inputs.prompt_views("opd", "teacher")
    assert [prompt.text for prompt in views.tables[None]] == ["3 [ 3 ] 1 + 2 = 3"] * 3
    with pytest.raises(UserError, match="teacher_view.max_prompt_length: 3: all prompts of 'rows' are longer"):
        settings["teacher_view"] = VIEW | {"max_prompt_length": 3}
        workflow.context("opd", **settings).inputs.stage_prompts("opd")


def test_a_cache_holds_the_prompt_of_the_student_and_distributions_behind_that_of_the_teacher(workflow):
    cache = {"type": "teacher_cache", "teacher": "teacher", "prompts": "pool", "num_generations": 2,
             "sampling": {"max_response_length": 8}, "representation": "full_vocab", "teacher_view": VIEW}  # fmt: skip
    context = workflow.run("cache", **cache)

    stored = workflow.context("cache", **cache).inputs.teacher_cache("cache")
    views, teacher = context.inputs.prompt_views("cache", "teacher"), workflow.models["teacher"]
    prompts = context.inputs.stage_prompts("cache")
    assert len(stored.samples) == 24
    for sample, prompt in zip(stored.samples, _prompts(views, stored.samples), strict=True):
        own = prompts.find([sample.prompt_id])[sample.prompt_id].token_ids
        np.testing.assert_array_equal(sample.token_ids[~sample.response_mask], own)
        read = behind(prompt.token_ids, sample)
        expected = log_probs_of(teacher.embedding, teacher.head, read.token_ids, 1.0)[read.response_mask[1:]]
        torch.testing.assert_close(stored.distribution(sample).log_probs.double(), expected, rtol=0, atol=1e-5)
    workflow.run("warm_up", type="forward_kl", init="student", cache="cache", steps=1, global_batch_size=4)
    changed = workflow.context("cache", **cache | {"teacher_view": {"context": "{question} 4"}})
    with pytest.raises(UserError, match="view_fingerprint"):
        changed.inputs.teacher_cache("cache")


def test_values_of_a_view_come_back_by_index_in_the_response(workflow):
    _, samples, context = run(workflow, kl_estimator="sampled_token", teacher_view=VIEW)
    sample = samples[0][0]
    read = in_view(context, [sample])[0]
    back = from_view(np.arange(read.length, dtype=np.float32), sample)
    np.testing.assert_array_equal(back[sample.response_mask], np.flatnonzero(read.response_mask))
    assert not back[~sample.response_mask].any()
    assert read.rollout_log_probs is None and read.response_length == sample.response_length


def test_a_student_teaches_itself_what_it_knows_behind_another_prompt(workflow):
    """The teacher has the weights of the moment, not those of the start."""
    updates, samples, context = run(workflow, kl_estimator="sampled_token", teacher="self", teacher_view=VIEW)
    for update, batch in zip(updates, samples, strict=True):
        student, teacher = (
            torch.cat([model_log_probs(update, sample) for sample in read]).numpy()
            for read in (batch, in_view(context, batch))
        )
        assert np.abs(teacher - student).max() > 0.1
        assert_matches(update, policy_loss(batch, teacher - student))
    assert not torch.equal(updates[0].head, updates[1].head)
    with pytest.raises(UserError, match="teacher: self needs a teacher_view"):
        workflow.context("opd", **SETTINGS | {"teacher": "self"})


def test_a_clip_limits_what_one_token_can_do(workflow):
    updates, samples, _ = run(workflow, kl_estimator="sampled_token", log_ratio_clip=0.3)
    for update, batch in zip(updates, samples, strict=True):
        student, teacher, _ = scores_of(workflow, update, batch)
        assert 0.1 < (np.abs(teacher - student) > 0.3).mean() < 0.9
        assert_matches(update, policy_loss(batch, np.clip(teacher - student, -0.3, 0.3)))
        assert update.metrics["kl"] == pytest.approx((student - teacher).mean(), rel=1e-5)  # as measured


def test_a_run_whose_responses_no_longer_end_stops(workflow):
    with pytest.raises(UserError, match="step 1: .* of the responses run into max_response_length"):
        run(workflow, max_truncated_fraction=0.01)


@pytest.mark.parametrize(("weights", "share"), [("equal", 0.5), ({"short": 3.0, "long": 1.0}, 0.75)])
def test_domains_have_their_share_of_the_loss(weights, share):
    """With lengths of 10 to 1 and as many responses, one average gives the short domain a share of 1 in 11."""
    samples = [make_sample(index, domain, length) for index, (domain, length) in enumerate(
        [("short", 4), ("long", 40)] * 3)]  # fmt: skip
    lengths = np.array([sample.response_length for sample in samples])
    is_short = np.array([sample.domain == "short" for sample in samples])
    for mode in ("token_mean", "seq_mean_token_mean"):
        stage = types.SimpleNamespace(
            truncated_responses="keep", loss_agg_mode=mode, domain_weights=weights,
            sampling=types.SimpleNamespace(max_response_length=40),
        )  # fmt: skip
        of_tokens = policy_loss_weights(samples, stage) * lengths
        assert of_tokens.sum() == pytest.approx(1) and of_tokens[is_short].sum() == pytest.approx(share)
        stage.domain_weights = None
        plain = policy_loss_weights(samples, stage) * lengths
        assert plain[is_short].sum() == pytest.approx(1 / 11 if mode == "token_mean" else 1 / 2)
        only_short = policy_loss_weights(samples[::2], stage)
        stage.domain_weights = weights
        np.testing.assert_allclose(policy_loss_weights(samples[::2], stage), only_short)  # the other is not there


def make_sample(index, domain, length):
    mask = np.arange(2 + length) >= 2
    return Sample(f"{index}", "p", "p@0.0", domain, 0, np.arange(2 + length) % 9, mask, 1.0, "stop")


def test_kl_of_the_end_token_and_of_domains():
    samples = [make_sample(0, "short", 2), dataclasses.replace(make_sample(1, "long", 3), finish_reason="length")]
    (batch,) = pack(samples, loss_weights={"divergence_weight": [1.0, 1.0]}, max_tokens=20)
    rows = batch.response_rows
    values = torch.arange(len(batch.labels), dtype=torch.float32)[rows]
    metrics = {name: metric.value() for name, metric in _kl_of_parts(values, batch, rows).items()}
    end = {}
    for index, positions in zip(batch.indices, batch.positions(), strict=True):
        of_sample = torch.arange(len(batch.labels), dtype=torch.float32)[positions]
        end[index] = of_sample[len(of_sample) - 2]
        name = samples[index].domain
        assert metrics[f"domain/{name}/kl"] == pytest.approx(of_sample[1:-1].mean().item())
    assert metrics["kl/end_token"] == float(end[0])  # the other one was cut
