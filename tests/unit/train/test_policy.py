"""The policy's verbs on one rank: gradients do not depend on micro-batches, scores equal whole logits, bad losses."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.data.packing import MiniBatch
from megatron_s2d.errors import UserError
from megatron_s2d.objectives.distill import divergence_objective, sft_objective
from megatron_s2d.objectives.policy import Surrogate, grpo_objective
from megatron_s2d.objectives.terms import ResponseCounts, token_weights
from megatron_s2d.parallel.device import capabilities
from megatron_s2d.parallel.layout import build_layout, initialize_distributed
from megatron_s2d.records import Sample
from megatron_s2d.teachers.frozen import FullTeacher, TeacherRouter
from megatron_s2d.train import policy as policy_module
from megatron_s2d.train.loop import check_mismatch_kl
from megatron_s2d.train.policy import MegatronModel

VOCAB = 27


@pytest.fixture(scope="module")
def layout():
    initialize_distributed()
    return build_layout(ParallelConfig())


def policy(layout, preset="tiny-student", seed=1, max_tokens=64, precision="float32", **options) -> MegatronModel:
    spec = ModelConfig(preset=preset, vocab_size=VOCAB).resolve()
    return MegatronModel(spec, layout, precision=precision, max_tokens=max_tokens, seed=seed, **options)


def samples(count: int = 9) -> list[Sample]:
    rng = np.random.default_rng(3)
    found = []
    for index in range(count):
        prompt, response = int(rng.integers(1, 6)), int(rng.integers(1, 8))
        mask = np.arange(prompt + response) >= prompt
        found.append(
            Sample(
                id=str(index),
                prompt_id="p",
                group_id=str(index // 3),
                domain="d",
                seed=0,
                token_ids=rng.integers(0, VOCAB, prompt + response),
                response_mask=mask,
                temperature=0.7,
                finish_reason="stop",
                advantages=np.where(mask, rng.normal(), 0).astype(np.float32),
            )
        )
    return found


def gradients(layout, objective, column, loss_agg_mode, max_tokens, teacher=None, **options) -> tuple[float, dict]:
    model = policy(layout, max_tokens=max_tokens, **options)
    model.prepare_training(OptimizerConfig(lr=1e-3), 10)
    batch = samples()
    lengths = [sample.response_length for sample in batch]
    weights = {column: token_weights(lengths, loss_agg_mode, ResponseCounts.of(lengths), 10)}
    batches = model.pack(batch, weights)
    source = FullTeacher(model, TeacherRouter({None: teacher})) if teacher else None
    distributions = source.distributions(MiniBatch(batch, weights), batches) if teacher else None
    count = sum(len(sample.token_ids) for sample in batch)
    metrics = model.forward_backward(batches, objective, distributions, num_tokens=count)
    found = {name: p.main_grad.clone() for name, p in model.trainable.chunks[0].named_parameters()}
    return metrics["loss"], found


def method_of(layout, name: str):
    """(objective, weight column, teacher)."""
    if name == "supervised":
        return sft_objective(), "supervised_weight", None
    if name == "grpo":
        return grpo_objective(Surrogate(on_policy=True), kl_loss_coef=0.0), "policy_weight", None
    return divergence_objective("reverse_kl"), "divergence_weight", policy(layout, "tiny-teacher")


def test_a_whole_divergence_measures_the_engine_in_the_pass_that_trains(layout):
    teacher = policy(layout, seed=2)
    teacher.freeze()
    found = {}
    for shift in (None, 0.0, 0.3):
        model = policy(layout)
        model.prepare_training(OptimizerConfig(lr=1e-3), 10)
        batch = samples()
        if shift is not None:
            scores = model.score(batch)
            moved = [np.where(s.response_mask, score - shift, 0) for s, score in zip(batch, scores, strict=True)]
            batch = [dataclasses.replace(s, rollout_log_probs=m) for s, m in zip(batch, moved, strict=True)]
        weights = {"divergence_weight": np.full(len(batch), 0.01)}
        batches = model.pack(batch, weights)
        source = FullTeacher(model, TeacherRouter({None: teacher})).distributions(MiniBatch(batch, weights), batches)
        objective = divergence_objective("reverse_kl", measure_rollouts=shift is not None)
        count = sum(len(sample.token_ids) for sample in batch)
        report = model.forward_backward(batches, objective, source, num_tokens=count)
        gradient = next(iter(model.trainable.chunks[0].parameters())).main_grad.clone()
        found[shift] = report, gradient
    for shift in (0.0, 0.3):
        report, gradient = found[shift]
        assert report["loss"] == found[None][0]["loss"] and torch.equal(gradient, found[None][1])
        assert report["mismatch/log_prob_abs_diff_mean"] == pytest.approx(shift, abs=1e-5)
        assert report["mismatch/k3_kl"] == pytest.approx(math.expm1(shift) - shift, abs=1e-6)
    check_mismatch_kl(found[0.0][0], 0.01, 1)
    with pytest.raises(UserError, match="trainer and engine differ by a KL of 0.0499 "):
        check_mismatch_kl(found[0.3][0], 0.01, 1)


@pytest.mark.parametrize("loss_agg_mode", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"])
@pytest.mark.parametrize("method", ["supervised", "grpo", "opd"])
def test_gradients_do_not_depend_on_micro_batches(layout, method, loss_agg_mode):
    objective, column, teacher = method_of(layout, method)
    loss, whole = gradients(layout, objective, column, loss_agg_mode, 10_000, teacher)
    for max_tokens in (1, 24):
        other_loss, cut = gradients(layout, objective, column, loss_agg_mode, max_tokens, teacher)
        assert other_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
        for name, gradient in whole.items():
            torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=2e-6)


def test_the_gradient_is_that_of_the_plain_loss(layout):
    """Against autograd through whole logits, in the definition's own words: mean over all response tokens."""
    _, found = gradients(layout, sft_objective(), "supervised_weight", "token_mean", 24)
    model = policy(layout)
    (chunk,) = model.chunks
    total, count = 0.0, 0
    for sample in samples():
        tokens = torch.from_numpy(sample.token_ids)[None]
        logits = chunk(tokens, None, None)[0, :, :VOCAB] / sample.temperature
        losses = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="none")
        mask = torch.from_numpy(sample.response_mask[1:])
        total, count = total + losses[mask].sum(), count + int(mask.sum())
    (total / count).backward()
    for name, parameter in chunk.named_parameters():
        torch.testing.assert_close(found[f"module.{name}"], parameter.grad, rtol=1e-4, atol=1e-6)


