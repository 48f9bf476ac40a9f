"""``s2d doctor`` fails for missing requirements, and only for those."""

import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_s2d.errors import UserError
from megatron_s2d.parallel import device
from megatron_s2d.parallel.device import Capabilities
from megatron_s2d.workflow import doctor
from megatron_s2d.workflow.backend_report import Backend, active_backends
from megatron_s2d.workflow.doctor import (
    OPTIONAL_COMMANDS,
    OPTIONAL_PACKAGES,
    Check,
    Diagnosis,
    check_commands,
    check_packages,
    check_python,
    diagnose,
    print_diagnosis,
    probe_devices,
    read_pins,
)

REQUIREMENTS = [
    "torch==2.11.0",
    "Pydantic>=2.10",
    "tokenizers",
    'colorama; sys_platform == "nowhere"',
    'sglang==0.5.17; extra == "sglang"',
    'transformer-engine[pytorch]==2.19.0; extra == "gpu"',
]


def status(installed, pins=None):
    checks = check_packages(REQUIREMENTS, pins or {}, installed.get)
    return {check.name: (check.status, check.failed) for check in checks}


def test_required_packages():
    good = {"torch": "2.11.0+cpu", "Pydantic": "2.11.1", "tokenizers": "0.22"}
    result = status(good)
    assert set(result) == {"torch", "Pydantic", "tokenizers", *OPTIONAL_PACKAGES}
    assert [result[name] for name in good] == [("ok", False)] * 3
    assert status(good | {"torch": "2.10.0"})["torch"] == ("wrong", True)
    assert status(good | {"Pydantic": "2.9"})["Pydantic"] == ("wrong", True)
    assert status({"torch": "2.11.0"})["tokenizers"] == ("missing", True)


def test_optional_packages_never_fail():
    result = status({"sglang": "0.4.0", "transformer-engine": "2.19.0"})
    assert result["sglang"] == ("wrong", False)
    assert result["transformer-engine"] == ("ok", False) and result["nemo-run"] == ("missing", False)
    missing = {check.name: check.note for check in check_packages(REQUIREMENTS, {}, {}.get)}
    assert missing["sglang"].startswith("adds rollouts")


def test_versions_other_than_the_pinned_ones_are_untested():
    pins = read_pins("--extra-index\n# a comment\ntorch==2.11.0+cu130\npydantic==2.11.0  # why\nnumpy>=1\n")
    assert pins == {"torch": "2.11.0+cu130", "pydantic": "2.11.0"}
    result = status({"torch": "2.11.0", "Pydantic": "2.12.0", "tokenizers": "0.22"}, pins)
    assert result["torch"] == ("ok", False) and result["Pydantic"] == ("untested", False)


@pytest.mark.parametrize("version,failed", [("3.12.1", False), ("3.11.9", True), ("3.14.0", True)])
def test_python(version, failed):
    assert check_python(version, ">=3.12,<3.14").failed is failed


def test_commands():
    checks = {check.name: check for check in check_commands({"sbatch": "/usr/bin/sbatch"}.get)}
    assert set(checks) == set(OPTIONAL_COMMANDS)
    assert checks["sbatch"].status == "ok" and checks["srun"].status == "missing" and not checks["srun"].failed


@pytest.mark.parametrize("error", [ImportError, OSError, ValueError])
def test_torch_that_cannot_be_imported_fails_the_check(monkeypatch, error):
    class Finder:
        def find_spec(self, name, *_):
            if name == "torch":
                raise error("libcublasLt.so not found")

    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    devices, (check,) = probe_devices()
    assert devices == [] and check.failed and check.note == "torch cannot be imported: libcublasLt.so not found"


def test_container_limits(monkeypatch, tmp_path):
    limits = {"cpu.max": "50000 100000", "memory.max": str(3 * 1024**3)}
    monkeypatch.setattr(doctor, "_cgroup", limits.get)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: {0, 1})
    facts = doctor.machine_facts(tmp_path)
    assert facts["cores"] == "2, limited to 0.5 by the container" and facts["memory"] == "3.0 GiB"
    monkeypatch.setattr(doctor, "_cgroup", {"cpu.max": "max 100000", "memory.max": "max"}.get)
    assert doctor.machine_facts(tmp_path)["cores"] == "2"


def test_diagnosis_of_this_installation_is_printed():
    diagnosis = diagnose()
    names = [check.name for check in diagnosis.checks]
    assert {"python", "torch", "megatron-core", "sglang", "CUDA device", "sbatch"} <= set(names)
    assert diagnosis.devices[0].startswith("CPU: ") and set(diagnosis.machine) >= {"cores", "memory", "disk"}
    console = Console(file=io.StringIO(), width=160)
    print_diagnosis(diagnosis, console)
    text = console.file.getvalue()
    assert all(name in text for name in names)
    assert "Backends on this machine" in text and "gradient accumulation" in text
    assert diagnosis.exit_code == 0, text
    assert text.rstrip().endswith("Ready.")


