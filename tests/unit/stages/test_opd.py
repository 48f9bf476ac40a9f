"""What the OPD sources hand to the training loop: advantages, loss weights, anchors, cached responses."""

import contextlib
import dataclasses
import types

import numpy as np
import pytest
from toy_models import LAYOUT

from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.data.stored_samples import ListedSamples, OfflineSamples
from megatron_s2d.objectives.advantages import AnchorSchedule
from megatron_s2d.stages.opd import DivergenceOpdSource, PolicyGradientOpdSource
from megatron_s2d.stages.opd_teachers import serve_teachers
from megatron_s2d.stages.sg_opd import TeacherAnchorSource
from megatron_s2d.stages.token_weighting import token_factors
from megatron_s2d.teachers.frozen import TeacherRouter


def opd_config(**options) -> OpdConfig:
    defaults = {"role": "opd", "init": "student", "teacher": "teacher", "prompts": "pool", "steps": 10}
    return OpdConfig(**(defaults | {"kl_estimator": "sampled_token"} | options))


@pytest.fixture
def samples(fakes):
    return [
        fakes.sample("a", 3, group=0, reward=1.0),
        fakes.sample("b", 5, group=0, reward=0.0),
        fakes.sample("c", 2, group=1, reward=0.0),
        fakes.sample("d", 4, group=1, reward=1.0),
    ]


@pytest.fixture
def student(fakes):
    return fakes.Scorer({"a": -3.0, "b": -2.0, "c": -1.5, "d": -4.0})


@pytest.fixture
def teacher(fakes):
    return fakes.Scorer({"a": -1.0, "b": -2.5, "c": -1.0, "d": -6.0})


def source_of(fakes, stage, samples, student, teacher, references=None, anchors=None):
    return PolicyGradientOpdSource(stage, student, fakes.Buffer(samples), teacher, references, anchors)


def test_advantage_is_teacher_minus_student_log_prob(fakes, samples, student, teacher):
    data = source_of(fakes, opd_config(), samples, student, teacher).step(1)
    assert len(data.mini_batches) == 1
    differences = {"a": 2.0, "b": -0.5, "c": 0.5, "d": -2.0}
    for sample in data.mini_batches[0].samples:
        expected = np.where(sample.response_mask, differences[sample.id], 0.0)
        assert sample.advantages == pytest.approx(expected, abs=1e-6)
        # The student's log-probabilities are the old ones of the policy ratio, and the KL is measured to the teacher's.
        first = sample.response_mask.argmax()
        assert sample.old_log_probs[first] == student.values[sample.id]
        assert sample.teacher_log_probs[first] == teacher.values[sample.id]


def test_reward_scale_extrapolates_away_from_the_reference(fakes, samples, student, teacher):
    reference = fakes.Scorer({"a": -2.0, "b": -2.0, "c": -2.0, "d": -2.0})
    stage = opd_config(reward_scale=1.5, reference="student")
    data = source_of(fakes, stage, samples, student, teacher, references=reference).step(1)
    values = {sample.id: sample.advantages[-1] for sample in data.mini_batches[0].samples}
    for name, value in values.items():
        difference = teacher.values[name] - student.values[name]
        assert value == pytest.approx(difference + 0.5 * (teacher.values[name] + 2.0), abs=1e-6)


def test_sign_gate_scales_consensus_and_masks_conflict(fakes, samples, student, teacher):
    gate = {"lambda_high": 1.0, "lambda_base": 1.0, "conflict_fallback": "mask"}
    stage = opd_config(sign_gate=gate)
    data = source_of(fakes, stage, samples, student, teacher).step(1)
    values = {sample.id: sample.advantages[-1] for sample in data.mini_batches[0].samples}
    # a: correct, teacher prefers it. b: wrong, teacher disprefers it. c: wrong, preferred. d: correct, dispreferred.
    assert values == pytest.approx({"a": 2.0, "b": -0.5, "c": 0.0, "d": 0.0}, abs=1e-6)
    assert data.metrics["gate/consensus_fraction"] == pytest.approx(8 / 14)


