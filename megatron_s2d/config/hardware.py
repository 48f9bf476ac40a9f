"""Data-sheet numbers of GPUs, and the assumptions of time and memory estimates. No torch here."""

from __future__ import annotations

import dataclasses
import difflib

from pydantic import Field

from megatron_s2d.config.base import Config
from megatron_s2d.errors import UserError


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Memory and data-sheet rates of one GPU. Rates are peaks: dense products, bytes in one direction."""

    name: str
    memory: int  # bytes that PyTorch sees; neither the sheet's 10^9 nor 2^30 a gigabyte
    bf16_flops: float  # per second, dense
    fp8_flops: float | None  # per second, dense; None without FP8
    memory_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second to the other GPUs of the node, one direction
    capability: tuple[int, int]  # CUDA compute capability


GIB = 2**30
GPUS = {
    "h200": Gpu("NVIDIA H200 SXM", int(139.7 * GIB), 989e12, 1979e12, 4.8e12, 450e9, (9, 0)),
    "h100": Gpu("NVIDIA H100 SXM", int(79.1 * GIB), 989e12, 1979e12, 3.35e12, 450e9, (9, 0)),
    "a100-80": Gpu("NVIDIA A100 SXM 80 GB", int(79.1 * GIB), 312e12, None, 2.039e12, 300e9, (8, 0)),
    "b200": Gpu("NVIDIA B200 (HGX)", int(178.3 * GIB), 2250e12, 4500e12, 8.0e12, 900e9, (10, 0)),
    "l40s": Gpu("NVIDIA L40S", int(44.3 * GIB), 362e12, 733e12, 0.864e12, 32e9, (8, 9)),
}


def gpu_of(name: str) -> Gpu:
    """Return the GPU called ``name``, or raise ``UserError`` with the supported names."""
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    close = difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.4)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise UserError(f"unknown GPU '{name}' ({hint}known: {', '.join(GPUS)})")


class AssumptionsConfig(Config):
    """Efficiencies that turn peak rates into times. The defaults are not measured; measurements replace them."""

    matmul_efficiency: float = Field(0.5, gt=0, le=1, description="share of the dense bf16 peak that layers reach")
    memory_efficiency: float = Field(0.7, gt=0, le=1, description="share of the memory bandwidth that decoding reaches")
    link_efficiency: float = Field(0.7, gt=0, le=1, description="share of a link's bandwidth that collectives reach")
    network_bandwidth: float = Field(50e9, gt=0, description="bytes per second of one GPU to other nodes, one way")
    file_bandwidth: float = Field(
        2e9, gt=0, description="bytes per second of one node to or from the file system, for weights of servers"
    )
    gpus_per_node: int = Field(8, ge=1, description="GPUs that share the fast links")
    latency: float = Field(10e-6, ge=0, description="seconds of a collective of minimal size")
    launch_seconds: float = Field(
        5e-6, gt=0, description="seconds of the host to launch a kernel through PyTorch, with --measure"
    )
    transformer_engine: bool = Field(True, description="whether layers are Transformer Engine's; false: PyTorch's")
    reserved_memory: int = Field(
        8 * 2**30, ge=0, description="bytes for the CUDA context, communication buffers and fragmentation"
    )
