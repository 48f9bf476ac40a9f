"""MegatronModel on one rank: gradients, scores against full logits, packing, offloading, losses that are not finite."""

import dataclasses
import gc
import math
import weakref

import numpy as np
import pytest
import torch

from megatron_s2d import matrix_products
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.data.packing import MiniBatch
from megatron_s2d.errors import UserError
from megatron_s2d.kl import Logits
from megatron_s2d.objectives.distill import divergence_objective, sft_objective
from megatron_s2d.objectives.policy import Surrogate, grpo_objective
from megatron_s2d.objectives.terms import ResponseCounts, token_weights
from megatron_s2d.parallel.device import capabilities
from megatron_s2d.parallel.layout import build_layout, initialize_distributed
from megatron_s2d.records import Sample
from megatron_s2d.teachers.frozen import FullTeacher, TeacherRouter
from megatron_s2d.train import host_weights, megatron_model
from megatron_s2d.train.loop import check_mismatch_kl
from megatron_s2d.train.megatron_model import MegatronModel

VOCAB = 27


@pytest.fixture(scope="module")
def layout():
    initialize_distributed()
    return build_layout(ParallelConfig())


def build(layout, preset="tiny-student", seed=1, max_tokens=64, precision="float32", **options) -> MegatronModel:
    spec = ModelConfig(preset=preset, vocab_size=VOCAB).resolve()
    return MegatronModel(spec, layout, precision=precision, max_tokens=max_tokens, seed=seed, **options)


