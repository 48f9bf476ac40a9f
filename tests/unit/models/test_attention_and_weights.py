"""Attention against its definition in float64, packing, sharding and joining of parameters, seeded weights, export."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")


from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.recompute import Recompute
from megatron_s2d.errors import UserError
from megatron_s2d.models.build import build_model
from megatron_s2d.models.families import global_param_mappings, hf_tensor_shapes, layer_param_mappings
from megatron_s2d.models.layers import attend
from megatron_s2d.models.shards import SeededWeights, join_shards, read_shard
from megatron_s2d.models.weights import export_buckets, import_weights
from megatron_s2d.parallel import layout as layouts

from megatron.core.packed_seq_params import PackedSeqParams  # isort: skip


@pytest.fixture(scope="module")
def layout():
    torch.set_num_threads(1)
    layouts.initialize_distributed()
    return layouts.build_layout(ParallelConfig())


def reference_attention(query, key, value, mask):
    """Softmax attention in float64; rows that see nothing are zero."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    group = query.size(2) // key.size(2)
    key, value = (tensor.repeat_interleave(group, dim=2) for tensor in (key, value))
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) / query.size(3) ** 0.5
    weights = torch.softmax(scores.masked_fill(mask, -torch.inf), dim=-1).nan_to_num(0.0)
    return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(7, 7), (1, 9), (3, 9)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_equals_its_definition(num_queries, num_keys, groups):
    torch.manual_seed(0)
    query = torch.randn(num_queries, 2, 4, 6, requires_grad=True)
    key, value = (torch.randn(num_keys, 2, groups, 6, requires_grad=True) for _ in range(2))
    causal = ~torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    padding = torch.zeros(2, 1, 1, num_keys, dtype=torch.bool)
    padding[1, ..., :2] = True
    for attention_mask, mask in ((None, causal), (causal | padding, causal | padding)):
        output = attend(query, key, value, attention_mask)
        expected = reference_attention(query, key, value, mask)
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-6)
        cotangent = torch.randn_like(output)
        gradients = torch.autograd.grad(output, (query, key, value), cotangent)
        expected_gradients = torch.autograd.grad(expected, (query, key, value), cotangent.double())
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert torch.isfinite(gradient).all()
            torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset", ["tiny-teacher", "tiny-llama", "tiny-moe"])
def test_packed_sequences_equal_separate_ones(preset, layout):
    spec = ModelConfig(preset=preset).resolve(25)
    (model,) = build_model(spec, layout, seed=1)
    sequences = [torch.randint(0, 25, (1, length)) for length in (5, 1, 8)]
    cu_seqlens = torch.tensor([0, 5, 6, 14], dtype=torch.int32)
    packing = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=8, max_seqlen_kv=8
    )
    with layout.active(), torch.no_grad():
        separate = [model(tokens, torch.arange(tokens.size(1))[None], None) for tokens in sequences]
        packed = torch.cat(sequences, dim=1)
        positions = torch.cat([torch.arange(tokens.size(1)) for tokens in sequences])[None]
        logits = model(packed, positions, None, packed_seq_params=packing)
    torch.testing.assert_close(logits, torch.cat(separate, dim=1), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("preset", "recompute"),
    [
        ("tiny-llama", Recompute("selective")),
        ("tiny-llama", Recompute("selective", ("mlp",))),
        ("tiny-moe", Recompute("selective", ("core_attn", "moe"))),
        ("tiny-llama", Recompute("full", num_layers=2)),
        ("tiny-llama", Recompute("full", method="block", num_layers=1)),
    ],
    ids=str,
)
def test_recomputation_gives_the_same_gradients(preset, recompute, layout):
    spec = ModelConfig(preset=preset).resolve(25)
    tokens = torch.randint(0, 25, (2, 9))
    gradients = []
    for choice in (Recompute(), recompute):
        (model,) = build_model(spec, layout, seed=1, recompute=choice)
        model.train()
        with layout.active():
            model(tokens, torch.arange(9).expand(2, 9), None).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=3e-7)


