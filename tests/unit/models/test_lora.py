"""LoRA on one rank: logits against W + alpha / rank B A in float64, off = base, merged, PEFT directories, training.

Layouts: tests/dist/test_family_layouts.py.
"""

import dataclasses
import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lora_reference import merged_in_float64, random_adapter
from safetensors.torch import load_file, save_file

from megatron_s2d.config.hf_config import hf_config_from_spec
from megatron_s2d.config.lora import PROJECTIONS, LoraConfig, check_lora, num_adapter_values
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.precision import Fp8Config
from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.conversion.convert import merge_adapter
from megatron_s2d.errors import UserError
from megatron_s2d.models.hf_checkpoint import HfCheckpoint
from megatron_s2d.models.lora import SeededAdapter, check_layers
from megatron_s2d.models.peft_files import PeftAdapter, check_adapter, write_adapter
from megatron_s2d.models.weights import export_buckets, import_weights
from megatron_s2d.objectives.distill import sft_objective
from megatron_s2d.parallel import device
from megatron_s2d.parallel import layout as layouts
from megatron_s2d.records import Sample
from megatron_s2d.train.megatron_model import MegatronModel

VOCAB = 61
ALL = LoraConfig(rank=3, alpha=7, targets=["all-linear"])


@pytest.fixture(scope="module")
def layout():
    torch.set_num_threads(1)
    layouts.initialize_distributed()
    return layouts.build_layout(ParallelConfig())


def build(layout, preset="tiny-teacher", precision="float32", **options) -> MegatronModel:
    config = ModelConfig(preset=preset, vocab_size=VOCAB, **options)
    return MegatronModel(
        config.resolve(), layout, precision=precision, max_tokens=64, seed=3, packed=True, options=config
    )


def samples(count=5, seed=0):
    import numpy as np

    rng = np.random.default_rng(seed)
    return [
        Sample(
            str(n), str(n), str(n), "test", 0, rng.integers(0, VOCAB, 6 + n), np.arange(6 + n) >= 3, 1.0, "data"
        )
        for n in range(count)
    ]  # fmt: skip


def scores(model):
    import numpy as np

    return np.concatenate(model.score(samples()))


def logits(model, tokens):
    with model.layout.active(), torch.no_grad():
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        return model.chunks[0](tokens, positions, None)[..., :VOCAB]