@pytest.mark.parametrize(("selected_by", "selected"), [("student", ("d", "a")), ("teacher", ("d", "b"))])
def test_fixed_advantage_is_the_mean_log_prob_of_the_least_likely_tokens(
    fakes, samples, student, teacher, selected_by, selected
):
    """The loss is value * mean over the selected tokens of the ratio: its gradient in float64, token by token."""
    setting = {"value": -0.75, "fraction": 0.4, "selected_by": selected_by}
    data = source_of(fakes, opd_config(fixed_advantage=setting), samples, student, teacher).step(1)
    (batch,) = data.mini_batches
    scores = {
        s.id: scorer
        for s, scorer in zip(samples, (student if selected_by == "student" else teacher).score(samples), strict=True)
    }
    flat = np.concatenate([scores[s.id][s.response_mask] for s in batch.samples])
    wanted = np.argsort(flat, kind="stable")[:5]  # 0.4 of 14 tokens
    definition = np.zeros(14)
    definition[wanted] = 0.75 / 5  # d/d log-prob of -(value) * mean ratio at ratio 1
    weights = np.concatenate(
        [np.full(s.response_length, w) for s, w in zip(batch.samples, batch.loss_weights["policy_weight"], strict=True)]
    )
    advantages = np.concatenate([s.advantages[s.response_mask] for s in batch.samples])
    assert (-weights * advantages) == pytest.approx(definition, rel=1e-12)
    touched = {s.id for s in batch.samples if s.advantages.any()}
    assert touched == set(selected) and (weights > 0).all()
    assert data.metrics["fixed_advantage/selected_fraction"] == pytest.approx(5 / 14)
    assert data.metrics["fixed_advantage/highest_selected_log_prob"] == pytest.approx(np.sort(flat)[4])


def test_control_selected_by_the_student_does_not_depend_on_the_teacher(fakes, samples, student, teacher):
    other = fakes.Scorer({"a": -9.0, "b": -0.1, "c": -7.0, "d": -0.2})
    for selected_by, equal in (("student", True), ("teacher", False)):
        stage = opd_config(fixed_advantage={"selected_by": selected_by})
        first, second = (
            source_of(fakes, stage, samples, student, which).step(1).mini_batches[0] for which in (teacher, other)
        )
        same = all(
            np.array_equal(a.advantages, b.advantages) for a, b in zip(first.samples, second.samples, strict=True)
        )
        assert same == equal
        assert np.array_equal(first.loss_weights["policy_weight"], second.loss_weights["policy_weight"])


def test_fixed_advantage_selects_among_the_tokens_that_count(fakes, samples, student, teacher):
    stage = opd_config(fixed_advantage={"fraction": 0.2}, truncated_responses="mask")
    data = source_of(
        fakes,
        stage,
        [dataclasses.replace(s, finish_reason="length" if s.id == "d" else "stop") for s in samples],
        student,
        teacher,
    ).step(1)
    (batch,) = data.mini_batches
    advantages = {s.id: s.advantages[s.response_mask] for s in batch.samples}
    assert not advantages["d"].any()  # the least likely ones, but without a loss
    assert advantages["a"].tolist() == [-0.5, -0.5, 0.0]  # 2 of 10 tokens
    weights = dict(zip("abcd", batch.loss_weights["policy_weight"], strict=True))
    assert weights == pytest.approx({"a": 0.5, "b": 0.5, "c": 0.5, "d": 0.0})


class AnchorWorker:
    """The teacher's answers: lengths 2 and 6, correct, and one wrong one."""

    def __init__(self, fakes):
        self.fakes, self.prompts, self.layout = fakes, [], LAYOUT

    def sample(self, prompts, num_generations, step):
        self.prompts += [prompt.id for prompt in prompts]
        answers = (("x", 2, 1.0), ("y", 6, 1.0), ("z", 4, 0.0))
        return [self.fakes.sample(name, length, reward=reward) for name, length, reward in answers]


def anchored(fakes, samples, student, teacher, step, **settings):
    sampling = {"fraction": 0.5, "alpha_high": 0.8, "alpha_end": 0.2, "phase_1_end": 0.2, "phase_2_end": 0.6}
    stage = opd_config(teacher_sampling=sampling | settings)
    config = stage.teacher_sampling
    schedule = AnchorSchedule(config.alpha_high, config.alpha_end, config.phase_1_end, config.phase_2_end)
    worker = AnchorWorker(fakes)
    resident = types.SimpleNamespace(views=None, model_for=lambda domain: contextlib.nullcontext())
    anchors = TeacherAnchorSource(stage, resident, {None: worker}, schedule, LAYOUT)
    return source_of(fakes, stage, samples, student, teacher, anchors=anchors).step(step), worker