def test_scores_are_log_softmax_of_whole_logits(layout):
    model = policy(layout)
    batch = samples()
    for sample, score in zip(batch, model.score(batch), strict=True):
        tokens = torch.from_numpy(sample.token_ids)[None]
        with torch.no_grad():
            logits = model.chunks[0](tokens, None, None)[0, :, :VOCAB] / sample.temperature
        expected = torch.log_softmax(logits, -1)[:-1].gather(1, tokens[0, 1:, None]).squeeze(1).numpy()
        mask = sample.response_mask[1:]
        np.testing.assert_allclose(score[1:][mask], expected[mask], atol=2e-6)
        assert not score[0] and not score[1:][~mask].any()


def test_a_loss_that_is_not_finite_is_refused_and_changes_nothing(layout):
    model = policy(layout)
    model.prepare_training(OptimizerConfig(lr=1e-3), 10)
    before = {name: parameter.detach().clone() for name, parameter in model.chunks[0].named_parameters()}
    bad = [dataclasses.replace(sample, advantages=sample.advantages * math.inf) for sample in samples()]
    with np.errstate(invalid="ignore"):
        bad = [dataclasses.replace(s, advantages=np.nan_to_num(s.advantages, nan=0.0, posinf=np.inf)) for s in bad]
    batches = model.pack(bad, {"policy_weight": np.ones(len(bad))})
    objective = grpo_objective(Surrogate(on_policy=True), kl_loss_coef=0.0)
    with pytest.raises(UserError, match="the loss is"):
        model.forward_backward(batches, objective, num_tokens=10)
    for name, parameter in model.chunks[0].named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("preset", ["tiny-student", "tiny-llama", "tiny-moe"])
