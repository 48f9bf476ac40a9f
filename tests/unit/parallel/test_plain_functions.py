"""Without a GPU nothing of Megatron-Core is compiled, and no kernels for GPUs are imported."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_s2d.parallel.cuda_variables import installed_gpus

SCRIPT = """
import torch
import megatron_s2d.workflow.worker
from megatron.core.activations import quick_gelu

value = torch.tensor([0.5, -2.0])
assert torch.equal(quick_gelu(value), value * torch.sigmoid(1.702 * value))
assert not hasattr(quick_gelu, "_torchdynamo_orig_callable")
print("nothing else imports it")
import flashinfer
"""


@pytest.mark.skipif(installed_gpus() is not None or torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_functions_are_plain_and_kernels_are_not_imported(tmp_path):
    for name in ("flashinfer", "quack", "flash_attn"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('{name} is imported')")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert result.stdout == "nothing else imports it\n", result.stderr[-2000:]
    assert result.stderr.endswith("flashinfer is imported\n")