@pytest.mark.parametrize(("step", "alpha"), [(1, 0.8), (5, 0.5)])
def test_anchor_tokens_share_the_loss_weight_alpha(fakes, samples, student, teacher, step, alpha):
    data, worker = anchored(fakes, samples, student, teacher, step)
    (batch,) = data.mini_batches
    assert [sample.id for sample in batch.samples] == ["a", "b", "c", "d", "x~teacher", "y~teacher"]
    assert batch.loss_weights["supervised_weight"] == pytest.approx([0, 0, 0, 0, alpha / 8, alpha / 8])
    assert batch.loss_weights["policy_weight"] == pytest.approx([1 / 14] * 4 + [0, 0])
    assert worker.prompts == ["p0"]  # half of the step's two prompts
    assert data.metrics["anchor/alpha"] == pytest.approx(alpha)
    assert data.metrics["anchor/kept_fraction"] == pytest.approx(2 / 3)


def test_no_anchors_after_the_second_phase(fakes, samples, student, teacher):
    data, worker = anchored(fakes, samples, student, teacher, 7)
    assert len(data.mini_batches[0].samples) == 4 and not worker.prompts
    assert data.metrics["anchor/alpha"] == 0.0


@pytest.mark.parametrize("token_weighting", ["entropy", "log_ratio", "position"])
def test_token_factors_average_to_one_over_the_response_tokens(fakes, samples, student, teacher, token_weighting):
    stage = opd_config(token_weighting=token_weighting, sampling={"max_response_length": 8})
    factors = token_factors(stage, samples, student, teacher)
    responses = np.concatenate([factors[sample.id][sample.response_mask] for sample in samples])
    assert len(responses) == 14 and responses.mean() == pytest.approx(1.0, rel=1e-6)
    assert responses.min() < responses.max()


def test_position_factors_fall_linearly(fakes, samples, student, teacher):
    stage = opd_config(token_weighting="position", sampling={"max_response_length": 8})
    factors = token_factors(stage, samples, student, teacher)
    longest = factors["b"][samples[1].response_mask]
    assert longest / longest[0] == pytest.approx([1, 7 / 8, 6 / 8, 5 / 8, 4 / 8])


def test_token_factors_multiply_the_loss_weights(fakes, samples, student, teacher):
    stage = opd_config(token_weighting="log_ratio")
    data = source_of(fakes, stage, samples, student, teacher).step(1)
    (batch,) = data.mini_batches
    weights = dict(zip("abcd", batch.loss_weights["policy_weight"], strict=True))
    mean = (3 * 2.0 + 5 * 0.5 + 2 * 0.5 + 4 * 2.0) / 14
    assert weights["a"][-1] == pytest.approx(2.0 / mean / 14)
    assert weights["b"][-1] == pytest.approx(0.5 / mean / 14)
    total = sum(weights[sample.id][sample.response_mask].sum() for sample in samples)
    assert total == pytest.approx(1.0, rel=1e-6)  # as without factors


def cached_responses(fakes, reads=None):
    """Responses of a cache in their order; ``reads`` gets what was asked for."""

    def order(start, count):
        if reads is not None:
            reads.append((start, count))
        return range(start, start + count)

    return OfflineSamples(ListedSamples(lambda index: fakes.sample(f"cached{index}", 3)), order)


def test_cached_responses_fill_the_batch(fakes, samples, student, teacher):
    stage = opd_config(
        kl_estimator="full_vocab", on_policy_fraction=0.5, cache="cache", train_batch_size=4, num_generations=2
    )
    reads = []
    source = DivergenceOpdSource(stage, student, fakes.Buffer(samples), teacher, cached_responses(fakes, reads))
    (batch,) = source.step(3).mini_batches
    assert reads == [(8, 4)]
    assert [sample.id for sample in batch.samples[4:]] == [f"cached{index}~cached" for index in range(8, 12)]
    assert batch.loss_weights["divergence_weight"] == pytest.approx([1 / 26] * 8)


@pytest.mark.parametrize(("fraction", "on_policy"), [(0.5, [2, 2]), (0.25, [2, 0]), (0.75, [4, 2])])
def test_cached_responses_are_mixed_into_every_mini_batch(fakes, student, teacher, fraction, on_policy):
    """Two mini-batches of four: equal sizes, and the cached responses fill up what the groups leave free."""
    stage = opd_config(
        kl_estimator="full_vocab",
        on_policy_fraction=fraction,
        cache="cache",
        train_batch_size=4,
        num_generations=2,
        num_mini_batches=2,
    )
    groups = round(4 * fraction)
    samples = [fakes.sample(f"{group}{index}", 3, group=group) for group in range(groups) for index in range(2)]
    source = DivergenceOpdSource(stage, student, fakes.Buffer(samples), teacher, cached_responses(fakes))
    mini_batches = source.step(1).mini_batches
    counts = [sum("cached" not in sample.id for sample in batch.samples) for batch in mini_batches]
    assert counts == on_policy and [len(batch.samples) for batch in mini_batches] == [4, 4]
    cached = [sample.id for batch in mini_batches for sample in batch.samples if "cached" in sample.id]
    assert cached == [f"cached{index}~cached" for index in range(8 - 2 * groups)]


