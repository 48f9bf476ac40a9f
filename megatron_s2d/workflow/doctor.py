"""``s2d doctor``: checks installed versions, lists devices and backends, and says what missing packages would add.

Only the package's own dependencies are required; everything else is optional and never fails the check. Versions come
from package metadata; ``diagnose`` imports torch to ask for devices and backends. ``s2d run --dry-run`` checks whether
a workflow fits the machine.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_s2d.workflow import gpu_checks
from megatron_s2d.workflow.backend_report import Backend, active_backends

DISTRIBUTION = "megatron-s2d"
_GIB = 1024**3

# Optional distribution -> what it adds. The versions are pinned in the extras of pyproject.toml.
OPTIONAL_PACKAGES = {
    "transformer-engine": "fused layers, FP8 and context-parallel attention on CUDA",
    "apex": "fused optimizer and norm kernels on CUDA without transformer-engine",
    "sglang": "rollouts from SGLang servers instead of the training processes",
    "triton": "fused KL kernels on CUDA",
    "nemo-run": "launching runs on SLURM and on clouds",
}
OPTIONAL_COMMANDS = {
    "nvidia-smi": "the NVIDIA driver's list of devices",
    "sbatch": "submitting runs to SLURM from this machine",
    "srun": "starting ranks inside a SLURM allocation",
    "squeue": "following SLURM jobs",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the diagnosis."""

    name: str
    status: Literal["ok", "missing", "wrong", "untested"]  # untested: allowed, but not the version of the constraints
    required: bool
    installed: str  # version or path; empty if missing
    wanted: str  # version specifier; empty if any version fits
    note: str = ""  # what a missing part would add, or what to do

    @property
    def failed(self) -> bool:
        """Whether the installation is unusable because of this check."""
        return self.required and self.status in ("missing", "wrong")


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The result of ``diagnose``."""

    checks: tuple[Check, ...]
    devices: tuple[str, ...]  # one line for each
    machine: Mapping[str, str]  # cores, memory, disk
    backends: tuple[Backend, ...] = ()  # what the trainer uses here; empty if torch cannot be imported

    @property
    def exit_code(self) -> int:
        """1 if a required package is missing or has a wrong version, else 0."""
        return int(any(check.failed for check in self.checks))


def diagnose(constraints: Path | None = None) -> Diagnosis:
    """Check this Python, the installed packages and the machine.

    ``constraints`` is a file of tested versions (``name==version`` lines); the default is ``constraints.txt`` of the
    checkout that this package runs from, if there is one.
    """
    if constraints is None:
        of_checkout = Path(__file__).resolve().parents[2] / "constraints.txt"
        constraints = of_checkout if of_checkout.exists() else None
    pins = read_pins(constraints.read_text(encoding="utf-8")) if constraints is not None else {}
    metadata = importlib.metadata.metadata(DISTRIBUTION)
    checks = [check_python(platform.python_version(), metadata["Requires-Python"])]
    checks += check_packages(importlib.metadata.requires(DISTRIBUTION) or [], pins, installed_version)
    devices, torch_check = probe_devices()
    checks += [*torch_check, *check_commands(shutil.which)]
    checks += [*check_gpus(), *check_transformer_engine()] if devices else []
    return Diagnosis(tuple(checks), tuple(devices), machine_facts(Path.cwd()), probe_backends() if devices else ())


def read_pins(text: str) -> dict[str, str]:
    """Return canonical distribution name -> version of the ``name==version`` lines of a constraints file."""
    pins = {}
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        if line and not line.startswith("-"):
            requirement = Requirement(line)
            exact = [item.version for item in requirement.specifier if item.operator == "=="]
            if len(exact) == 1 and (requirement.marker is None or requirement.marker.evaluate()):
                pins[canonicalize_name(requirement.name)] = exact[0]
    return pins


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python(version: str, wanted: str) -> Check:
    """Check the interpreter's version against ``Requires-Python``."""
    fits = SpecifierSet(wanted).contains(version, prereleases=True)
    note = "" if fits else "create the environment with a Python of this version"
    return Check("python", "ok" if fits else "wrong", True, version, wanted, note)


def check_packages(
    requirements: Iterable[str], pins: Mapping[str, str], version_of: Callable[[str], str | None]
) -> list[Check]:
    """Check the required distributions, then the optional ones; ``requirements`` are lines of package metadata."""
    required, extras = [], {}
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            required.append(requirement)
        else:
            extras[canonicalize_name(requirement.name)] = requirement
    checks = [_check_package(requirement, pins, version_of, True, "") for requirement in required]
    for name, benefit in OPTIONAL_PACKAGES.items():
        requirement = extras.get(name, Requirement(name))
        checks.append(_check_package(requirement, pins, version_of, False, f"adds {benefit}"))
    return checks


def _check_package(
    requirement: Requirement,
    pins: Mapping[str, str],
    version_of: Callable[[str], str | None],
    required: bool,
    benefit: str,
) -> Check:
    name, wanted = requirement.name, str(requirement.specifier)
    version, pin = version_of(name), pins.get(canonicalize_name(requirement.name))
    if version is None:
        return Check(name, "missing", required, "", wanted, benefit or "reinstall megatron-s2d with its dependencies")
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(name, "wrong", required, version, wanted, f"install {name}{wanted}")
    # The local part of a version (+cpu, +cu130) names the build, which the pin does not fix.
    if pin is not None and Version(version).public != Version(pin).public:
        return Check(name, "untested", required, version, wanted or f"=={pin}", f"tested with {pin}")
    return Check(name, "ok", required, version, wanted, "" if required else benefit)


