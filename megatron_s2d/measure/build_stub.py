"""Builds the CUDA stub: a library that answers the calls of PyTorch's CUDA code on a machine without a GPU.

The sources are in ``cuda_stub/``. They are compiled once against the headers of PyTorch's own wheels, so a wrong
signature does not compile. Every function of the real CUDA runtime, cuBLAS and NCCL that the stub does not answer is
replaced by one that raises an error with its name. A process uses the stub if the library is preloaded. No torch here.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_s2d.errors import UserError

SOURCES = Path(__file__).parent / "cuda_stub"
LIBRARY_NAME = "libcuda.so.1"  # as Triton and the runtimes inside other libraries look for the driver

# Libraries whose functions are answered or refused, none of them called by the stub itself.
_REPLACED = ("libcudart.so.*", "libcublas.so.*", "libcublasLt.so.*", "libnccl.so.*", "libcudnn.so.*")
_PREFIXES = ("cuda", "cublas", "nccl", "cudnn", "__cuda")
# Descriptors of products, which the real cuBLASLt makes without a GPU, and texts and versions.
_LEFT_TO_THE_LIBRARY = (
    "cublasLtMatmulDesc", "cublasLtMatrixLayout", "cublasLtGroupedMatrixLayout", "cublasLtMatmulPreference",
    "cublasLtMatrixTransformDesc", "cublasLtMatmulAlgoConfigGetAttribute", "cublasGetStatus", "cudnnGetVersion",
    "cudnnGetErrorString", "cudnnGetLastErrorString", "cudnnGetCudartVersion", "cudnnGetMaxDeviceVersion",
)  # fmt: skip


def why_unavailable() -> str | None:
    """Return why the stub cannot be built here, with what to do; None if it can."""
    if sys.platform != "linux":
        return "it preloads a library, which works on Linux only: run it in a Linux container"
    if _compiler() is None:
        return "it compiles a small library: install a C++ compiler (on Debian: apt install g++)"
    if shutil.which("nm") is None:
        return "it lists the functions of libraries with nm: install binutils"
    for header in ("cuda_runtime_api.h", "cublasLt.h", "nccl.h", "cudnn_graph.h", "crt/host_defines.h"):
        if not any((folder / header).exists() for folder in _include_folders()):
            return (
                f"the header {header} of CUDA is missing, which comes with PyTorch's wheels for CUDA and with Triton: "
                "install the PyTorch of constraints.txt, not one for the CPU only"
            )
    return None


def stub_library() -> Path:
    """Return the compiled stub, built at the first call on this machine; raise ``UserError`` if it cannot be."""
    reason = why_unavailable()
    if reason is not None:
        raise UserError(f"measuring without a GPU is not possible here: {reason}")
    folder = _cache_folder() / f"cuda_stub-{_digest()}"
    library = folder / LIBRARY_NAME
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _build(library)
    return library


def answered_calls(library: Path) -> set[str]:
    """Return the names that ``library`` defines, refusals included."""
    return _defined(library)


def _build(library: Path) -> None:
    """Compile the answers, then a refusal for every other function, and link both."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        objects = []
        flags = ["-std=c++17", "-O1", "-fPIC", *(f"-I{folder}" for folder in _include_folders())]
        for source in sorted(SOURCES.glob("*.cpp")):
            objects.append(Path(scratch) / f"{source.stem}.o")
            _run(_compiler(), *flags, "-c", str(source), "-o", str(objects[-1]))
        answered = set().union(*map(_defined, objects))
        refusals = Path(scratch) / "refusals.cpp"
        refusals.write_text(_refusals(_functions_of_libraries() - answered))
        built = Path(scratch) / LIBRARY_NAME
        link = ["-shared", f"-Wl,-soname,{LIBRARY_NAME}", "-ldl", "-lpthread", f"-I{SOURCES}"]
        command = [_compiler(), *flags, str(refusals), *map(str, objects), *link, "-o", str(built)]
        _run(*command)
        runtimes = [str(_build_runtime_alias(name, built)) for name in _runtime_names()]
        _run(*command, "-Wl,--no-as-needed", *runtimes, "-Wl,-rpath,$ORIGIN")
        for runtime in map(Path, runtimes):
            runtime.replace(library.with_name(runtime.name))
        built.replace(library)  # complete or not at all, also if two processes build


def _build_runtime_alias(name: str, stub: Path) -> Path:
    """Build a library of the runtime's name that has nothing but a dependency on the stub.

    cuDNN's frontend opens the runtime by name and asks it for functions; it finds the stub's.
    """
    versions = stub.with_name("versions")
    versions.write_text(f"{name} {{ }};\n")
    alias = stub.with_name(name)
    link = ["-shared", f"-Wl,-soname,{name}", f"-Wl,--version-script={versions}", "-Wl,-rpath,$ORIGIN"]
    _run(_compiler(), *link, "-Wl,--no-as-needed", str(stub), "-o", str(alias))
    return alias


def _runtime_names() -> list[str]:
    """Return the file names of the CUDA runtime, such as ``libcudart.so.13``."""
    files = [file.name for folder in _package_folders() for file in (folder / "lib").glob("libcudart.so.*")]
    return sorted({name for name in files if name.count(".") == 2})


def _refusals(names: set[str]) -> str:
    lines = [f'extern "C" void {name}() {{ stub::unanswered("{name}"); }}' for name in sorted(names)]
    return "\n".join(["namespace stub { [[noreturn]] void unanswered(const char *); }", *lines, ""])


def _functions_of_libraries() -> set[str]:
    """Return the functions of the real libraries that the stub stands for."""
    names: set[str] = set()
    for folder in _package_folders():
        for pattern in _REPLACED:
            for file in (folder / "lib").glob(pattern):
                names |= _defined(file)
    return {name for name in names if name.startswith(_PREFIXES) and not name.startswith(_LEFT_TO_THE_LIBRARY)}


def _defined(file: Path) -> set[str]:
    dynamic = ["-D"] if ".so" in file.name else []
    lines = _run("nm", *dynamic, "--defined-only", str(file)).splitlines()
    return {fields[2].partition("@")[0] for line in lines if len(fields := line.split()) == 3 and fields[1] in "TW"}


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()[-1:]
        first = lines[0] if lines else f"exit code {result.returncode}"
        raise UserError(f"the CUDA stub does not compile with {command[0]}: {first}")
    return result.stdout


@functools.cache
def _compiler() -> str | None:
    return next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)


@functools.cache
def _package_folders() -> tuple[Path, ...]:
    """Folders of NVIDIA's packages (cu13, nccl, cudnn, ...) in this environment."""
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else list(spec.submodule_search_locations or ())
    return tuple(sorted(folder for root in roots for folder in Path(root).iterdir() if folder.is_dir()))


def _include_folders() -> list[Path]:
    """Folders of headers: of NVIDIA's packages, then Triton's, which has those of the compiler (``crt/``) too."""
    folders = [folder / "include" for folder in _package_folders()]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    return [folder for folder in folders if folder.is_dir()]


def _cache_folder() -> Path:
    folder = Path.home() / ".cache" / "megatron_s2d"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written
        return Path(tempfile.gettempdir()) / "megatron_s2d"
    return folder


def _digest() -> str:
    """Digest of what the library is made of: sources, compiler and the packages with headers and libraries."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    digest.update(Path(__file__).read_bytes() + str(_compiler()).encode())
    for folder in _package_folders():
        for pattern in _REPLACED:
            for file in sorted((folder / "lib").glob(pattern)):
                digest.update(f"{file}{file.stat().st_size}".encode())
    return digest.hexdigest()[:16]