def samples(count: int = 9) -> list[Sample]:
    rng = np.random.default_rng(3)
    batch = []
    for index in range(count):
        prompt, response = int(rng.integers(1, 6)), int(rng.integers(1, 8))
        mask = np.arange(prompt + response) >= prompt
        batch.append(
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
    return batch


def gradients(layout, objective, column, loss_agg_mode, max_tokens, teacher=None, **options) -> tuple[float, dict]:
    model = build(layout, max_tokens=max_tokens, **options)
    model.prepare_training(OptimizerConfig(lr=1e-3), 10)
    batch = samples()
    lengths = [sample.response_length for sample in batch]
    weights = {column: token_weights(lengths, loss_agg_mode, ResponseCounts.of(lengths), 10)}
    batches = model.pack(batch, weights)
    source = FullTeacher(model, TeacherRouter({None: teacher})) if teacher else None
    distributions = source.distributions(MiniBatch(batch, weights), batches) if teacher else None
    count = sum(len(sample.token_ids) for sample in batch)
    metrics = model.forward_backward(batches, objective, distributions, num_tokens=count)
    main_grads = {name: p.main_grad.clone() for name, p in model.trainable.chunks[0].named_parameters()}
    return metrics["loss"].value(), main_grads


def method_of(layout, name: str):
    """(objective, weight column, teacher)."""
    if name == "supervised":
        return sft_objective(), "supervised_weight", None
    if name == "grpo":
        return grpo_objective(Surrogate(on_policy=True), kl_loss_coef=0.0), "policy_weight", None
    return divergence_objective("reverse_kl"), "divergence_weight", build(layout, "tiny-teacher")


@pytest.mark.parametrize("method", ["supervised", "reverse_kl"])
def test_products_by_onednn_change_no_gradient(layout, monkeypatch, method):
    """The products of layers in both directions, of the teacher without gradients, and of the output layers."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    objective, column, teacher = method_of(layout, method)
    arguments = layout, objective, column, "token_mean", 10_000, teacher
    loss, reference = gradients(*arguments)
    calls = []

    def multiply(*arguments, original=torch.ops.mkldnn._linear_pointwise):
        calls.append(torch.is_grad_enabled())
        return original(*arguments)

    for name, value in (("_FEWEST_ROWS", 1), ("_FEWEST_OPERATIONS", 1), ("_is_faster_here", lambda: True)):
        monkeypatch.setattr(matrix_products, name, value)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", multiply)
    other_loss, main_grads = gradients(*arguments)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in reference.items():
        torch.testing.assert_close(main_grads[name], gradient, rtol=1e-4, atol=2e-6)
    spec = ModelConfig(preset="tiny-student", vocab_size=VOCAB).resolve()
    of_teacher = 0 if teacher is None else 4 * teacher.spec.num_layers + 1
    # Four matrices a layer: outputs, gradients of inputs and of weights; the same of the output layer.
    assert len(calls) == 3 * (4 * spec.num_layers + 1) + of_teacher


def test_a_model_that_was_trained_is_freed_with_its_last_reference(layout):
    model = build(layout)
    model.prepare_training(OptimizerConfig(lr=1e-3), 10)
    batch = samples()
    batches = model.pack(batch, {"supervised_weight": np.full(len(batch), 0.01)})
    model.forward_backward(batches, sft_objective(), None, num_tokens=1)
    parts = [weakref.ref(part) for part in (model.trainable, model.trainable.chunks[0], model._chunks[0])]
    del model
    gc.collect()
    assert [part() for part in parts] == [None] * 3


def test_experts_with_biases_are_trained_on_one_rank(layout):
    """GPT-OSS: every bias and every sink gets a gradient."""
    _, grads = gradients(layout, sft_objective(), "supervised_weight", "token_mean", 64, preset="tiny-gpt-oss")
    names = [name for name in grads if name.endswith(("bias", "softmax_offset"))]
    assert len(names) > 10 and sum(bool(grads[name].abs().max() > 0) for name in names) > 0.8 * len(names)


def test_full_vocab_divergence_measures_the_mismatch_in_the_training_pass(layout):
    teacher = build(layout, seed=2)
    teacher.freeze()
    results = {}
    for shift in (None, 0.0, 0.3):
        model = build(layout)
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
        metrics = model.forward_backward(batches, objective, source, num_tokens=count)
        gradient = next(iter(model.trainable.chunks[0].parameters())).main_grad.clone()
        results[shift] = metrics, gradient
    for shift in (0.0, 0.3):
        metrics, gradient = results[shift]
        assert metrics["loss"].value() == results[None][0]["loss"].value()
        assert torch.equal(gradient, results[None][1])
        assert metrics["mismatch/log_prob_abs_diff_mean"].value() == pytest.approx(shift, abs=1e-5)
        assert metrics["mismatch/k3_kl"].value() == pytest.approx(math.expm1(shift) - shift, abs=1e-6)
    check_mismatch_kl(results[0.0][0], 0.01, 1)
    with pytest.raises(UserError, match="trainer and engine differ by a KL of 0.0499 "):
        check_mismatch_kl(results[0.3][0], 0.01, 1)


@pytest.mark.parametrize("loss_agg_mode", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"])
@pytest.mark.parametrize("method", ["supervised", "grpo", "opd"])
def test_gradients_do_not_depend_on_micro_batches(layout, method, loss_agg_mode):
    objective, column, teacher = method_of(layout, method)
    loss, reference = gradients(layout, objective, column, loss_agg_mode, 10_000, teacher)
    for max_tokens in (1, 24):
        other_loss, main_grads = gradients(layout, objective, column, loss_agg_mode, max_tokens, teacher)
        assert other_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
        for name, gradient in reference.items():
            torch.testing.assert_close(main_grads[name], gradient, rtol=1e-4, atol=2e-6)


def test_gradient_equals_autograd_through_full_logits(layout):
    """The loss by its definition: the mean over all response tokens."""
    _, main_grads = gradients(layout, sft_objective(), "supervised_weight", "token_mean", 24)
    model = build(layout)
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
        torch.testing.assert_close(main_grads[f"module.{name}"], parameter.grad, rtol=1e-4, atol=1e-6)


def test_scores_are_log_softmax_of_full_logits(layout):
    model = build(layout)
    batch = samples()
    for sample, score in zip(batch, model.score(batch), strict=True):
        tokens = torch.from_numpy(sample.token_ids)[None]
        with torch.no_grad():
            logits = model.chunks[0](tokens, None, None)[0, :, :VOCAB] / sample.temperature
        expected = torch.log_softmax(logits, -1)[:-1].gather(1, tokens[0, 1:, None]).squeeze(1).numpy()
        mask = sample.response_mask[1:]
        np.testing.assert_allclose(score[1:][mask], expected[mask], atol=2e-6)
        assert not score[0] and not score[1:][~mask].any()


def test_non_finite_loss_raises_and_leaves_the_weights(layout):
    model = build(layout)
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


def test_an_infinite_divergence_names_its_tokens(layout):
    """Checked once for all micro-batches of an update."""
    model = build(layout)
    model.prepare_training(OptimizerConfig(lr=1e-3), 10)
    weights = {"divergence_weight": np.full(len(samples()), 0.01)}
    batches = model.pack(samples(), weights)
    forbidden = torch.arange(VOCAB) >= 2
    source = [Logits(torch.zeros(len(batch.labels), VOCAB).masked_fill(forbidden, -math.inf)) for batch in batches]
    with pytest.raises(UserError, match=r"reverse_kl is infinite at \d+ of \d+ tokens"):
        model.forward_backward(batches, divergence_objective("reverse_kl"), source, num_tokens=10)


def test_tokens_of_another_vocabulary_are_refused(layout):
    model = build(layout)
    bad = [dataclasses.replace(sample, token_ids=np.full_like(sample.token_ids, VOCAB)) for sample in samples()]
    with pytest.raises(UserError, match=f"token ids from {VOCAB} to {VOCAB}, outside of the vocabulary of {VOCAB}"):
        model.pack(bad, {})


@pytest.mark.parametrize("preset", ["tiny-student", "tiny-llama", "tiny-moe"])
@pytest.mark.parametrize("method", ["supervised", "grpo", "opd"])
def test_packed_equals_padded(layout, method, preset):
    """Loss and gradients, the sequences in one batch and in several, and scores."""
    objective, column, teacher = method_of(layout, method)
    padded = gradients(layout, objective, column, "token_mean", 10_000, teacher, preset=preset)
    for max_tokens in (24, 10_000):
        loss, main_grads = gradients(
            layout, objective, column, "token_mean", max_tokens, teacher, preset=preset, packed=True
        )
        assert loss == pytest.approx(padded[0], rel=1e-5, abs=1e-6)
        for name, gradient in padded[1].items():
            torch.testing.assert_close(main_grads[name], gradient, rtol=1e-4, atol=2e-6)
    scores = [build(layout, preset, packed=packed).score(samples()) for packed in (False, True)]
    for one, other in zip(*scores, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_gradient_of_packed_sequences(layout, recompute):
    objective, column, _ = method_of(layout, "supervised")
    options = ModelConfig(preset="tiny-student", recompute=recompute)
    _, reference = gradients(layout, objective, column, "token_mean", 24, packed=True)
    _, main_grads = gradients(layout, objective, column, "token_mean", 24, packed=True, options=options)
    for name, gradient in reference.items():
        torch.testing.assert_close(main_grads[name], gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_offloaded_optimizer_trains_bit_identically(layout, precision, tmp_path):
    """Over a save and a load; offloaded tensors have no storage."""
    objective, column, _ = method_of(layout, "supervised")
    ends = []
    for offload in (False, True):
        model = build(layout, precision=precision)
        model.prepare_training(OptimizerConfig(lr=1e-2), 10, offload=offload)
        batch = samples()
        for step in range(4):
            batches = model.pack(batch, {column: np.full(len(batch), 0.1)})
            model.forward_backward(batches, objective, num_tokens=sum(len(item.token_ids) for item in batch))
            model.optim_step()
            if offload:
                offloaded = list(model.trainable._offloader._state())
                assert len(offloaded) >= 2 and all(tensor.untyped_storage().nbytes() == 0 for tensor in offloaded)
                assert all(buffer.grad_data.untyped_storage().nbytes() == 0 for buffer in gradient_buffers(model))
            if step == 1:
                directory = tmp_path / f"{precision}{offload}"
                model.save(directory, {"step": 2, "updates": 2}, with_optimizer=True)
                model = build(layout, precision=precision, seed=5)
                model.prepare_training(OptimizerConfig(lr=1e-2), 10, offload=offload)
                model.load(directory, with_optimizer=True)
        ends.append(list(model.chunks[0].parameters()))
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(ends[0][0], next(build(layout, precision=precision).chunks[0].parameters()))


def test_trained_model_cannot_be_offloaded(layout):
    model = build(layout)
    model.prepare_training(OptimizerConfig(), 1)
    with pytest.raises(RuntimeError, match="cannot be offloaded"):
        model.offload()


def test_offloaded_model_is_copied_to_the_host_once(layout, monkeypatch):
    """With a fake GPU, on which each tensor is a copy. On a real one: tests/gpu."""
    model = build(layout)
    model.freeze()
    before, copies = model.score(samples()), []

    def pinned_like(tensors):
        assert not copies, "copied twice"
        copies.extend(torch.empty_like(tensor) for tensor in tensors)
        return copies

    monkeypatch.setattr(megatron_model.device, "capabilities", lambda: dataclasses.replace(capabilities(), cuda=True))
    monkeypatch.setattr(host_weights, "pinned_like", pinned_like)
    monkeypatch.setattr(megatron_model.device, "synchronize", lambda: None)
    monkeypatch.setattr(megatron_model.device, "device", lambda: torch.device("cpu"))
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
