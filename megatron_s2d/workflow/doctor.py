"""``s2d doctor``: what is installed and whether versions fit, which devices there are, what missing parts would give.

Required are the package's own dependencies; everything else is optional and never fails the check. Packages are known
by their metadata; torch is imported (inside ``diagnose``) to ask it for devices, and on a GPU what the trainer would use
there. Left out: whether a given workflow fits this machine (``s2d run --dry-run``).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
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

from megatron_s2d.workflow.backend_report import ActivePath, active_paths

DISTRIBUTION = "megatron-s2d"
_GIB = 1024**3

# Optional distribution -> what it would give. Those with a pinned version have it in an extra of pyproject.toml.
OPTIONAL_PACKAGES = {
    "transformer-engine": "fused layers, FP8 and context-parallel attention on CUDA",
    "apex": "fused optimizer and norm kernels on CUDA where transformer-engine is absent",
    "sglang": "rollouts from served engines instead of the training processes",
    "triton": "fused KL kernels on CUDA",
    "nemo-run": "launching runs on SLURM and on clouds",
}
OPTIONAL_COMMANDS = {
    "nvidia-smi": "the NVIDIA driver's own view of the devices",
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
    found: str  # version or place; empty where missing
    wanted: str  # version specifier; empty where any will do
    note: str = ""  # what a missing part would give, or what to do

    @property
    def failed(self) -> bool:
        """Whether this makes the installation unusable."""
        return self.required and self.status in ("missing", "wrong")


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """All that ``diagnose`` found."""

    checks: tuple[Check, ...]
    devices: tuple[str, ...]  # one line each
    machine: Mapping[str, str]  # cores, memory, disk
    paths: tuple[ActivePath, ...] = ()  # what the trainer uses here; empty where torch does not load

    @property
    def exit_code(self) -> int:
        """1 where a required thing is missing or at a wrong version, else 0."""
        return int(any(check.failed for check in self.checks))


def diagnose(constraints: Path | None = None) -> Diagnosis:
    """Look at this Python, this machine and what is installed.

    ``constraints`` is a file of tested versions (``name==version`` lines); by default ``constraints.txt`` of the
    checkout that this package runs from, where there is one.
    """
    if constraints is None:
        beside = Path(__file__).resolve().parents[2] / "constraints.txt"
        constraints = beside if beside.exists() else None
    pins = read_pins(constraints.read_text(encoding="utf-8")) if constraints is not None else {}
    metadata = importlib.metadata.metadata(DISTRIBUTION)
    checks = [check_python(platform.python_version(), metadata["Requires-Python"])]
    checks += check_packages(importlib.metadata.requires(DISTRIBUTION) or [], pins, installed_version)
    devices, torch_check = probe_devices()
    checks += [*torch_check, *check_commands(shutil.which)]
    return Diagnosis(tuple(checks), tuple(devices), machine_facts(Path.cwd()), probe_paths() if devices else ())


def read_pins(text: str) -> dict[str, str]:
    """Canonical distribution name -> version, from the ``name==version`` lines of a constraints file."""
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
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python(version: str, wanted: str) -> Check:
    """This interpreter against ``Requires-Python``."""
    fits = SpecifierSet(wanted).contains(version, prereleases=True)
    note = "" if fits else "make the environment anew with a Python that fits"
    return Check("python", "ok" if fits else "wrong", True, version, wanted, note)


def check_packages(
    requirements: Iterable[str], pins: Mapping[str, str], installed: Callable[[str], str | None]
) -> list[Check]:
    """The required distributions, then the optional ones; ``requirements`` as in a distribution's metadata."""
    required, extras = [], {}
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            required.append(requirement)
        else:
            extras[canonicalize_name(requirement.name)] = requirement
    checks = [_check_package(requirement, pins, installed, True, "") for requirement in required]
    for name, gives in OPTIONAL_PACKAGES.items():
        checks.append(_check_package(extras.get(name, Requirement(name)), pins, installed, False, f"gives {gives}"))
    return checks