def backends(**changes) -> dict[str, Backend]:
    h200 = Capabilities(
        cuda=True, device_name="H200", transformer_engine=True, apex=False, compute_capability=(9, 0),
        cuda_version=(13, 0),
    )  # fmt: skip
    problem = changes.pop("triton_problem", "")
    capabilities = dataclasses.replace(h200, **changes)
    return {backend.part: backend for backend in active_backends(capabilities, triton_problem=problem)}


def test_backends_in_use_and_their_drawbacks():
    best = backends()
    assert list(best) == ["layers", "attention", "FP8", "optimizer", "gradient accumulation", "divergences"]
    assert (
        "delayed, tensorwise, blockwise" in best["FP8"].active and best["FP8"].drawback == "not on this machine: mxfp8"
    )
    assert not any(backend.drawback for name, backend in best.items() if name != "FP8")
    without = backends(transformer_engine=False)
    assert all("install megatron-s2d[gpu]" in without[name].drawback for name in list(best)[:5])
    assert without["FP8"].active == "none" and "PyTorch's AdamW" in without["optimizer"].active
    apex = backends(transformer_engine=False, apex=True, apex_gradient_accumulation=True)
    assert "apex" in apex["optimizer"].active and "apex" in apex["gradient accumulation"].active
    assert "no C compiler" in backends(triton_problem="no C compiler: install gcc")["divergences"].drawback
    old = backends(compute_capability=(8, 0))["FP8"]
    assert old.active == "none" and "needs compute capability 8.9" in old.drawback
    assert "blockwise" in backends(cuda_version=(12, 8))["FP8"].drawback
    on_cpu = backends(cuda=False, transformer_engine=False)
    assert all("no CUDA device" in backend.drawback for name, backend in on_cpu.items() if name != "divergences")


def test_exit_code_and_closing_sentence():
    broken = Diagnosis((Check("torch", "wrong", True, "1.0", "==2.11.0"),), (), {})
    optional = Diagnosis((Check("apex", "missing", False, "", ""),), (), {})
    assert (broken.exit_code, optional.exit_code) == (1, 0)
    console = Console(file=io.StringIO(), width=160)
    print_diagnosis(broken, console)
    assert "Not usable: torch missing or at a wrong version." in console.file.getvalue()


def test_transformer_engine_that_does_not_import_is_named_with_what_mends_it(monkeypatch):
    broken = Capabilities(
        cuda=True,
        device_name="H200",
        transformer_engine=False,
        apex=False,
        transformer_engine_error="ImportError: undefined symbol: _ZN3c104cuda",
    )
    monkeypatch.setattr(device, "capabilities", lambda: broken)
    (check,) = doctor.check_transformer_engine()
    assert check.failed and "undefined symbol" in check.note and "--no-build-isolation" in check.note
    with pytest.raises(
        UserError, match=r"does not import \(ImportError: undefined symbol.*--no-cache-dir transformer-engine-torch"
    ):
        device.prepare.__wrapped__()
    monkeypatch.setattr(device, "capabilities", lambda: dataclasses.replace(broken, transformer_engine_error=""))
    assert doctor.check_transformer_engine() == []


def test_an_absent_library_differs_from_one_that_does_not_import(tmp_path, monkeypatch):
    (tmp_path / "built_for_another_torch.py").write_text("raise OSError('undefined symbol:\\n  x')")
    (tmp_path / "lacks_a_part.py").write_text("import part_that_does_not_exist")
    monkeypatch.syspath_prepend(tmp_path)
    assert device.import_error("json") is None
    assert device.import_error("library_that_does_not_exist.torch") == ""
    assert device.import_error("built_for_another_torch") == "OSError: undefined symbol: x"
    assert "No module named 'part_that_does_not_exist'" in device.import_error("lacks_a_part")


@pytest.mark.slow
def test_all_extras_resolve_together_with_the_pins():
    """Transformer Engine, SGLang and the launchers have requirements in common; pip's resolver decides."""
    root = Path(__file__).resolve().parents[3]
    command = [
        sys.executable, "-m", "pip", "install", "--dry-run", "--no-build-isolation", "--disable-pip-version-check",
        "-c", str(root / "constraints.txt"), "-e", f"{root}[gpu,sglang,launch,test,dev]",
    ]  # fmt: skip
    finished = subprocess.run(command, capture_output=True, text=True)
    if any(reason in finished.stderr for reason in ("Connection", "Temporary failure", "timed out")):
        pytest.skip("no package index can be reached")
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "transformer_engine_torch-2.19.0" in finished.stdout
