"""Checks of driver, chip, wheels and compiler for ``s2d doctor``: what does not suit, and the command that mends it.

``probe`` asks the machine; ``check_gpu`` decides from its answers. No torch here.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

from packaging.requirements import Requirement

LEAST_CAPABILITY = (8, 0)  # bfloat16, and what FlashAttention and Triton's kernels need
LEAST_DRIVER = {12: (525, 60), 13: (580, 65)}  # CUDA's major version -> driver on Linux


@dataclasses.dataclass(frozen=True)
class GpuFacts:
    """What a machine says about its GPUs and the packages for them."""

    driver: str = ""  # version that nvidia-smi prints; "" without nvidia-smi or driver
    gpus: tuple[tuple[str, str], ...] = ()  # (name, compute capability) that nvidia-smi prints
    nvidia_smi_error: str = ""  # what an installed nvidia-smi says when it fails
    libcuda: bool = False  # whether libcuda.so.1, the driver's library, loads
    torch_version: str = ""  # of the distribution, with its local part
    torch_cuda: str | None = None  # version that torch was built for; None for a CPU build
    num_devices: int = 0  # that torch sees
    compiler: str | None = None  # path of a C compiler
    python_header: bool = True  # whether Python.h is there
    versions: tuple[tuple[str, str], ...] = ()  # (distribution, version) of NVIDIA's libraries and Transformer Engine
    torch_requires: tuple[str, ...] = ()  # requirements of torch


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that does not suit."""

    part: str
    found: str
    wanted: str
    remedy: str  # command or action
    blocks: bool = True  # whether nothing trains on the GPU before it is mended; else something is slower or may fail


def probe(torch_cuda: str | None, num_devices: int) -> GpuFacts:
    """Return the facts of this machine. torch_cuda, num_devices: what torch says of itself."""
    driver, gpus, error = _ask_nvidia_smi()
    names = ("transformer-engine", "transformer-engine-torch", "transformer-engine-cu12", "transformer-engine-cu13")
    requires = tuple(importlib.metadata.requires("torch") or ())
    pinned = [Requirement(text).name for text in requires if text.startswith("nvidia-")]
    return GpuFacts(
        driver,
        gpus,
        error,
        _loads("libcuda.so.1"),
        _version("torch") or "",
        torch_cuda,
        num_devices,
        next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None),
        (Path(sysconfig.get_path("include")) / "Python.h").exists(),
        tuple((name, version) for name in (*names, *pinned) if (version := _version(name)) is not None),
        requires,
    )


def check_gpu(facts: GpuFacts) -> list[Problem]:
    """Return what keeps GPUs of this machine from being used, or being used well; empty without an NVIDIA GPU."""
    has_gpu = bool(facts.gpus or facts.nvidia_smi_error or facts.num_devices)
    if not has_gpu:
        return []
    checks: tuple[Callable[[GpuFacts], Sequence[Problem]], ...] = (
        _check_driver,
        _check_torch,
        _check_capability,
        _check_compiler,
        _check_libraries,
        _check_transformer_engine,
    )
    return [problem for check in checks for problem in check(facts)]


