"""The stub itself: what it answers, what it refuses by name, and the values that the host reads."""

import subprocess
import sys

import pytest

from megatron_s2d.errors import UserError
from megatron_s2d.measure import build_stub


def run_on_stub(stub, code: str) -> subprocess.CompletedProcess:
    lines = ["import torch", "from megatron_s2d.measure.host_values import HostValues"]
    lines += ["from megatron_s2d.measure.stub import Stub", "stub = Stub()", "stub.trace(True)", code]
    exit_at_once = "import os, sys; sys.stdout.flush(); os._exit(0)"
    program = "\n".join([*lines, exit_at_once])
    return subprocess.run(["env", f"LD_PRELOAD={stub}", sys.executable, "-c", program], capture_output=True, text=True)


def test_integers_and_booleans_are_computed_and_floats_are_one(stub):
    code = """
with HostValues(stub):
    numbers = torch.arange(10, device="cuda")
    assert ((numbers * 3 + 1) // 2).tolist() == [(n * 3 + 1) // 2 for n in range(10)]
    mask = torch.tensor([True, False, True]).cuda()
    assert mask.nonzero().squeeze(1).tolist() == [0, 2] and int(mask.sum()) == 2
    floats = torch.randn(3, device="cuda")
    assert floats[mask].shape == (2,) and floats.masked_select(mask).shape == (2,) and floats.tolist() == [1.0] * 3
    assert float(floats.sum()) == 1.0 and not bool(floats.isnan().any()) and bool((floats > 0).all())
    assert torch.unique(numbers // 4).tolist() == [0, 1, 2] and torch.bincount(numbers // 4).tolist() == [4, 4, 2]
    part = torch.zeros(5, dtype=torch.int64, device="cuda")
    part[1:3] += 7
    part[torch.tensor([4], device="cuda")] = 9
    assert part.tolist() == [0, 7, 7, 0, 9]
    weight = torch.randn(4, 4, device="cuda", requires_grad=True)
    seen = []
    weight.register_hook(lambda grad: seen.append(torch.arange(4, device="cuda").tolist()))
    (weight @ weight).sum().backward()  # another thread
    assert seen == [[0, 1, 2, 3]]
    experts = torch.zeros(16, 8, device="cuda").topk(2, dim=1).indices
    assert torch.bincount(experts.flatten(), minlength=8).tolist() == [4] * 8
    chosen = torch.zeros(16, 8, device="cuda").int().scatter(1, experts, 1).bool()  # a filled float keeps its number
    assert chosen.sum(0).tolist() == [4] * 8
    assert torch.full((2,), 3.0, device="cuda").tolist() == [3.0] * 2
    kernel = torch.randn(2000, device="cuda")
    assert kernel.sum().item() == 1.0 and kernel.exp().mean().tolist() == 1.0
    # A flag or count among floats of kernels keeps its value, through views and copies.
    flag = kernel.isinf().any().to(torch.float64)
    sums = torch.cat([kernel[:2].double() * 3, flag[None], mask.sum().double()[None]])
    *_, infinite, count = sums.cpu()
    assert float(infinite) == 0.0 and float(count) == 2.0
    sums.copy_(kernel[:4])
    assert sums.tolist() == [1.0] * 4
"""
    result = run_on_stub(stub, code)
    assert result.returncode == 0, result.stderr[-2000:]


def test_waits_launches_products_and_memory_are_counted(stub):
    code = """
with HostValues(stub):
    stub.take()
    a = torch.empty(64, 32, dtype=torch.bfloat16, device="cuda")
    b = torch.empty(32, 16, dtype=torch.bfloat16, device="cuda")
    torch.mm(a, b, out_dtype=torch.float32)
    (a + 1).sum().item()
    counts = stub.take()
(product,) = counts.products
assert (product.m, product.n, product.k, product.a, product.c, product.count) == (16, 64, 32, "bf16", "f32", 1)
assert sum(counts.launches.values()) == 2 and sum(counts.waits.values()) == 1, counts
try:
    torch.empty(80 << 30, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError as error:
    assert "79.10 GiB" in str(error)
else:
    raise AssertionError("a device of 79.1 GiB has no 80 GiB")
"""
    result = run_on_stub(stub, code)
    assert result.returncode == 0, result.stderr[-2000:]


def test_a_graph_counts_as_one_launch_and_refuses_waits(stub):
    code = """
x = torch.zeros(8, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = x + 1 + 2 + 3
stub.take()
graph.replay()
assert sum(stub.take().launches.values()) == 1
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()
except RuntimeError as error:
    assert "capturing" in str(error), error
else:
    raise AssertionError("a wait was recorded")
"""
    result = run_on_stub(stub, code)
    assert result.returncode == 0, result.stderr[-2000:]