@pytest.mark.parametrize("method", ["supervised", "grpo", "opd"])
def test_packed_equals_padded(layout, method, preset):
    """Loss and gradients, the sequences in one batch and in several, and scores."""
    objective, column, teacher = method_of(layout, method)
    padded = gradients(layout, objective, column, "token_mean", 10_000, teacher, preset=preset)
    for max_tokens in (24, 10_000):
        loss, found = gradients(
            layout, objective, column, "token_mean", max_tokens, teacher, preset=preset, packed=True
        )
        assert loss == pytest.approx(padded[0], rel=1e-5, abs=1e-6)
        for name, gradient in padded[1].items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-6)
    scores = [policy(layout, preset, packed=packed).score(samples()) for packed in (False, True)]
    for one, other in zip(*scores, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_gradient_of_packed_sequences(layout, recompute):
    objective, column, _ = method_of(layout, "supervised")
    options = ModelConfig(preset="tiny-student", recompute=recompute)
    plain = gradients(layout, objective, column, "token_mean", 24, packed=True)
    found = gradients(layout, objective, column, "token_mean", 24, packed=True, options=options)
    for name, gradient in plain[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_optimizer_that_waits_in_host_memory_trains_alike(layout, precision, tmp_path):
    """Bit by bit, over a save and a load; what waits has no storage."""
    objective, column, _ = method_of(layout, "supervised")
    ends = []
    for offload in (False, True):
        model = policy(layout, precision=precision)
        model.prepare_training(OptimizerConfig(lr=1e-2), 10, offload=offload)
        batch = samples()
        for step in range(4):
            batches = model.pack(batch, {column: np.full(len(batch), 0.1)})
            model.forward_backward(batches, objective, num_tokens=sum(len(item.token_ids) for item in batch))
            model.optim_step()
            if offload:
                waiting = list(model.trainable._parking._state())
                assert len(waiting) >= 2 and all(tensor.untyped_storage().nbytes() == 0 for tensor in waiting)
                assert all(buffer.grad_data.untyped_storage().nbytes() == 0 for buffer in gradient_buffers(model))
            if step == 1:
                directory = tmp_path / f"{precision}{offload}"
                model.save(directory, {"step": 2, "updates": 2}, with_optimizer=True)
                model = policy(layout, precision=precision, seed=5)
                model.prepare_training(OptimizerConfig(lr=1e-2), 10, offload=offload)
                model.load(directory, with_optimizer=True)
        ends.append(list(model.chunks[0].parameters()))
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(ends[0][0], next(policy(layout, precision=precision).chunks[0].parameters()))


def test_a_model_that_is_trained_does_not_wait(layout):
    model = policy(layout)
    model.prepare_training(OptimizerConfig(), 1)
    with pytest.raises(RuntimeError, match="do not wait"):
        model.offload()


def test_a_frozen_model_that_takes_turns_is_copied_to_the_host_once(layout, monkeypatch):
    """With a stand-in for the GPU: what lies on it is a copy. On a GPU: tests/gpu."""
    model = policy(layout)
    model.freeze()
    before, copies = model.score(samples()), []

    def to_host(tensor):
        copies.append(tensor.clone())
        return copies[-1]

    monkeypatch.setattr(policy_module.device, "capabilities", lambda: dataclasses.replace(capabilities(), cuda=True))
    monkeypatch.setattr(policy_module.device, "copy_to_host", to_host)
    monkeypatch.setattr(policy_module.device, "synchronize", lambda: None)
    monkeypatch.setattr(policy_module.device, "device", lambda: torch.device("cpu"))
    for _ in range(2):
        model.offload()
        assert [parameter.data_ptr() for parameter in model.chunks[0].parameters()] == [c.data_ptr() for c in copies]
        model.onload()
        for parameter in model.chunks[0].parameters():
            parameter.data = parameter.data.clone()
    monkeypatch.undo()
    for one, other in zip(model.score(samples()), before, strict=True):
        np.testing.assert_array_equal(one, other)


def gradient_buffers(model: MegatronModel) -> list:
    return [buffer for chunk in model.trainable.chunks for buffer in chunk.buffers]
