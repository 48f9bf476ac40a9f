"""The Triton kernels against float64 in Triton's interpreter, which needs a separate process but no GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_s2d.errors import UserError
from megatron_s2d.kl import torch_backend as statistics
from megatron_s2d.kl.chunk import choose_backend, triton_problem

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def results() -> dict:
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kl_triton_worker.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.splitlines()[-1])


def test_statistics_and_values(results):
    for case, errors in results.items():
        if case == "call" or case.startswith("1 "):
            continue
        assert errors["statistics"] <= 1e-6, case
        for name in ("forward_kl", "reverse_kl", "entropy", "log_probs", case.split()[2]):
            # Five columns, one of them 15 above the next: the divergence is of the size of a few float32 roundings.
            assert errors[name] <= (3e-5 if case.startswith("5 ") else 1e-5), (case, name)


def test_gradients_in_float32_and_bfloat16(results):
    for case, errors in results.items():
        for key, error in errors.items():
            if key.startswith("gradient") and not case.startswith("1 "):
                assert error <= (3e-6 if key.endswith("float32") else 2**-7), (case, key)  # bfloat16: one unit


def test_vocabulary_of_one(results):
    for case, errors in results.items():
        if case.startswith("1 "):
            for name, error in errors.items():
                assert error <= (2**-7 if name.endswith("bfloat16") else 0), (case, name)


def test_linear_divergence(results):
    assert results["call"]["loss"] <= 1e-6
    assert results["call"]["hidden"] <= 1e-5 and results["call"]["weight"] <= 1e-5


def test_every_kernel_compiles_for_a_gpu(tmp_path):
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kl_triton_compile.py"))],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert int(finished.stdout.splitlines()[-1]) == 14


def test_without_a_compiler_pytorch_computes_and_one_line_says_so(monkeypatch, tmp_path, caplog):
    """Triton compiles what launches a kernel at run time; slim containers have no compiler."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    triton_problem.cache_clear()
    try:
        cuda = torch.device("cuda")
        assert choose_backend("auto", cuda, torch.float32) is statistics
        assert choose_backend("auto", cuda, torch.float32) is statistics
        with pytest.raises(
            UserError, match="backend triton: Triton cannot compile.*install gcc.*or choose backend torch"
        ):
            choose_backend("triton", cuda, torch.float32)
        (record,) = [record for record in caplog.records if "divergences are computed by PyTorch" in record.message]
        assert "install gcc" in record.message and "\n" not in record.message
    finally:
        triton_problem.cache_clear()


@pytest.mark.skipif(shutil.which("gcc") is None and shutil.which("clang") is None, reason="no C compiler")
def test_backend_selection():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert choose_backend("auto", cpu, torch.float32) is statistics
    assert choose_backend("auto", cuda, torch.float64) is statistics
    assert choose_backend("auto", cuda, torch.float32).__name__.endswith("triton_backend")
    with pytest.raises(UserError, match="needs CUDA tensors"):
        choose_backend("triton", cpu, torch.float32)
    with pytest.raises(UserError, match="computes in float32"):
        choose_backend("triton", cuda, torch.float64)