def _check_driver(facts: GpuFacts) -> list[Problem]:
    if facts.nvidia_smi_error:
        remedy = "load the driver (sudo modprobe nvidia), or reboot after an update of the driver"
        return [Problem("driver", facts.nvidia_smi_error, "a driver that answers nvidia-smi", remedy)]
    problems = []
    if facts.gpus and not facts.libcuda:
        remedy = (
            "install the driver's libraries (apt-get install libnvidia-compute-<driver>), or start the container with "
            "--gpus all and NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        )
        problems.append(Problem("driver", "nvidia-smi without libcuda.so.1", "libcuda.so.1", remedy))
    least = LEAST_DRIVER.get(_major(facts.torch_cuda))
    if least is not None and facts.driver and _numbers(facts.driver)[:2] < least:
        wanted = f">= {least[0]}.{least[1]} for CUDA {facts.torch_cuda}"
        older = max(
            (major for major, driver in LEAST_DRIVER.items() if _numbers(facts.driver)[:2] >= driver), default=0
        )
        remedy = f"update the driver: apt-get install nvidia-driver-{least[0]}-open"
        if older:
            remedy += f", or install a torch of CUDA {older} (pip index versions torch shows its builds)"
        problems.append(Problem("driver", facts.driver, wanted, remedy))
    return problems


def _check_torch(facts: GpuFacts) -> list[Problem]:
    if not facts.gpus:
        return []
    version = facts.torch_version.partition("+")[0]
    if facts.torch_cuda is None:
        remedy = (
            f"pip install --force-reinstall --no-deps torch=={version} --index-url "
            "https://download.pytorch.org/whl/cu130"
        )
        return [Problem("torch", f"{facts.torch_version}, a CPU build", "a CUDA build", remedy)]
    driver_problem = bool(_check_driver(facts))
    if not facts.num_devices and not driver_problem:
        remedy = "unset CUDA_VISIBLE_DEVICES, or start the container with --gpus all; nvidia-smi lists the devices"
        return [Problem("CUDA device", "none that torch sees", f"{len(facts.gpus)} of nvidia-smi", remedy)]
    return []


def _check_capability(facts: GpuFacts) -> list[Problem]:
    least = ".".join(map(str, LEAST_CAPABILITY))
    old = [(name, value) for name, value in facts.gpus if _numbers(value)[:2] < LEAST_CAPABILITY]
    if not old:
        return []
    found = ", ".join(sorted({f"{name} ({value})" for name, value in old}))
    kept = [str(index) for index, (_, value) in enumerate(facts.gpus) if _numbers(value)[:2] >= LEAST_CAPABILITY]
    remedy = f"export CUDA_VISIBLE_DEVICES={','.join(kept)}" if kept else "train on an Ampere GPU or later (A100, L40S)"
    return [Problem("compute capability", found, f">= {least} for bfloat16", remedy)]


def _check_compiler(facts: GpuFacts) -> list[Problem]:
    problems = []
    if facts.compiler is None:
        problems.append(Problem("C compiler", "none", "one that Triton calls", "apt-get install gcc", False))
    if not facts.python_header:
        problems.append(
            Problem("Python.h", "missing", "the header that Triton includes", "apt-get install python3-dev")
        )
    return problems


def _check_libraries(facts: GpuFacts) -> list[Problem]:
    """Compare NVIDIA's libraries (NCCL, cuDNN, ...) with the versions that torch was built with and requires."""
    installed, problems = dict(facts.versions), []
    for text in facts.torch_requires:
        requirement = Requirement(text)
        version = installed.get(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if version is None or not applies or requirement.specifier.contains(version, prereleases=True):
            continue
        remedy = f"pip install --no-deps '{requirement.name}{requirement.specifier}'"
        problems.append(Problem(requirement.name, version, f"{requirement.specifier} for torch", remedy, False))
    return problems


def _check_transformer_engine(facts: GpuFacts) -> list[Problem]:
    installed = dict(facts.versions)
    engine, binding = installed.get("transformer-engine"), installed.get("transformer-engine-torch")
    cores = {major: version for major in (12, 13) if (version := installed.get(f"transformer-engine-cu{major}"))}
    major, problems = _major(facts.torch_cuda), []
    if cores and major is not None and major not in cores:
        (other, version), *_ = cores.items()
        remedy = (
            f"pip uninstall -y transformer-engine-cu{other} && "
            f"pip install --no-deps transformer-engine-cu{major}=={version}"
        )
        problems.append(
            Problem("Transformer Engine", f"transformer-engine-cu{other}", f"CUDA {major}, as torch", remedy, False)
        )
    if engine and binding and engine != binding:
        remedy = (
            "pip install --force-reinstall --no-deps --no-build-isolation "
            f"transformer-engine-torch=={engine} (docs/gpu.md)"
        )
        problems.append(Problem("Transformer Engine", f"transformer-engine-torch {binding}", engine, remedy, False))
    return problems


# -------------------------------------------------------------------------------- asking


def _ask_nvidia_smi() -> tuple[str, tuple[tuple[str, str], ...], str]:
    """Return driver, (name, compute capability) of each GPU, and the error of an installed nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return "", (), ""
    command = ["nvidia-smi", "--query-gpu=driver_version,name,compute_cap", "--format=csv,noheader"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", (), f"nvidia-smi: {type(error).__name__}"
    if process.returncode:
        text = (process.stdout + process.stderr).strip()
        return "", (), text.splitlines()[0][:200] if text else f"nvidia-smi ended with {process.returncode}"
    return read_nvidia_smi(process.stdout)


def read_nvidia_smi(text: str) -> tuple[str, tuple[tuple[str, str], ...], str]:
    """Read the lines ``driver, name, capability`` of nvidia-smi."""
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines() if line.count(",") >= 2]
    return rows[0][0] if rows else "", tuple((", ".join(row[1:-1]), row[-1]) for row in rows), ""


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def _major(cuda: str | None) -> int | None:
    return None if cuda is None else _numbers(cuda)[0]