def _check_package(
    requirement: Requirement,
    pins: Mapping[str, str],
    installed: Callable[[str], str | None],
    required: bool,
    gives: str,
) -> Check:
    name, wanted = requirement.name, str(requirement.specifier)
    found, pin = installed(name), pins.get(canonicalize_name(requirement.name))
    if found is None:
        return Check(name, "missing", required, "", wanted, gives or "install the package again with its dependencies")
    if not requirement.specifier.contains(found, prereleases=True):
        return Check(name, "wrong", required, found, wanted, f"install {name}{wanted}")
    # The local part of a version (+cpu, +cu130) is the build, which the pin leaves open.
    if pin is not None and Version(found).public != Version(pin).public:
        return Check(name, "untested", required, found, wanted or f"=={pin}", f"tested with {pin}")
    return Check(name, "ok", required, found, wanted, "" if required else gives)


def check_commands(which: Callable[[str], str | None]) -> list[Check]:
    """Programs that other parts use where they exist."""
    checks = []
    for name, gives in OPTIONAL_COMMANDS.items():
        place = which(name)
        checks.append(Check(name, "ok" if place else "missing", False, place or "", "", f"gives {gives}"))
    return checks


def probe_devices() -> tuple[list[str], list[Check]]:
    """Devices in words, and the checks that only torch can answer: that it imports, and CUDA."""
    try:
        import torch
    except (ImportError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return [], [Check("torch import", "missing", True, "", "", f"torch does not load: {reason}")]
    devices = [f"CPU: {platform.processor() or platform.machine()}, torch uses {torch.get_num_threads()} threads"]
    if not torch.cuda.is_available():
        gives = "GPU training; without it everything runs on the CPU with gloo"
        if torch.version.cuda is None:
            note = f"this torch is a CPU build; a CUDA build and a device give {gives}"
        else:
            note = f"torch was built for CUDA {torch.version.cuda} but sees no device; one gives {gives}"
        return devices, [Check("CUDA device", "missing", False, "", "", note)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / _GIB:.0f} GiB"
        devices.append(f"cuda:{index}: {properties.name}, {memory}, compute capability {capability}")
    found = f"{torch.cuda.device_count()} with CUDA {torch.version.cuda}"
    return devices, [Check("CUDA device", "ok", False, found, "")]


def probe_paths() -> tuple[ActivePath, ...]:
    """What each part of the trainer uses in this process."""
    from megatron_s2d.parallel.device import capabilities  # loads torch

    return tuple(active_paths(capabilities(), triton=importlib.util.find_spec("triton") is not None))


def machine_facts(directory: Path) -> dict[str, str]:
    """Cores, memory and disk that this process may use, container limits included."""
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
    """Content of a control file of this container (cgroup v2); empty where there is none."""
    path = Path("/sys/fs/cgroup") / name
    return path.read_text(encoding="ascii").strip() if path.is_file() else ""


def _cpu_quota(content: str) -> float | None:
    """Cores that ``cpu.max`` ("quota period" in microseconds, or "max period") allows; None without a limit."""
    quota, _, period = content.partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


_STYLES = {"ok": "green", "missing": "yellow", "wrong": "red", "untested": "yellow"}


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Tables for a terminal and one closing sentence."""
    for title, required in (("Required", True), ("Optional", False)):
        table = Table(title=title, title_justify="left", pad_edge=False)
        for column in ("", "status", "found", "wanted", "note"):
            table.add_column(column, overflow="fold")
        for check in diagnosis.checks:
            if check.required == required:
                status = Text(check.status, style="bold red" if check.failed else _STYLES[check.status])
                table.add_row(Text(check.name), status, Text(check.found), Text(check.wanted), Text(check.note))
        console.print(table)
    if diagnosis.paths:
        table = Table("", "in use", "what that costs", title="Paths on this machine", title_justify="left")
        for path in diagnosis.paths:
            table.add_row(Text(path.part), Text(path.active), Text(path.cost))
        console.print(table)
    for device in diagnosis.devices:
        console.print(Text(device))
    for name, fact in diagnosis.machine.items():
        console.print(Text(f"{name}: {fact}"))
    failed = [check.name for check in diagnosis.checks if check.failed]
    verdict = f"Not usable: {', '.join(failed)} missing or at a wrong version." if failed else "Ready."
    console.print(Text(verdict, style="bold red" if failed else "bold green"))