def test_later_passes_repeat_samples_anchors_and_cached_responses(fakes, samples, student, teacher):
    """Every pass has each policy sample and each anchor once; further passes mix cached responses in another order."""
    settings = {"fraction": 0.5, "alpha_high": 0.8, "phase_1_end": 0.2, "phase_2_end": 0.6}
    stage = opd_config(teacher_sampling=settings, num_mini_batches=2, ppo_epochs=3, train_batch_size=2)
    schedule = AnchorSchedule(0.8, 0.0, 0.2, 0.6)
    resident = types.SimpleNamespace(views=None, model_for=lambda domain: contextlib.nullcontext())
    anchors = TeacherAnchorSource(stage, resident, {None: AnchorWorker(fakes)}, schedule, LAYOUT)
    batches = source_of(fakes, stage, samples, student, teacher, anchors=anchors).step(1).mini_batches
    assert len(batches) == 6
    for start in (0, 2, 4):
        ids = [sample.id for batch in batches[start : start + 2] for sample in batch.samples]
        assert sorted(ids) == ["a", "b", "c", "d", "x~teacher", "y~teacher"]
        weights = np.concatenate([batch.loss_weights["supervised_weight"] for batch in batches[start : start + 2]])
        assert sum(weight > 0 for weight in weights) == 2

    options = {"on_policy_fraction": 0.5, "cache": "cache", "train_batch_size": 4, "num_generations": 2}
    stage = opd_config(kl_estimator="full_vocab", num_mini_batches=2, ppo_epochs=2, **options)
    source = DivergenceOpdSource(stage, student, fakes.Buffer(samples), teacher, cached_responses(fakes))
    ids = [[sample.id for sample in batch.samples] for batch in source.step(1).mini_batches]
    assert [len(names) for names in ids] == [4, 4, 4, 4]
    assert sorted(ids[0] + ids[1]) == sorted(ids[2] + ids[3]) and set(ids[0]) != set(ids[2]) != set(ids[1])


def truncated(samples):
    """The same samples, the longest of which ran into the length limit."""
    return [dataclasses.replace(s, finish_reason="length" if s.id == "b" else "stop") for s in samples]


@pytest.mark.parametrize("token_weighting", ["entropy", "log_ratio", "position"])
def test_token_factors_average_to_one_over_the_tokens_that_count(fakes, samples, student, teacher, token_weighting):
    stage = opd_config(token_weighting=token_weighting, truncated_responses="mask", sampling={"max_response_length": 8})
    (batch,) = source_of(fakes, stage, truncated(samples), student, teacher).step(1).mini_batches
    weights = batch.loss_weights["policy_weight"]
    sums = {s.id: weight[s.response_mask].sum() for s, weight in zip(batch.samples, weights, strict=True)}
    assert sums["b"] == 0 and sum(sums.values()) == pytest.approx(1.0, rel=1e-6)


def test_stability_weights_average_to_one_over_the_tokens_that_count(fakes, samples, student, teacher):
    gate = {"lambda_high": 1.0, "lambda_base": 1.0, "conflict_fallback": "preserve"}
    plain, clipped = (
        source_of(
            fakes,
            opd_config(sign_gate=gate | {"stability_clip": clip}, truncated_responses="mask"),
            truncated(samples),
            student,
            teacher,
        ).step(1)
        for clip in (None, 1.0)
    )
    before = {sample.id: sample for sample in plain.mini_batches[0].samples}
    ratios = []
    for sample in clipped.mini_batches[0].samples:
        if sample.id != "b":
            ratios += list(sample.advantages[sample.response_mask] / before[sample.id].advantages[sample.response_mask])
    assert len(ratios) == 9 and np.mean(ratios) == pytest.approx(1.0, rel=1e-6)
    assert max(ratios) > 1.2 and clipped.metrics["gate/stability_clipped_fraction"] == pytest.approx(7 / 9)


