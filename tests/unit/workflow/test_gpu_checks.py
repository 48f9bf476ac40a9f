"""What ``s2d doctor`` says of a driver, chip, wheel or compiler that does not suit, from answers of stand-ins."""

import dataclasses
import types

import pytest

from megatron_s2d.workflow import doctor, gpu_checks
from megatron_s2d.workflow.gpu_checks import GpuFacts, check_gpu, read_nvidia_smi

NCCL, CUDNN = "nvidia-nccl-cu13", "nvidia-cudnn-cu13"
GOOD = GpuFacts(
    driver="580.95.05",
    gpus=(("NVIDIA H100 80GB HBM3", "9.0"),) * 2,
    libcuda=True,
    torch_version="2.11.0+cu130",
    torch_cuda="13.0",
    num_devices=2,
    compiler="/usr/bin/cc",
    versions=((NCCL, "2.28.9"), ("transformer-engine", "2.20.2"), ("transformer-engine-torch", "2.20.2"),
              ("transformer-engine-cu13", "2.20.2")),
    torch_requires=(f"{NCCL}==2.28.9; platform_system == 'Linux'", f"{CUDNN}==9.19.0.56", "sympy>=1.13"),
)  # fmt: skip


def with_version(name: str, version: str) -> tuple[tuple[str, str], ...]:
    return tuple((dict(GOOD.versions) | {name: version}).items())


CASES = {
    "driver too old for CUDA 13": (
        {"driver": "535.183.01", "num_devices": 0},
        ("driver", ">= 580.65 for CUDA 13.0", "apt-get install nvidia-driver-580-open, or install a torch of CUDA 12"),
    ),
    "driver not loaded": (
        {"gpus": (), "driver": "", "nvidia_smi_error": "NVIDIA-SMI has failed because", "num_devices": 0},
        ("driver", "answers nvidia-smi", "sudo modprobe nvidia"),
    ),
    "no libcuda": ({"libcuda": False, "num_devices": 0}, ("driver", "libcuda.so.1", "--gpus all")),
    "torch without CUDA": (
        {"torch_cuda": None, "torch_version": "2.11.0+cpu", "num_devices": 0},
        ("torch", "a CUDA build", "torch==2.11.0 --index-url https://download.pytorch.org/whl/cu130"),
    ),
    "devices hidden": ({"num_devices": 0}, ("CUDA device", "2 of nvidia-smi", "unset CUDA_VISIBLE_DEVICES")),
    "old chip": (
        {"gpus": (("Tesla T4", "7.5"),)}, ("compute capability", ">= 8.0 for bfloat16", "Ampere"),
    ),
    "old chip beside a new one": (
        {"gpus": (("Tesla T4", "7.5"), ("NVIDIA A100", "8.0"))},
        ("compute capability", ">= 8.0", "export CUDA_VISIBLE_DEVICES=1"),
    ),
    "no compiler": ({"compiler": None}, ("C compiler", "Triton", "apt-get install gcc")),
    "no header": ({"python_header": False}, ("Python.h", "Triton", "apt-get install python3-dev")),
    "another NCCL": (
        {"versions": with_version(NCCL, "2.27.3")},
        (NCCL, "==2.28.9 for torch", f"pip install --no-deps '{NCCL}==2.28.9'"),
    ),
    "Transformer Engine of two versions": (
        {"versions": with_version("transformer-engine-torch", "2.13.0")},
        ("Transformer Engine", "2.20.2", "--no-build-isolation transformer-engine-torch==2.20.2"),
    ),
    "Transformer Engine of another CUDA": (
        {"versions": (("transformer-engine", "2.20.2"), ("transformer-engine-cu12", "2.20.2"))},
        ("Transformer Engine", "CUDA 13", "pip install --no-deps transformer-engine-cu13==2.20.2"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_suit_is_named_with_the_command_that_mends_it(name):
    changes, (part, wanted, remedy) = CASES[name]
    (problem,) = check_gpu(dataclasses.replace(GOOD, **changes))
    assert problem.part == part and wanted in problem.wanted and remedy in problem.remedy


def test_a_machine_that_suits_and_one_without_gpus_have_no_problem():
    assert check_gpu(GOOD) == []
    assert check_gpu(GpuFacts(compiler=None, torch_version="2.11.0+cpu")) == []


def test_nvidia_smi_is_read():
    text = "580.95.05, NVIDIA H100 80GB HBM3, 9.0\n580.95.05, Tesla T4, 7.5\n"
    assert read_nvidia_smi(text) == ("580.95.05", (("NVIDIA H100 80GB HBM3", "9.0"), ("Tesla T4", "7.5")), "")


def test_a_failing_nvidia_smi_is_quoted(monkeypatch):
    answer = types.SimpleNamespace(returncode=9, stdout="NVIDIA-SMI has failed because it could not\n", stderr="")
    monkeypatch.setattr(gpu_checks.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu_checks.subprocess, "run", lambda *_, **__: answer)
    assert gpu_checks._ask_nvidia_smi() == ("", (), "NVIDIA-SMI has failed because it could not")


def test_doctor_fails_for_a_problem_and_prints_its_remedy(monkeypatch):
    facts = dataclasses.replace(GOOD, torch_cuda=None, torch_version="2.11.0+cpu", num_devices=0)
    monkeypatch.setattr(gpu_checks, "probe", lambda *_: facts)
    (check,) = doctor.check_gpus()
    assert check.failed and "download.pytorch.org" in check.note and check.name == "torch"
