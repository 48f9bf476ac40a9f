"""Stages without rollouts on toy models: SFT, forward KL on a cache, extrapolation, published weights."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from toy_models import ToyModel, assert_matches, response_log_probs, response_rows

SAMPLING = {"max_response_length": 8, "temperature": 0.7}
OFFLINE = {"init": "student", "steps": 3, "global_batch_size": 4, "optimizer": {"lr": 0.02}}


def write_cache(workflow, representation="sampled_token", name="cache", **settings):
    workflow.run(
        name, type="teacher_cache", teacher="teacher", prompts="pool", num_generations=1, sampling=SAMPLING,
        representation=representation, **settings,
    )  # fmt: skip


def shuffled(items, seed, num_epochs):
    """Return the items in the order of each epoch, one epoch after the other."""
    orders = [np.random.default_rng([seed, epoch]).permutation(len(items)) for epoch in range(num_epochs)]
    return [items[index] for order in orders for index in order]


def cross_entropy(samples, divisor):
    def loss(embedding, head):
        return -torch.cat([response_log_probs(embedding, head, sample) for sample in samples]).sum() / divisor

    return loss


def test_sft_on_the_responses_of_two_caches(workflow):
    """Twelve responses of each; the temperature that they were sampled at does not matter."""
    write_cache(workflow)
    write_cache(workflow, name="more", seed=1)
    context = workflow.run("sft", type="sft", cache=["cache", "more"], **(OFFLINE | {"steps": 7}))
    stored = [sample for name in ("cache", "more") for sample in context.inputs.teacher_cache(name).samples]
    assert len(stored) == 24 and len({tuple(sample.token_ids) for sample in stored}) > 12
    order = shuffled([dataclasses.replace(sample, temperature=1.0) for sample in stored], context.seed, 2)
    updates = context.models.trained.updates
    assert len(updates) == context.models.trained.total_updates == 7
    for step, update in enumerate(updates):  # six batches an epoch
        batch = order[4 * step : 4 * step + 4]
        assert_matches(update, cross_entropy(batch, sum(sample.response_length for sample in batch)))


def test_sft_on_solutions_trains_on_their_tokens_only(workflow):
    problems = [("[ 1 + 2 ]", "3 2 1"), ("[ 4 ]", "1"), ("[ 2 * 2 ]", "4 4")]
    path = workflow.folder / "solutions.jsonl"
    rows = [{"question": question, "solution": solution} for question, solution in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"solution": "solution", "answer": None}
    workflow.data["solutions"] = {
        "type": "file", "path": str(path), "template": "plain", "verifier": None, "columns": columns
    }  # fmt: skip
    context = workflow.run(
        "sft", type="sft", data="solutions",
        **(OFFLINE | {"steps": 1, "global_batch_size": 3, "loss_agg_mode": "seq_mean_token_sum_norm"}),
    )  # fmt: skip
    tokenizer, total = context.inputs.tokenizer, 3 * 4  # the longest solution has four tokens, its end included
    (update,) = context.models.trained.updates

    def loss(embedding, head):
        value = 0.0
        for question, solution in problems:
            prompt = tokenizer(question)["input_ids"]
            response = [*tokenizer(solution, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            tokens = torch.tensor([*prompt, *response])
            log_probs = torch.log_softmax(embedding[tokens[:-1]] @ head.t(), dim=1).gather(1, tokens[1:, None])
            value = value - log_probs[len(prompt) - 1 :].sum() / total
        return value

    assert_matches(update, loss)


def test_sft_on_a_corpus_reads_the_next_documents_at_every_step(workflow):
    workflow.data["corpus"] = {"type": "task", "split": "corpus", "num_operations": 2}
    context = workflow.run("sft", type="sft", data="corpus", **(OFFLINE | {"steps": 2, "global_batch_size": 6}))
    first, second = (update.loss for update in context.models.trained.updates)
    lengths = [row["response_length"] for row in context.directory.metrics()]
    assert first != second and lengths[0] != lengths[1]


@pytest.mark.parametrize("representation", ["hidden_states", "full_vocab", "top_k"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_forward_kl_to_the_cached_distributions(workflow, representation, temperature):
    if representation == "top_k" and temperature != SAMPLING["temperature"]:
        return  # refused: its log-probabilities have the temperature of sampling
    workflow.models["teacher"] = ToyModel(2, torch.float32)  # the dtypes of a cache
    write_cache(workflow, representation, top_k=5)
    context = workflow.run("forward_kl", type="forward_kl", cache="cache", temperature=temperature, **OFFLINE)
    stored = context.inputs.teacher_cache("cache").samples
    order = shuffled([dataclasses.replace(sample, temperature=temperature) for sample in stored], context.seed, 1)
    updates = context.models.trained.updates
    assert len(updates) == 3
    for step, update in enumerate(updates):
        batch = order[4 * step : 4 * step + 4]
        teacher = workflow.models["teacher"]
        q = torch.cat([response_rows(teacher.embedding, teacher.head, sample).detach() for sample in batch])

        def loss(embedding, head, batch=batch, q=q):
            p = torch.cat([response_rows(embedding, head, sample) for sample in batch])
            if representation != "top_k":
                return (q.exp() * (q - p)).sum(1).mean()
            ids = q.topk(5, dim=1).indices
            on_p, on_q = p.gather(1, ids), q.gather(1, ids)
            off_p, off_q = 1 - on_p.exp().sum(1), 1 - on_q.exp().sum(1)
            return ((on_q.exp() * (on_q - on_p)).sum(1) + off_q * (off_q.log() - off_p.log())).mean()

        assert_matches(update, loss)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_expo_extrapolates_from_the_mean_of_the_tuned_models(workflow, alpha):
    tables = {name: [t.detach().clone() for t in model.chunks[0]] for name, model in workflow.models.items()}
    workflow.run("expo", type="expo", base="student", tuned=["teacher", "reference"], alpha=alpha)
    for index, saved in enumerate(workflow.models["student"].saved):
        mean = (tables["teacher"][index] + tables["reference"][index]) / 2
        expected = mean + alpha * (mean - tables["student"][index])
        torch.testing.assert_close(saved, expected, rtol=1e-6, atol=1e-6)
