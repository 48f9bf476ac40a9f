"""Without a GPU nothing of Megatron-Core is compiled."""

import subprocess
import sys

import pytest
import torch

from megatron_s2d.parallel.cuda_variables import installed_gpus

SCRIPT = """
import sys, torch
import megatron_s2d.models.build
from megatron.core.activations import quick_gelu

value = torch.tensor([0.5, -2.0])
assert torch.equal(quick_gelu(value), value * torch.sigmoid(1.702 * value))
sys.exit("torch._inductor" in sys.modules)
"""


@pytest.mark.skipif(installed_gpus() is not None or torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_fused_functions_run_without_a_compiler():
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