@pytest.mark.parametrize(
    ("preset", "targets"),
    [
        ("tiny-teacher", ["all-linear"]),
        ("tiny-qwen2", ["q_proj", "v_proj", "up_proj"]),
        ("tiny-gemma3", ["all-linear"]),
        ("tiny-moe", ["all-linear"]),
        ("tiny-moe", ["o_proj", "experts"]),
        ("tiny-gpt-oss", ["q_proj", "k_proj", "o_proj"]),
    ],
)
def test_logits_and_exported_weights_are_those_of_the_sum(preset, targets, tmp_path, layout):
    lora = LoraConfig(rank=3, alpha=7, targets=targets)
    model = build(layout, preset)
    (tmp_path / "config.json").write_text(json.dumps(hf_config_from_spec(model.spec, "float32")))
    reference = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path), torch_dtype=torch.float32
    ).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in reference.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.13 * noise)
    reference.save_pretrained(tmp_path)
    import_weights(model.chunks, model.spec, layout, HfCheckpoint(tmp_path))
    tensors = random_adapter(model.spec, lora)
    write_adapter(tmp_path / "adapter", lora, tensors, "base")
    tokens = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    base = logits(model, tokens)

    model.add_adapter(lora.model_copy(update={"adapter": tmp_path / "adapter"}), seed=0)
    with torch.no_grad():
        expected = merged_in_float64(reference, tensors, lora)(tokens).logits
    unmerged = logits(model, tokens)
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(unmerged.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    with model.adapter.off():
        assert torch.equal(logits(model, tokens), base)
    exported = dict(item for bucket in export_buckets(model.chunks, model.spec, layout) for item in bucket)
    model.adapter.merge()
    # Merged weights are rounded once more; 1.2e-5 was seen.
    torch.testing.assert_close(logits(model, tokens), unmerged, rtol=0, atol=3e-5 * float(expected.abs().max()))
    for name, tensor in (item for bucket in export_buckets(model.chunks, model.spec, layout) for item in bucket):
        assert torch.equal(tensor, exported[name]), name
    merge_adapter(tmp_path, tmp_path / "adapter", tmp_path / "merged")
    merged = HfCheckpoint(tmp_path / "merged")
    assert merged.spec == model.spec and merged.tensors.keys() == exported.keys()
    for name, tensor in exported.items():
        torch.testing.assert_close(merged.read(name), tensor, rtol=0, atol=1e-7)


class FusedNormLinear(torch.nn.Module):
    """What adapters see of Transformer Engine's LayerNormLinear: the norm of its input is inside, with its weight."""

    def __init__(self, norm, linear):
        super().__init__()
        self.weight, self.layer_norm_weight = torch.nn.Parameter(linear.weight), torch.nn.Parameter(norm.weight)
        self.config, self.sequence_parallel, self._norm = linear.config, False, (norm,)

    def forward(self, x):
        return torch.nn.functional.linear(self._norm[0](x), self.weight), None


@pytest.mark.parametrize("preset", ["tiny-teacher", "tiny-llama"])
def test_adapters_beside_a_fused_norm_read_the_normalised_input(preset, layout, tmp_path):
    plain, fused = build(layout, preset), build(layout, preset)
    with torch.no_grad():
        for model in (plain, fused):
            for name, parameter in model.chunks[0].named_parameters():
                if "norm" in name:
                    parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    for layer in fused.chunks[0].decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        attention.linear_qkv = FusedNormLinear(layer.input_layernorm, attention.linear_qkv)
        mlp.linear_fc1 = FusedNormLinear(layer.pre_mlp_layernorm, mlp.linear_fc1)
        layer.input_layernorm, layer.pre_mlp_layernorm = torch.nn.Identity(), torch.nn.Identity()
    tokens = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    base = logits(plain, tokens)
    assert torch.equal(logits(fused, tokens), base)
    write_adapter(tmp_path / "adapter", ALL, random_adapter(plain.spec, ALL), "")
    for model in (plain, fused):
        model.add_adapter(ALL.model_copy(update={"adapter": tmp_path / "adapter"}), seed=0)
    assert (logits(plain, tokens) - base).abs().max() > 0.1
    torch.testing.assert_close(logits(fused, tokens), logits(plain, tokens), rtol=0, atol=1e-5)
    assert scores(fused) == pytest.approx(scores(plain), abs=1e-5)  # packed
    with fused.adapter.off():
        assert torch.equal(logits(fused, tokens), base)


def test_experts_beside_transformer_engine_are_refused(layout, monkeypatch):
    dense, moe = (ModelConfig(preset=name, vocab_size=VOCAB).resolve() for name in ("tiny-teacher", "tiny-moe"))
    with_engine = dataclasses.replace(device.capabilities(), cuda=True, transformer_engine=True)
    monkeypatch.setattr(device, "capabilities", lambda: with_engine)
    with pytest.raises(UserError, match="adapters of experts are not implemented beside Transformer Engine's"):
        check_layers(moe, ALL)
    check_layers(dense, ALL)
    check_layers(moe, LoraConfig(rank=3, targets=["q_proj", "o_proj"]))


def test_peft_directories_round_trip_and_a_new_adapter_changes_nothing(tmp_path, layout):
    model = build(layout, "tiny-moe")
    base, before = scores(model), dict(export_buckets(model.chunks, model.spec, layout).__next__())
    model.add_adapter(ALL, seed=9)
    assert (scores(model) == base).all()
    fresh = model.adapter.tensors()
    assert sum(tensor.numel() for tensor in fresh.values()) == num_adapter_values(model.spec, ALL)
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    bound = fresh[name].shape[1] ** -0.5  # PEFT's kaiming_uniform_ with a = sqrt(5)
    assert 0.9 * bound < fresh[name].abs().max() <= bound
    assert all((tensor == 0).all() == (".lora_B." in key) for key, tensor in fresh.items())
    assert torch.equal(fresh[name], SeededAdapter(9).read(name, tuple(fresh[name].shape)))
    assert before.keys() == dict(export_buckets(model.chunks, model.spec, layout).__next__()).keys()

    tensors = random_adapter(model.spec, ALL)
    write_adapter(tmp_path / "in", ALL, tensors, "models/base")
    other = build(layout, "tiny-moe")
    other.add_adapter(ALL.model_copy(update={"adapter": tmp_path / "in"}), seed=0)
    other.adapter.write(tmp_path / "out", "models/base")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert stored.keys() == {f"base_model.model.{key}" for key in tensors}
    assert all(torch.equal(stored[f"base_model.model.{key}"], tensor) for key, tensor in tensors.items())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 7)
    assert config["target_modules"] == list(PROJECTIONS) and config["base_model_name_or_path"] == "models/base"


def trained(layout, steps, adapter=True, resume=None, save=None, **options):
    model = build(layout, **options)
    if adapter:
        model.add_adapter(ALL, seed=9)
    model.prepare_training(OptimizerConfig(lr=1e-2), 4)
    if resume:
        model.load(resume, with_optimizer=True)
    batch = samples()
    columns = {"supervised_weight": [1 / 30] * len(batch)}
    metrics = []
    for _ in range(steps):
        batches = model.pack(batch, columns)
        values = model.forward_backward(batches, sft_objective(), num_tokens=sum(item.length for item in batch))
        metrics.append((values["loss"].value(), model.optim_step()))
    if save:
        model.save(save, {"step": steps, "updates": steps}, with_optimizer=True)
    return model, metrics