def test_attention_with_a_mask_is_captured(stub):
    """In a graph the random state of its dropout is on the device; the kernel has no counterpart on the host."""
    code = """
with HostValues(stub):
    query = torch.empty(2, 4, 1, 64, dtype=torch.bfloat16, device="cuda")
    keys, allowed = query.expand(2, 4, 32, 64).contiguous(), torch.ones(2, 1, 1, 32, dtype=torch.bool, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.nn.functional.scaled_dot_product_attention(query, keys, keys, attn_mask=allowed)
    stub.take()
    graph.replay()
assert sum(stub.take().launches.values()) == 1
"""
    result = run_on_stub(stub, code)
    assert result.returncode == 0, result.stderr[-2000:]


def test_attention_of_cudnn_allocates_its_workspace_and_counts(stub):
    code = """
q = torch.empty(2, 16, 512, 128, dtype=torch.bfloat16, device="cuda", requires_grad=True)
with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
    output = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
grad = torch.empty_like(output)
torch.cuda.reset_peak_memory_stats()
held = torch.cuda.memory_allocated()
output.backward(grad)
launches = stub.take().launches
assert launches["cuDNN plan"] == launches["cuDNN plan built"] == 2
# Three gradients, a sum of two of them, and the frontend's float32 accumulator of the queries' gradient.
assert torch.cuda.max_memory_allocated() - held > 5 * output.nbytes
"""
    result = run_on_stub(stub, code)
    assert result.returncode == 0, result.stderr[-2000:]


def test_collectives_are_overlapped_if_products_are_queued_before_they_are_waited_for(stub):
    code = """
import torch.distributed as dist
from megatron_s2d.measure.single_rank import become_rank
become_rank(0, 2)
stub.take()
x, w = torch.zeros(64, 64, device="cuda"), torch.zeros(64, 64, device="cuda")
dist.all_reduce(x)  # in order with the kernels
x @ w
work = dist.all_reduce(x, async_op=True)
w @ w
work.wait()
work = dist.all_reduce(w, async_op=True)  # waited for at once
work.wait()
x @ w
counts = stub.take()
(total,), (hidden,) = counts.collectives, counts.overlapped
assert (total.count, hidden.count, hidden.bytes, hidden.begun_before) == (3, 1, 4 * 64 * 64, False), counts
work = dist.all_reduce(x, async_op=True)
stub.take()
x @ w
work.wait()
(hidden,) = stub.take().overlapped
assert hidden.begun_before
"""
    result = run_on_stub(stub, code)
    assert result.returncode == 0, result.stderr[-2000:]


def test_expandable_segments_grow_on_the_stub(stub):
    code = """
import os
os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
x = torch.empty(10 << 20, device="cuda")
y = torch.empty(30 << 20, device="cuda")
(segment,) = torch.cuda.memory_snapshot()
assert segment["is_expandable"] and segment["allocated_size"] == 160 << 20
"""
    result = run_on_stub(stub, code)
    assert result.returncode == 0, result.stderr[-2000:]


def test_a_call_without_an_answer_fails_with_its_name(stub):
    result = run_on_stub(stub, "z = torch.zeros(2, 2, dtype=torch.complex64, device='cuda'); z @ z")
    assert result.returncode != 0
    assert "the CUDA stub does not answer cublasCgemm" in result.stderr


def test_the_stub_answers_or_refuses_every_function_of_the_libraries(stub):
    names = build_stub.answered_calls(stub)
    assert {"cudaMalloc", "cublasGemmEx", "ncclAllReduce", "cuLaunchKernel", "stub_take"} <= names
    assert not build_stub._functions_of_libraries() - names


@pytest.mark.parametrize("source", sorted(build_stub.SOURCES.glob("*.cpp")), ids=lambda source: source.stem)
def test_the_sources_need_no_header_beyond_those_of_pytorch_and_triton(source):
    """``nv/target`` comes with SGLang's kernels only: a machine without them has to build the stub too."""
    folders = [f"-I{folder}" for folder in build_stub._include_folders()]
    headers = build_stub._run(build_stub._compiler(), "-std=c++17", "-M", *folders, str(source))
    assert "cuda_runtime_api.h" in headers
    assert "nv/target" not in headers


@pytest.mark.parametrize(
    ("missing", "hint"),
    [("_compiler", "compiles a small library"), ("_include_folders", "header cuda_runtime_api.h of CUDA is missing")],
)
def test_a_machine_that_cannot_compile_it_says_what_to_do(monkeypatch, missing, hint):
    monkeypatch.setattr(build_stub, missing, lambda: None if missing == "_compiler" else [])
    with pytest.raises(UserError, match=hint):
        build_stub.stub_library()


def test_every_case_is_measured_by_one_file():
    import test_families
    import test_one_group
    import test_tensor_and_pipeline
    import test_transformer_engine
    from cases import CASES

    files = (test_families, test_one_group, test_tensor_and_pipeline, test_transformer_engine)
    assert sorted(name for file in files for name in file.NAMES) == sorted(CASES)