def test_recomputation_that_needs_transformer_engine_is_refused(layout):
    spec = ModelConfig(preset="tiny-moe").resolve(25)
    with pytest.raises(UserError, match="layernorm needs Transformer Engine"):
        build_model(spec, layout, recompute=Recompute("selective", ("layernorm",)))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("preset", ["tiny-teacher", "tiny-llama", "tiny-moe"])
def test_joining_inverts_sharding(preset, tp_size):
    spec = ModelConfig(preset=preset).resolve(27)
    source = SeededWeights(spec, 3)
    shapes = dict(hf_tensor_shapes(spec))
    seen = set()
    for mapping in [
        *global_param_mappings(spec, "first"),
        *layer_param_mappings(spec, 1),
        *global_param_mappings(spec, "last"),
    ]:
        shards = [read_shard(mapping, spec, source, rank, tp_size) for rank in range(tp_size)]
        assert len({shard.shape for shard in shards}) == 1
        for name, tensor in join_shards(mapping, spec, shards):
            assert tuple(tensor.shape) == shapes[name]
            assert torch.equal(tensor, source.read(name)), name
            seen.add(name)
    assert seen == {name for name in shapes if "layers.0." not in name}


def test_seeded_weights():
    spec = ModelConfig(preset="small-teacher").resolve(50)
    source = SeededWeights(spec, 1)
    name = "model.layers.2.mlp.gate_proj.weight"
    weight = source.read(name)
    assert torch.equal(weight[3:9], source.read(name, 0, 3, 9))
    assert torch.equal(weight, SeededWeights(spec, 1).read(name))
    assert not torch.equal(weight, SeededWeights(spec, 2).read(name))
    assert not torch.equal(weight, source.read(name.replace("gate", "up")))
    assert weight.std() == pytest.approx(spec.initializer_range, rel=0.05) and abs(float(weight.mean())) < 0.002
    residual = source.read("model.layers.2.mlp.down_proj.weight")
    assert residual.std() == pytest.approx(spec.initializer_range / (2 * spec.num_layers) ** 0.5, rel=0.05)
    assert torch.equal(source.read("model.norm.weight"), torch.ones(spec.hidden_size))


def test_buckets_are_bounded_and_in_a_fixed_order(layout):
    spec = ModelConfig(preset="tiny-moe").resolve(25)
    chunks = build_model(spec, layout, seed=1)
    buckets = list(export_buckets(chunks, spec, layout, bucket_bytes=60_000))
    assert len(buckets) > 5
    assert all(sum(tensor.nbytes for _, tensor in bucket) <= 60_000 for bucket in buckets)
    names = [[name for name, _ in bucket] for bucket in buckets]
    again = [[name for name, _ in bucket] for bucket in export_buckets(chunks, spec, layout, bucket_bytes=60_000)]
    assert names == again
    assert sorted(name for bucket in names for name in bucket) == sorted(name for name, _ in hf_tensor_shapes(spec))
    before = buckets[0][0][1].clone()
    with torch.no_grad():
        chunks[0].embedding.word_embeddings.weight.zero_()
    assert torch.equal(buckets[0][0][1], before)


def test_weights_of_another_model_are_refused(layout):
    spec = ModelConfig(preset="tiny-teacher").resolve(25)
    chunks = build_model(spec, layout)
    wider = dataclasses.replace(spec, ffn_hidden_size=spec.ffn_hidden_size * 2)
    with pytest.raises(ValueError, match=r"gate_proj.weight \+ .*up_proj.weight: shape"):
        import_weights(chunks, wider, layout, SeededWeights(wider, 1))


def test_layout_that_does_not_divide_the_model_is_refused(layout):
    spec = ModelConfig(preset="tiny-teacher").resolve(25)
    other = dataclasses.replace(layout, config=ParallelConfig(tensor_model_parallel_size=3))
    with pytest.raises(UserError, match="num_attention_heads 4 cannot be divided"):
        build_model(spec, other)
