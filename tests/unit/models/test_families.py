"""Each family beside Qwen3 and Llama: greedy generation and packed training scores equal transformers'.

Logits and round trips of all families are in test_hf_parity.py, layouts in tests/dist/test_family_layouts.py.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from test_hf_parity import VARIANTS, make_pair, spec_of

from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.conversion.convert import check_conversion, hf_to_megatron, megatron_to_hf
from megatron_s2d.errors import UserError
from megatron_s2d.models.build import build_model
from megatron_s2d.models.hf_checkpoint import HfCheckpoint
from megatron_s2d.models.weights import import_weights
from megatron_s2d.parallel import layout as layouts
from megatron_s2d.parallel.checkpoint import load_checkpoint
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.rollout.engine import Request, SamplingParams
from megatron_s2d.rollout.megatron.engine import MegatronEngine
from megatron_s2d.train.megatron_model import MegatronModel

NAMES = ["qwen2_window", "mistral_window", "qwen3_yarn", "gemma3", "gpt_oss", "seed_oss"]
PROMPTS = (3, 21, 9, 21)  # shorter and longer than the windows


@pytest.fixture(scope="module")
def layout():
    torch.set_num_threads(1)
    layouts.initialize_distributed()
    return layouts.build_layout(ParallelConfig())


def prompts(vocab_size: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocab_size, length) for length in PROMPTS]


def greedy(reference, prompt: np.ndarray, count: int) -> tuple[list[int], list[float]]:
    """The next tokens of transformers, each from a full forward pass, and their log-probabilities."""
    tokens, log_probs = torch.from_numpy(prompt)[None], []
    with torch.no_grad():
        for _ in range(count):
            likeliest = torch.log_softmax(reference(tokens).logits[:, -1:], dim=-1).max(-1)
            tokens = torch.cat([tokens, likeliest.indices], dim=1)
            log_probs.append(float(likeliest.values))
    return tokens[0, len(prompt) :].tolist(), log_probs


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_generation_equals_transformers(name, fixed, tmp_path, layout):
    """With left padding, past the end of the windows, in both kinds of buffers."""
    spec, reference, chunks = make_pair(name, tmp_path, layout)
    params = SamplingParams(max_new_tokens=24, stop_token_ids=(), temperature=0.0)
    requests = [
        Request(f"p{n}#0@0", Prompt(f"p{n}", prompt, "", "math", None, None), f"p{n}@0.0", n, params)
        for n, prompt in enumerate(prompts(spec.vocab_size))
    ]
    engine = MegatronEngine(chunks, spec.vocab_size, layout)
    engine._fixed_buffers = fixed
    for sample, request in zip(engine.generate(requests), requests, strict=True):
        expected, log_probs = greedy(reference, request.prompt.token_ids, 24)
        assert sample.token_ids[sample.prompt_length :].tolist() == expected
        np.testing.assert_allclose(sample.rollout_log_probs[sample.prompt_length :], log_probs, rtol=0, atol=1e-4)
        assert min(log_probs) < -0.01


def score_samples(vocab_size: int) -> list[Sample]:
    generator = np.random.default_rng(1)
    return [
        Sample(
            f"{n}#0@0", str(n), f"{n}@0.0", "math", 0, generator.integers(0, vocab_size, length),
            np.arange(length) >= 2, 1.0, "data",
        )
        for n, length in enumerate((40, 7, 33, 18))
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_packed_scores_equal_transformers(name, tmp_path, layout):
    spec, reference, _ = make_pair(name, tmp_path, layout)
    model = MegatronModel(spec, layout, precision="float32", max_tokens=64, packed=True)
    import_weights(model.chunks, spec, layout, HfCheckpoint(tmp_path))
    samples = score_samples(spec.vocab_size)
    for sample, scores in zip(samples, model.score(samples), strict=True):
        tokens = torch.from_numpy(sample.token_ids)
        with torch.no_grad():
            log_probs = torch.log_softmax(reference(tokens[None]).logits[0, :-1], dim=-1)
        expected = log_probs.gather(1, tokens[1:, None])[:, 0].numpy()
        np.testing.assert_allclose(scores[2:], expected[1:], rtol=0, atol=1e-4)


def test_every_family_has_a_model_here():
    from megatron_s2d.config.families import FAMILIES

    assert {spec_of(name).family for name in VARIANTS} == set(FAMILIES)


@pytest.mark.parametrize("name", ["qwen2_window", "mistral_window", "gemma3", "gpt_oss"])
def test_conversion_on_disk_is_bit_exact_and_loads(name, tmp_path, layout):
    """The checkpoint that conversion writes has the names and shapes of the live model, and the same weights."""
    spec, _, chunks = make_pair(name, tmp_path, layout)
    hf_to_megatron(tmp_path, tmp_path / "megatron", tensor_model_parallel_size=2)
    check_conversion(tmp_path, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    first, back = HfCheckpoint(tmp_path), HfCheckpoint(tmp_path / "back")
    assert all(torch.equal(first.read(key), back.read(key)) for key in first.tensors)
    loaded = build_model(spec, layout)
    load_checkpoint(tmp_path / "megatron", loaded, layout, model_spec=spec.to_dict())
    for (key, value), other in zip(chunks[0].named_parameters(), loaded[0].parameters(), strict=True):
        assert torch.equal(value, other), key


def test_megatron_runs_gated_delta_nets_with_flash_linear_attention_only():
    """What the refusal of Qwen3.5 and Qwen3-Next says; where this fails, look at what a new version can do."""
    from megatron.core.ssm.gated_delta_net import HAVE_FLA, GatedDeltaNet

    from megatron_s2d.config.hf_config import spec_from_hf_config

    if HAVE_FLA:  # it has kernels for CUDA only
        pytest.skip("flash-linear-attention is installed")
    with pytest.raises(ImportError, match="FLA is not installed"):
        GatedDeltaNet(None, None)
    for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"):
        with pytest.raises(UserError, match=f"model_type '{name}' is not supported: .* kernels of flash-linear"):
            spec_from_hf_config({"model_type": name}, "config.json")
