"""Layers by capability, FP8 in Megatron's configuration, and FP8 checks of GPU and shapes.

Transformer Engine is not installed on a CPU: the tests mock its presence and inspect the layer specs.
"""

import dataclasses
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from megatron.core.extensions import transformer_engine
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_s2d.config.hardware import GPUS
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.precision import RECIPES, Fp8Config, check_chip, check_shapes
from megatron_s2d.errors import UserError
from megatron_s2d.models import build, te_attention
from megatron_s2d.models.kv_cache import CachedSelfAttention
from megatron_s2d.models.layers import CoreAttention, RMSNorm, attend
from megatron_s2d.parallel import device
from megatron_s2d.parallel.device import Capabilities
from megatron_s2d.parallel.layout import build_layout, initialize_distributed

H200 = Capabilities(
    cuda=True,
    device_name="NVIDIA H200",
    transformer_engine=True,
    apex=False,
    compute_capability=(9, 0),
    cuda_version=(13, 0),
)
SPEC = ModelConfig(preset="qwen3-1.7b").resolve()


@pytest.fixture(scope="module")
def layout():
    initialize_distributed()
    return build_layout(ParallelConfig())


@pytest.fixture
def mock_capabilities(monkeypatch):
    """Set the capabilities of another machine."""

    def use(capabilities: Capabilities) -> None:
        monkeypatch.setattr(device, "capabilities", lambda: capabilities)
        for name in ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd"):
            monkeypatch.setattr(rope_utils, name, object())

    return use


def test_transformer_engine_layers_are_used_if_it_is_usable(layout, mock_capabilities, monkeypatch):
    """Megatron's spec of these layers needs Transformer Engine, so the test inspects the call that asks for it."""
    local = build._block_submodules(SPEC, layout)
    assert local.layer_specs[0].submodules.self_attention.submodules.core_attention is CoreAttention
    assert local.layer_norm is RMSNorm
    arguments = {}

    def layer_spec(**kwargs):
        arguments.update(kwargs)
        return build.get_gpt_layer_local_submodules(qk_layernorm=True, normalization="RMSNorm")

    mock_capabilities(H200)
    monkeypatch.setattr(build, "get_gpt_layer_with_transformer_engine_submodules", layer_spec)
    fused = build._block_submodules(SPEC, layout)
    assert arguments == {"num_experts": None, "moe_grouped_gemm": True, "qk_layernorm": True}
    attention = fused.layer_specs[0].submodules.self_attention
    assert attention.submodules.core_attention is te_attention.PackedTEDotProductAttention
    assert attention.module is CachedSelfAttention and fused.layer_norm is not RMSNorm


def test_transformer_engine_attends_to_packed_sequences_only(monkeypatch):
    """cuDNN builds a plan for every new shape: padded micro-batches and decoding steps go to PyTorch's kernels."""

    class Fused:
        def __init__(self, config, layer_number):
            self.config = config

        def forward(self, *arguments):
            return "fused"

    monkeypatch.setattr(transformer_engine, "TEDotProductAttention", Fused)
    source = importlib.util.spec_from_file_location("te_attention_of_fused", te_attention.__file__)
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    config = SimpleNamespace(
        context_parallel_size=1, softmax_scale=None, window_size=(1, 0), window_attn_skip_freq=[0, 1]
    )
    attention, sliding = (module.PackedTEDotProductAttention(config, layer) for layer in (1, 2))
    query, key = torch.randn(1, 2, 4, 8), torch.randn(5, 2, 2, 8)
    mask = torch.zeros(2, 1, 1, 5, dtype=torch.bool)
    for hidden in (None, mask):
        output = attention.forward(query, key, key, hidden, None)
        torch.testing.assert_close(output, attend(query, key, key, hidden))
        near = sliding.forward(query, key, key, hidden, None)
        torch.testing.assert_close(near, attend(query, key[3:], key[3:], None))
    packed = PackedSeqParams(qkv_format="thd")
    assert attention.forward(query, key, key, None, None, None, packed) == "fused"
    with pytest.raises(NotImplementedError, match="mask cannot be combined with packed"):
        attention.forward(query, key, key, mask, None, None, packed)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("parameters", [False, True])