def test_only_the_adapter_is_trained_and_saved_and_resumed(tmp_path, layout):
    start = build(layout)
    base = scores(start)
    model, metrics = trained(layout, 3)
    assert metrics[2][0] < metrics[0][0] - 0.01
    # No gradients, no optimizer state and no copy of the frozen weights.
    count = num_adapter_values(model.spec, ALL)
    buffers = [buffer for chunk in model.trainable.chunks for buffer in chunk.buffers]
    assert sum(item.numel() for buffer in buffers for item in buffer.params) == count
    assert sum(value["exp_avg"].numel() for value in model.trainable.optimizer.optimizer.state.values()) == count
    reference = model.without_adapter()
    assert (scores(reference) == base).all() and not (scores(model) == base).all()
    ours, theirs = ({id(p) for p in one.chunks[0].parameters()} for one in (model, reference))
    assert ours == theirs
    for (name, one), (_, other) in zip(
        start.chunks[0].named_parameters(),
        [item for item in model.chunks[0].named_parameters() if not item[0].startswith("adapter.")],
        strict=True,
    ):
        assert torch.equal(one, other), name

    trained(layout, 2, save=tmp_path / "step_2")
    size = sum(path.stat().st_size for path in (tmp_path / "step_2").glob("*.distcp"))
    assert size < 0.5 * 4 * model.spec.num_parameters  # weights alone would take more
    resumed, rest = trained(layout, 1, resume=tmp_path / "step_2")
    assert rest == metrics[2:]
    for key, tensor in resumed.adapter.tensors().items():
        assert torch.equal(tensor, model.adapter.tensors()[key]), key

    model.adapter.merge()
    model.save(tmp_path / "final", {"stage": "x"}, with_optimizer=False)
    plain = build(layout)
    plain.load(tmp_path / "final")
    assert scores(plain) == pytest.approx(scores(resumed), abs=1e-4)


@pytest.mark.parametrize("options", [{"recompute": "full"}, {"recompute": "selective", "recompute_modules": ["mlp"]}])
def test_recomputed_layers_have_the_same_gradients(options, layout):
    _, metrics = trained(layout, 2)
    _, recomputed = trained(layout, 2, **options)
    for step, expected in zip(recomputed, metrics, strict=True):
        assert step == pytest.approx(expected, rel=1e-4)


def test_what_is_impossible_is_refused(tmp_path):
    names = ("tiny-teacher", "tiny-moe", "tiny-gpt-oss")
    dense, moe, gpt_oss = (ModelConfig(preset=name, vocab_size=VOCAB).resolve() for name in names)
    for fields, spec, parallel, fp8, message in (
        ({"rank": 4, "targets": ["experts"]}, dense, {}, None, "no experts"),
        ({"rank": 4096}, dense, {}, None, "smaller side of"),
        ({"rank": 4}, dense, {}, Fp8Config(), "FP8"),
        ({"rank": 4}, gpt_oss, {}, None, "all experts of a layer in one tensor"),
        (
            {"rank": 4, "targets": ["v_proj"]},
            dense,
            {"tensor_model_parallel_size": 2 * dense.num_query_groups},
            None,
            "share a head",
        ),
    ):
        with pytest.raises(UserError, match=message):
            check_lora("stages.x.lora", LoraConfig(**fields), spec, ParallelConfig(**parallel), fp8)
    check_lora("x", LoraConfig(rank=4, targets=["experts"]), moe, ParallelConfig(), None)
    check_lora("x", LoraConfig(rank=4, targets=["o_proj"]), gpt_oss, ParallelConfig(), None)
    with pytest.raises(ValueError, match="dropout is not implemented"):
        LoraConfig(rank=4, dropout=0.1)

    lora = LoraConfig(rank=2, targets=["o_proj"])
    write_adapter(tmp_path / "a", lora, random_adapter(dense, lora), "")
    check_adapter("lora", lora.model_copy(update={"adapter": tmp_path / "a"}), dense)
    with pytest.raises(UserError, match=r"lora\.alpha is not that of"):
        check_adapter("lora", lora.model_copy(update={"adapter": tmp_path / "a", "alpha": 1.0}), dense)
    config = tmp_path / "a" / "adapter_config.json"
    plain = json.loads(config.read_text())
    for changed, message in (
        ({"use_dora": True}, "use_dora true is not supported"),
        ({"rank_pattern": {"o_proj": 3}}, "rank_pattern"),
        ({"target_modules": ["lm_head"]}, "lm_head"),
        ({"peft_type": "IA3"}, "only LORA"),
        ({"r": None}, "r or lora_alpha"),
        ({"r": 3}, "the model needs"),
    ):
        config.write_text(json.dumps(plain | changed))
        with pytest.raises(UserError, match=message):
            PeftAdapter(tmp_path / "a", dense)
    config.write_text(json.dumps(plain))
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    save_file(dict(list(stored.items())[1:]), tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="is missing"):
        PeftAdapter(tmp_path / "a", dense)
