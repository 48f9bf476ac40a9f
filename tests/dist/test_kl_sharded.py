"""Tensor-parallel sizes 1, 2 and 4 give the same values and gradients; a broken protocol is detected.

One run of 4 ranks (gloo) computes all cases. The reference is float64 autograd on full logits of the same operands.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "kl"))
from kl_problems import combined, make_problem, relative
from kl_sharded_cases import CASES, CONTROLS

from megatron_s2d.kl.reference import dense_outputs, dense_support_outputs

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def results(tmp_path_factory, run_ranks) -> dict:
    output = tmp_path_factory.mktemp("kl") / "results.pt"
    run_ranks("kl_worker.py", 4, output)
    return torch.load(output, weights_only=True)


def expected_of(case) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the float64 answer of a case by autograd, and the mask of active rows."""
    problem = make_problem(rows=8, vocab=case.vocab, width=6, teacher_width=5, padding=0).rounded()
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    z = hidden @ weight.T / problem.temperature
    y = problem.teacher_logits()
    names = [n for n in case.outputs if case.tail is None or n in ("log_probs", "entropy")]
    outputs = vars(dense_outputs(z, y, tuple(names), beta=case.beta, target_ids=problem.target)).copy()
    if case.tail is not None:
        log_q, ids = torch.log_softmax(y, -1).sort(descending=True)
        parts = ids[:, :5], log_q[:, :5], torch.logsumexp(log_q[:, 5:], -1)
        divergences = tuple(n for n in case.outputs if n not in names)
        outputs |= {
            n: v for n, v in vars(dense_support_outputs(z, *parts, case.tail, divergences)).items() if v is not None
        }
    from megatron_s2d.kl.outputs import TokenOutputs

    differentiated = {n: v for n, v in outputs.items() if v is not None and not n.endswith("captured_mass")}
    loss = (combined(TokenOutputs(**differentiated), torch.arange(8)) * problem.loss_weights * problem.mask).sum()
    loss.backward()
    answer = {n: v.detach() * problem.mask for n, v in outputs.items() if v is not None}
    return answer | {"loss": loss.detach(), "hidden": hidden.grad, "weight": weight.grad}, problem.mask


@pytest.mark.parametrize("name", CASES)
def test_every_size_matches_autograd(results, name):
    case = CASES[name]
    expected, _ = expected_of(case)
    single = case.dtype == torch.float32
    for size in case.sizes:
        answers = results[f"{name}/{size}"]
        for key, value in expected.items():
            tolerance = (1e-5 if key in ("hidden", "weight") else 1e-6) if single else 1e-10
            if case.vocab == 1:  # every divergence and gradient of a one-word vocabulary is exactly zero
                assert not answers[key].any(), (size, key)
            else:
                assert relative(answers[key], value) <= tolerance, (size, key)
        assert answers["padding"] == 0
        assert answers["same_bits"], f"ranks of size {size} disagree in bits"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.float32])
def test_float32_agrees_between_sizes(results, name):
    one = results[f"{name}/1"]
    for size in (2, 4):
        for key, value in results[f"{name}/{size}"].items():
            if key in ("loss", "hidden", "weight", *CASES[name].outputs):
                # The hidden gradient of 5,003 columns is as exact as a float32 product over them.
                bound = 2e-6 if key == "hidden" and CASES[name].vocab > 1000 else 1e-6
                assert relative(value, one[key].double()) <= bound, (size, key)


def test_runs_are_deterministic(results):
    for key, value in results["all/4"].items():
        assert torch.equal(value, results["repeat/4"][key]), key


@pytest.mark.parametrize(("name", "gathers"), [("all", 1), ("jsd padded torch.float64", 2), ("bucket padded", 1)])
def test_collectives_per_chunk(results, name, gathers):
    chunks = 3  # 7 active rows, chunks of 3
    assert results[f"{name}/4"]["collectives"].tolist() == [gathers * chunks, 0, 0, 1]  # backward: hidden gradient only
    assert results[f"{name}/1"]["collectives"].tolist() == [0, 0, 0, 0]


def test_sequence_parallel_adds_two_gathers_and_scatters_once(results):
    # forward: one gather per chunk, and the student's and the teacher's hidden states; backward: one reduce-scatter
    assert results["sequence parallel/4"]["collectives"].tolist() == [3 + 2, 0, 0, 1]


@pytest.mark.parametrize("control", CONTROLS)
def test_broken_protocol_is_detected(results, control):
    expected, _ = expected_of(CASES[CONTROLS[control]])
    answers = results[f"{control}/4"]
    errors = {key: relative(answers[key], expected[key]) for key in ("hidden", "weight", "loss")}
    assert errors["hidden"] > 1e-2, errors
    if control == "no hidden reduction":
        assert errors["loss"] < 1e-10, "the loss does not reveal it"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["blind", "differentiable"])
def test_autograd_across_a_collective_is_wrong(results, kind, size):
    problem = make_problem(rows=8, vocab=37, padding=0)
    z = (problem.hidden @ problem.weight.T).requires_grad_()
    loss = dense_outputs(z, problem.teacher_logits(), ("forward_kl",)).forward_kl.sum()
    loss.backward()
    answers = results[f"{kind}/{size}"]
    assert relative(answers["loss"], loss.detach()) < 1e-12, "values are right"
    assert relative(answers["logits"], z.grad) > 0.1, "this test would accept a wrong gradient"


@pytest.mark.parametrize("size", [2, 4])
def test_existing_logits(results, size):
    problem = make_problem(rows=8, vocab=37, padding=0)
    z = (problem.hidden @ problem.weight.T).requires_grad_()
    names = ("reverse_kl", "jsd", "log_probs")
    outputs = dense_outputs(z / 0.7, problem.teacher_logits(), names, beta=0.3, target_ids=problem.target)
    (combined(outputs, torch.arange(8)) * problem.loss_weights).sum().backward()
    assert relative(results[f"existing/{size}"]["logits"], z.grad) < 1e-12


@pytest.mark.parametrize("size", [2, 4])
def test_top_k_across_shards(results, size):
    answers = results[f"existing/{size}"]
    log_q, ids = torch.log_softmax(make_problem(rows=8, vocab=37, padding=0).teacher_logits(), -1).sort(descending=True)
    assert torch.equal(answers["ids"], ids[:, :12])
    assert torch.allclose(answers["log_probs"], log_q[:, :12], rtol=0, atol=1e-13)
    assert torch.allclose(answers["tail"], torch.logsumexp(log_q[:, 12:], -1), rtol=0, atol=1e-13)
    assert torch.allclose(answers["support_log_probs"], log_q[:, :12], rtol=0, atol=1e-13)
    assert torch.allclose(answers["support_tail"], answers["tail"], rtol=0, atol=1e-13)
    assert answers["collectives"].tolist() == [1, 0]