def test_fp8_reaches_megatrons_configuration(layout, mock_capabilities, recipe, parameters):
    mock_capabilities(H200)
    plain = build.transformer_config(SPEC, layout, params_dtype=torch.bfloat16)
    assert plain.fp8 is None and not plain.fp8_param and plain.apply_rope_fusion
    fp8 = Fp8Config(recipe=recipe, parameters=parameters)
    config = build.transformer_config(SPEC, layout, params_dtype=torch.bfloat16, fp8=fp8)
    assert config.fp8 == ("hybrid" if recipe in ("delayed", "tensorwise") else "e4m3")
    assert config.fp8_recipe == recipe and config.fp8_param is parameters
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (1024, "max")
    assert not config.fp8_dot_product_attention and not config.fp8_output_proj


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"cuda": False}, "has no CUDA"),
        ({"transformer_engine": False}, "does not import here"),
        ({"compute_capability": (8, 0)}, "needs compute capability 9.0 or higher.*leave fp8 out"),
        ({"compute_capability": (8, 9)}, "choose delayed or tensorwise"),
        ({"cuda_version": (12, 8)}, "needs CUDA 12.9, torch was built for 12.8"),
    ],
)
def test_fp8_without_hardware_support_is_refused(layout, mock_capabilities, changes, message):
    mock_capabilities(dataclasses.replace(H200, **changes))
    with pytest.raises(UserError, match=message):
        build.build_model(SPEC, layout, params_dtype=torch.bfloat16, fp8=Fp8Config(recipe="blockwise"))


def test_fp8_without_a_gpu_is_refused(layout):
    with pytest.raises(UserError, match="no CUDA: leave fp8 out"):
        build.build_model(SPEC, layout, fp8=Fp8Config())


def test_recipes_of_each_gpu():
    usable = {
        name: [recipe for recipe in RECIPES if _allowed(Fp8Config(recipe=recipe), gpu.capability)]
        for name, gpu in GPUS.items()
    }
    everything_but_mx = ["delayed", "tensorwise", "blockwise"]
    assert usable == {
        "h200": everything_but_mx,
        "h100": everything_but_mx,
        "a100-80": [],
        "b200": [*everything_but_mx, "mxfp8"],
        "l40s": ["delayed", "tensorwise"],
    }
    assert all((gpu.fp8_flops is not None) == bool(usable[name]) for name, gpu in GPUS.items())
    with pytest.raises(UserError, match="mxfp8 needs compute capability 10.0 or higher and below 12.0"):
        check_chip(Fp8Config(recipe="mxfp8"), (12, 0), "a workstation card")


def _allowed(fp8: Fp8Config, capability: tuple[int, int]) -> bool:
    try:
        check_chip(fp8, capability, "chip")
    except UserError:
        return False
    return True


def test_fp8_shapes():
    for preset in ("qwen3-1.7b", "qwen3-8b", "llama-3.3-70b", "qwen3-30b-a3b"):
        for recipe in RECIPES:
            check_shapes(Fp8Config(recipe=recipe), ModelConfig(preset=preset).resolve(), ParallelConfig())
    tiny = ModelConfig(preset="tiny-student").resolve(27)
    with pytest.raises(UserError, match="multiples of 128, and hidden_size is 48"):
        check_shapes(Fp8Config(recipe="blockwise"), tiny, ParallelConfig())
    eight = ParallelConfig(tensor_model_parallel_size=8)
    with pytest.raises(UserError, match="ffn_hidden_size is 400 on a rank at tensor_model_parallel_size 8"):
        check_shapes(Fp8Config(recipe="blockwise"), dataclasses.replace(SPEC, ffn_hidden_size=8 * 400), eight)


def test_overlapped_communication_without_transformer_engine_is_refused(layout):
    with pytest.raises(
        UserError, match=r"tp_comm_overlap needs a GPU and Transformer Engine.* leave tp_comm_overlap out"
    ):
        build.build_model(SPEC, layout, overlapped_tokens=64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cuda": False}, "flex needs GPUs, and this process has no CUDA: set parallel.moe_token_dispatcher"),
        ({"compute_capability": (7, 0)}, "needs compute capability 8, 9 or 10, and .* has 7"),
        ({}, "flex needs DeepEP, which is not installed: install it from https://github.com/deepseek-ai/DeepEP"),
    ],
)
def test_the_flex_dispatcher_names_what_it_needs(mock_capabilities, changes, message):
    mock_capabilities(dataclasses.replace(H200, **changes))
    with pytest.raises(UserError, match=message):
        build.check_deepep()
