"""Teacher caches and evaluations of toy models: what is sampled, kept and written, also after an interruption."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from toy_models import ToyModel, model_log_probs, response_rows, rewards_of

from megatron_s2d.config.reward import FunctionReward, verifier_text
from megatron_s2d.config.training import SamplingConfig
from megatron_s2d.errors import UserError
from megatron_s2d.records import sample_from_json, sample_to_json
from megatron_s2d.report.evaluation import avg_at_k, evaluation_from_rows, pass_at_k, pass_rate
from megatron_s2d.stages.evaluate import RESPONSES_NAME, ROWS_NAME, rows_of, run_evaluation
from megatron_s2d.stages.teacher_cache import run_teacher_cache
from megatron_s2d.train.loop import Stopped

SAMPLING = {"max_response_length": 8, "temperature": 0.7}
CACHE = {
    "type": "teacher_cache", "teacher": "teacher", "prompts": "pool", "num_generations": 2, "sampling": SAMPLING,
    "generation_batch_size": 5,
}  # fmt: skip


@pytest.fixture
def teacher(workflow):
    workflow.models["teacher"] = ToyModel(2, torch.float32)
    return workflow.models["teacher"]


@pytest.mark.parametrize("representation", ["sampled_token", "top_k", "hidden_states", "full_vocab"])
def test_rows_are_the_distributions_of_the_teacher_at_the_response_tokens(workflow, teacher, representation):
    context = workflow.run("cache", representation=representation, top_k=4, **CACHE)
    cache = context.inputs.teacher_cache("cache")
    generated = [sample for batch in context.rollouts.engines[teacher].samples for sample in batch]
    assert len(generated) == 24 and [sample.id for sample in cache.samples] == [sample.id for sample in generated]
    for stored, sample in zip(cache.samples, generated, strict=True):
        assert np.array_equal(stored.token_ids, sample.token_ids) and stored.temperature == 0.7
        found = cache.distribution(stored)
        rows = response_rows(teacher.embedding, teacher.head, sample).detach()
        if representation == "sampled_token":
            expected = model_log_probs(teacher, sample)
            torch.testing.assert_close(found.log_probs.double(), expected, rtol=0, atol=1e-5)
        elif representation == "full_vocab":
            torch.testing.assert_close(found.log_probs.double(), rows, rtol=0, atol=1e-5)
        elif representation == "top_k":
            assert torch.equal(found.ids.sort(dim=1).values, rows.topk(4, dim=1).indices.sort(dim=1).values.int())
            on = rows.gather(1, found.ids.long())
            torch.testing.assert_close(found.log_probs.double(), on, rtol=0, atol=1e-5)
            tail = torch.log1p(-on.exp().sum(1))
            torch.testing.assert_close(found.log_tail_mass.double(), tail, rtol=0, atol=1e-4)
        else:
            before = torch.from_numpy(np.flatnonzero(sample.response_mask) - 1)  # the tokens that predict
            assert torch.equal(found.hidden, teacher.embedding[torch.from_numpy(sample.token_ids)[before]])


def test_only_correct_responses_are_kept(workflow, teacher):
    context = workflow.run("cache", representation="sampled_token", only_correct=True, **CACHE)
    generated = [sample for batch in context.rollouts.engines[teacher].samples for sample in batch]
    rewards = rewards_of(generated, context.inputs.prompts("pool"), context.inputs.tokenizer)
    assert 0 < rewards.sum() < 24
    kept = context.inputs.teacher_cache("cache").samples
    assert [sample.id for sample in kept] == [s.id for s, reward in zip(generated, rewards, strict=True) if reward]
    assert all(sample.reward == 1.0 and sample.verifier_label == "correct" for sample in kept)
    assert sum(row["kept"] for row in context.directory.metrics()) == len(kept)


def test_an_interrupted_cache_goes_on_with_the_next_batch(workflow, teacher):
    complete = workflow.run("complete", representation="sampled_token", **CACHE)
    stopped = workflow.context("cache", stop=lambda: True, representation="sampled_token", **CACHE)
    with pytest.raises(Stopped, match="after batch 1 of 3"):
        run_teacher_cache(stopped)
    resumed = workflow.run("cache", representation="sampled_token", **CACHE)
    assert [len(batch) for batch in resumed.rollouts.engines[teacher].samples] == [10, 4]
    caches = [resumed.inputs.teacher_cache(name) for name in ("complete", "cache")]
    whole, parts = ([(s.id, s.token_ids.tolist()) for s in cache.samples] for cache in caches)
    assert whole == parts and complete.seed == resumed.seed
    assert [row["step"] for row in resumed.directory.metrics()] == [1, 2, 3]


def test_an_interrupted_cache_of_another_teacher_is_refused_before_more_is_generated(workflow, teacher):
    stopped = workflow.context("cache", stop=lambda: True, representation="sampled_token", **CACHE)
    with pytest.raises(Stopped):
        run_teacher_cache(stopped)
    (workflow.directories["teacher"].model_path / "weights").write_text("changed")
    resumed = workflow.context("cache", representation="sampled_token", **CACHE)
    with pytest.raises(UserError, match="teacher_digest is .* this run expects"):
        run_teacher_cache(resumed)
    assert not resumed.rollouts.engines[teacher].samples


def evaluate(workflow, stop=lambda: False, samples_per_prompt=(3, 2)):
    """Evaluate the student on both entries, with different numbers of samples; return (rows, context)."""
    context = workflow.context("student", stop=stop, type="load_checkpoint", model="toy")
    sets = [(context.inputs.prompts(name), k) for name, k in zip(("pool", "other"), samples_per_prompt, strict=True)]
    run_evaluation(context, sets, sampling=SamplingConfig(**SAMPLING), seed=11, eval_batch_size=5)
    return [json.loads(line) for line in (context.directory.path / ROWS_NAME).read_text().splitlines()], context


def test_evaluation_has_a_row_for_each_problem_with_its_own_samples(workflow):
    rows, context = evaluate(workflow)
    batches = context.rollouts.engines[workflow.models["student"]].samples
    assert [len(batch) for batch in batches] == [15, 15, 6, 8]  # 12 problems in batches of 5, then 4
    prompts = {prompt.id: prompt for name in ("pool", "other") for prompt in context.inputs.prompts(name)}
    assert [row["problem_id"] for row in rows] == list(prompts)
    rewards = []
    for row in rows:
        own = [sample for batch in batches for sample in batch if sample.prompt_id == row["problem_id"]]
        expected = rewards_of(own, [prompts[row["problem_id"]]], context.inputs.tokenizer)
        assert row["rewards"] == expected.tolist() and row["domain"] == "arithmetic"
        assert row["response_lengths"] == [sample.response_length for sample in own]
        assert row["finish_reasons"] == [sample.finish_reason for sample in own]
        rewards += row["rewards"]
    assert 0 < np.mean(rewards) < 1


def test_every_response_of_an_evaluation_is_on_disk_with_its_verdict(workflow):
    with pytest.raises(Stopped):
        evaluate(workflow, stop=lambda: True)
    rows, context = evaluate(workflow)
    responses = [json.loads(line) for line in (context.directory.path / RESPONSES_NAME).read_text().splitlines()]
    assert [row["problem_id"] for row in responses] == [r["problem_id"] for r in rows for _ in r["rewards"]]
    assert [row["verifier_label"] for row in responses] == [label for r in rows for label in r["verifier_labels"]]
    assert [row["reward"] for row in responses] == [reward for r in rows for reward in r["rewards"]]
    assert all(row["response"] for row in responses) and {row["sample"] for row in responses} == {0, 1, 2}
    shares = evaluation_from_rows(rows[:12], "test").verdict_shares  # the entry with three samples a problem
    labels = [row["verifier_label"] for row in responses[:36]]
    assert shares == {label: labels.count(label) / len(labels) for label in set(labels)} and "truncated" in shares


def test_an_interrupted_evaluation_ends_like_an_uninterrupted_one(workflow):
    with pytest.raises(Stopped, match="after batch 1 of 4"):
        evaluate(workflow, stop=lambda: True)
    rows, context = evaluate(workflow)
    assert [len(batch) for batch in context.rollouts.engines[workflow.models["student"]].samples] == [15, 6, 8]
    (context.directory.path / "partial.jsonl").unlink()
    context.directory.metrics_path.unlink()
    assert evaluate(workflow)[0] == rows


def test_rows_take_consecutive_samples(fakes):
    samples = [
        fakes.sample(f"{group}{index}", 1 + index, group=group, reward=1.0) for group in (0, 1) for index in (0, 1)
    ]
    rows = rows_of([fakes.prompt("p0"), fakes.prompt("p1")], samples)
    assert [row["response_lengths"] for row in rows] == [[1, 2], [1, 2]]
    assert "correct" not in rows[0]


def test_rows_of_real_rewards_say_which_responses_are_correct(fakes):
    prompt = dataclasses.replace(
        fakes.prompt("p"), verifier=verifier_text(FunctionReward(function="a:b", correct_at=0.5))
    )
    samples = [
        dataclasses.replace(fakes.sample(label, 1, reward=reward), verifier_label=label)
        for label, reward in (("correct", 0.5), ("wrong", 0.25), ("timeout", 2.0), ("correct", 3.0))
    ]
    (row,) = rows_of([prompt], samples)
    assert row["rewards"] == [0.5, 0.25, 2.0, 3.0] and row["correct"] == [True, False, False, True]
    evaluation = evaluation_from_rows([row], "test")
    assert avg_at_k(evaluation).mean == 1.4375 and pass_rate(evaluation).mean == 0.5
    assert pass_at_k(evaluation, [1, 2])[2].mean == pytest.approx(1 - 1 / 6)
    with pytest.raises(UserError, match="pass@k needs rewards of 0 and 1"):
        pass_at_k(evaluation_from_rows([row | {"correct": None}], "test"))
    with pytest.raises(UserError, match="'correct' must list one entry for each of the 4 samples"):
        evaluation_from_rows([row | {"correct": [True]}], "test")


def test_samples_from_before_remarks_of_judges_are_read(fakes):
    sample = dataclasses.replace(fakes.sample("a", 2), verifier_detail="two of three")
    assert sample_from_json(sample_to_json(sample)).verifier_detail == "two of three"
    fields = json.loads(sample_to_json(sample))
    del fields["verifier_detail"]
    assert sample_from_json(json.dumps(fields)).verifier_detail is None
