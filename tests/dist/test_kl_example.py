"""The examples of docs/kl.md, run as printed on two ranks, against a float64 single-process computation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.dist

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "kl.md").read_text(encoding="utf-8"), re.DOTALL)


def run_example(source: str, folder: Path) -> dict[int, tuple[float, float]]:
    """Run ``source`` under torchrun and return (loss, gradient norm) as each rank printed them."""
    script = folder / "example.py"
    script.write_text(source, encoding="utf-8")
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("--log-dir", str(folder / "logs"), "--redirects", "1", str(script)),  # a file for each rank's output
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    output = "".join(path.read_text(encoding="utf-8") for path in (folder / "logs").rglob("stdout.log"))
    lines = re.findall(r"rank (\d): loss (\S+), gradient norm (\S+)", output)
    return {int(rank): (float(loss), float(norm)) for rank, loss, norm in lines}


def reverse_kl(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean reverse KL of logits [t, v] by its definition."""
    log_p, log_q = torch.log_softmax(z, -1), torch.log_softmax(y, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def test_page_has_two_short_examples():
    assert len(EXAMPLES) == 2
    assert len([line for line in EXAMPLES[0].splitlines() if line.strip()]) <= 15


def test_example_with_logits(tmp_path):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 8, 1000).double()
    student.requires_grad_()
    loss = reverse_kl(student, teacher)
    loss.backward()
    printed = run_example(EXAMPLES[0], tmp_path)
    for rank, columns in ((0, slice(0, 500)), (1, slice(500, 1000))):
        assert printed[rank][0] == pytest.approx(loss.item(), abs=2e-6)
        assert printed[rank][1] == pytest.approx(student.grad[:, columns].norm().item(), abs=2e-6)


def test_example_with_hidden_states(tmp_path):
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(8, 64).double().requires_grad_(), torch.randn(8, 96).double()
    weight, teacher_weight = torch.randn(1000, 64).double() / 8, torch.randn(1000, 96).double() / 8
    loss = reverse_kl(hidden @ weight.T, teacher_hidden @ teacher_weight.T)
    loss.backward()
    printed = run_example(EXAMPLES[1], tmp_path)
    assert printed.keys() == {0, 1}
    for value, norm in printed.values():
        assert value == pytest.approx(loss.item(), rel=2e-6)
        assert norm == pytest.approx(hidden.grad.norm().item(), rel=2e-5)