def check_commands(which: Callable[[str], str | None]) -> list[Check]:
    """Check the programs that some commands use."""
    checks = []
    for name, benefit in OPTIONAL_COMMANDS.items():
        path = which(name)
        checks.append(Check(name, "ok" if path else "missing", False, path or "", "", f"adds {benefit}"))
    return checks


def probe_devices() -> tuple[list[str], list[Check]]:
    """Return one line for each device, and the checks that need torch: its import and CUDA."""
    try:
        import torch
    except (ImportError, OSError, ValueError) as error:  # ValueError: torch finds no library of CUDA
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return [], [Check("torch import", "missing", True, "", "", f"torch cannot be imported: {reason}")]
    devices = [f"CPU: {platform.processor() or platform.machine()}, torch uses {torch.get_num_threads()} threads"]
    if not torch.cuda.is_available():
        benefit = "to train on GPUs; without one everything runs on the CPU with gloo"
        if torch.version.cuda is None:
            note = f"this torch is a CPU build; install a CUDA build {benefit}"
        else:
            note = f"torch was built for CUDA {torch.version.cuda} but sees no device; add one {benefit}"
        return devices, [Check("CUDA device", "missing", False, "", "", note)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / _GIB:.0f} GiB"
        devices.append(f"cuda:{index}: {properties.name}, {memory}, compute capability {capability}")
    summary = f"{torch.cuda.device_count()} with CUDA {torch.version.cuda}"
    return devices, [Check("CUDA device", "ok", False, summary, "")]


def probe_backends() -> tuple[Backend, ...]:
    """Return what each part of the trainer uses in this process."""
    from megatron_s2d.kl.chunk import triton_problem
    from megatron_s2d.parallel.device import capabilities  # loads torch

    on_gpu = capabilities().cuda
    return tuple(active_backends(capabilities(), triton_problem=triton_problem() if on_gpu else ""))


def check_gpus() -> list[Check]:
    """Return a failed check for what keeps this machine's GPUs from being used; needs torch."""
    import torch

    facts = gpu_checks.probe(torch.version.cuda, torch.cuda.device_count())
    return [
        Check(problem.part, "wrong", problem.blocks, problem.found, problem.wanted, problem.remedy)
        for problem in gpu_checks.check_gpu(facts)
    ]


def check_transformer_engine() -> list[Check]:
    """Return a failed check if Transformer Engine is installed but does not import, which stops every run."""
    from megatron_s2d.parallel.device import capabilities, mend_transformer_engine

    error = capabilities().transformer_engine_error
    if not error:
        return []
    version = installed_version("transformer-engine") or ""
    note = f"installed, but {error}; {mend_transformer_engine()}"
    return [Check("transformer-engine import", "wrong", True, version, "", note)]


def machine_facts(directory: Path) -> dict[str, str]:
    """Return the cores, memory and disk that this process may use, within the container's limits."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _cpu_quota(_cgroup("cpu.max"))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _cgroup("memory.max")
    if limit.isdigit():
        memory = min(memory, int(limit))
    disk = shutil.disk_usage(directory)
    return {
        "platform": platform.platform(),
        "cores": f"{usable}" + (f", limited to {quota:g} by the container" if quota and quota < (usable or 1) else ""),
        "memory": f"{memory / _GIB:.1f} GiB",
        "disk": f"{disk.free / _GIB:.1f} GiB free of {disk.total / _GIB:.1f} GiB at {directory}",
    }


def _cgroup(name: str) -> str:
    """Return the content of a control file of this container (cgroup v2), or an empty string."""
    path = Path("/sys/fs/cgroup") / name
    return path.read_text(encoding="ascii").strip() if path.is_file() else ""


def _cpu_quota(content: str) -> float | None:
    """Return the cores that ``cpu.max`` ("quota period" in microseconds, or "max period") allows, or None."""
    quota, _, period = content.partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


_STYLES = {"ok": "green", "missing": "yellow", "wrong": "red", "untested": "yellow"}


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Print the checks as tables, then devices, machine and a closing sentence."""
    for title, required in (("Required", True), ("Optional", False)):
        table = Table(title=title, title_justify="left", pad_edge=False)
        for column in ("", "status", "installed", "wanted", "note"):
            table.add_column(column, overflow="fold")
        for check in diagnosis.checks:
            if check.required == required:
                status = Text(check.status, style="bold red" if check.failed else _STYLES[check.status])
                table.add_row(Text(check.name), status, Text(check.installed), Text(check.wanted), Text(check.note))
        console.print(table)
    if diagnosis.backends:
        table = Table("", "in use", "drawback", title="Backends on this machine", title_justify="left")
        for backend in diagnosis.backends:
            table.add_row(Text(backend.part), Text(backend.active), Text(backend.drawback))
        console.print(table)
    for device in diagnosis.devices:
        console.print(Text(device))
    for name, fact in diagnosis.machine.items():
        console.print(Text(f"{name}: {fact}"))
    failed = [check.name for check in diagnosis.checks if check.failed]
    summary = f"Not usable: {', '.join(failed)} missing or at a wrong version." if failed else "Ready."
    console.print(Text(summary, style="bold red" if failed else "bold green"))