class OffloadedTeacher:
    """A frozen model that is either on the device or offloaded."""

    def __init__(self, value: float):
        self.value, self.on_gpu = value, False

    @contextlib.contextmanager
    def on_device(self, *, release):
        self.on_gpu = True
        yield
        self.on_gpu = not release

    def score(self, samples, output="log_probs", *, holders=None):
        assert self.on_gpu, "scored from host memory"
        return [np.where(sample.response_mask, self.value, 0.0).astype(np.float32) for sample in samples]


def test_several_teachers_are_on_the_device_when_they_generate(fakes, student):
    """They take turns: scoring offloads them all before the anchors are sampled."""
    models = {"math": OffloadedTeacher(-1.0), "code": OffloadedTeacher(-2.0)}
    teachers, generated = TeacherRouter(models), []

    def worker(domain):
        def sample(prompts, num_generations, step):
            assert models[domain].on_gpu, "generated from host memory"
            generated.append(domain)
            return [fakes.sample(f"{domain} answer", 2, reward=1.0)]

        return types.SimpleNamespace(sample=sample, layout=LAYOUT)

    sampling = {"fraction": 1.0, "alpha_high": 0.8, "alpha_end": 0.2, "phase_1_end": 0.2, "phase_2_end": 0.6}
    stage = opd_config(teacher={"math": "a", "code": "b"}, teacher_sampling=sampling)
    anchors = TeacherAnchorSource(
        stage,
        teachers,
        {domain: worker(domain) for domain in models},
        AnchorSchedule(0.8, 0.2, 0.2, 0.6),
        LAYOUT,
    )
    samples = [dataclasses.replace(fakes.sample(name, 3), domain=d) for name, d in (("a", "math"), ("b", "code"))]
    buffer = fakes.Buffer(samples)
    buffer.next_batch = lambda step: ([fakes.prompt("p0", "math"), fakes.prompt("p1", "code")], samples, samples)
    PolicyGradientOpdSource(stage, student, buffer, teachers, None, anchors).step(1)
    assert generated == ["math", "code"] and not any(model.on_gpu for model in models.values())


def test_a_teacher_is_given_the_students_scores(fakes, samples, student, teacher):
    """One of another tokenizer makes its values of them."""
    seen = {}

    def score(scored, *, holders):
        seen.update({sample.id: sample.require("old_log_probs", "the student's scores") for sample in scored})
        return teacher.score(scored)

    source_of(fakes, opd_config(), samples, student, types.SimpleNamespace(score=score)).step(1)
    expected = dict(zip("abcd", student.score(samples), strict=True))
    assert all(np.array_equal(seen[name], values) for name, values in expected.items())


def test_mini_batches_do_not_split_groups(fakes, samples, student, teacher):
    stage = opd_config(num_mini_batches=2)
    first, second = source_of(fakes, stage, samples, student, teacher).step(1).mini_batches
    assert [sample.id for sample in first.samples] == ["a", "b"]
    assert [sample.id for sample in second.samples] == ["c", "d"]
    assert first.loss_weights["policy_weight"] == pytest.approx([1 / 8] * 2)


def test_needs_reference_follows_the_reward_scales_in_use():
    gate = {"lambda_base": 1.0, "conflict_fallback": "mask"}
    assert not opd_config().needs_reference
    assert opd_config(reward_scale=1.25, reference="student").needs_reference
    assert opd_config(sign_gate=gate | {"lambda_high": 1.8}, reference="student").needs_reference
    assert not opd_config(sign_gate=gate | {"lambda_high": 1.0}).needs_reference


def test_domains_with_the_same_teacher_share_its_servers():
    opened = []

    def served_teacher(teacher, model_name, params, top_k, *, longest_prompt=0):
        opened.append((teacher, model_name, top_k))
        return object()

    models = types.SimpleNamespace(name_of=lambda stage: f"model of {stage}")
    context = types.SimpleNamespace(models=models, rollouts=types.SimpleNamespace(served_teacher=served_teacher))
    stage = opd_config(teacher={"math": "t", "code": "t"}, teacher_engine="sglang")
    teacher = types.SimpleNamespace(spec=types.SimpleNamespace(vocab_size=10))
    router = types.SimpleNamespace(models={"math": teacher, "code": teacher}, views=None)
    served = serve_teachers(context, stage, router, None)
    assert opened == [(teacher, "model of t", 0)]
    assert served.engines["math"] is served.engines["code"]
