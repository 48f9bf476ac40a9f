"""Compile every kernel variant for an H100 (no GPU needed) and print their number; started by test_kl_triton.py."""

from __future__ import annotations

from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_s2d.kl import triton_backend as kernels

TARGET = GPUTarget("cuda", 90, 32)


def build(function, types: dict[str, str], constants: dict[str, object], warps: int) -> None:
    names = function.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    assert set(types) | set(constants) == set(names)
    compiled = triton_compile(ASTSource(function, signature, constexprs), TARGET, {"num_warps": warps})
    assert compiled.asm["cubin"]


def main() -> None:
    count = 0
    pointers = {"z_ptr": "*fp32", "y_ptr": "*fp32"}
    strides = {"z_stride": "i32", "y_stride": "i32"}
    for teacher in (False, True):
        constants = {"COLUMNS": 16032, "WIDTH": 9, "HAS_TEACHER": teacher, "BLOCK": 2048}
        build(kernels._statistics_kernel, {**pointers, "out_ptr": "*fp32", **strides}, constants, 8)
        count += 1
    for kind in (1, 2, 3):
        types = {**pointers, "table_ptr": "*fp32", "out_ptr": "*fp32", **strides, "beta": "fp32"}
        build(kernels._sums_kernel, types, {"COLUMNS": 16032, "KIND": kind, "BLOCK": 1024}, 4)
        count += 1
    for kind in (0, 1, 2, 3):
        for delta in ("*fp32", "*bf16"):
            types = {
                **pointers, "delta_ptr": delta, "table_ptr": "*fp32", "target_ptr": "*i64", **strides,
                "delta_stride": "i32", "beta": "fp32", "columns_total": "i32",
            }  # fmt: skip
            flags = {"HAS_TEACHER": True, "FORWARD": True, "REVERSE": True, "ENTROPY": True, "FACTOR": True}
            build(
                kernels._gradient_kernel,
                types,
                {"WIDTH": 13, **flags, "KIND": kind, "ON_TARGET": True, "BLOCK": 1024},
                4,
            )
            count += 1
    types = {
        **pointers, "delta_ptr": "*bf16", "table_ptr": "*fp32", "target_ptr": "*fp32", **strides,
        "delta_stride": "i32", "beta": "fp32", "columns_total": "i32",
    }  # fmt: skip
    flags = {"HAS_TEACHER": False, "FORWARD": False, "REVERSE": False, "ENTROPY": False, "FACTOR": False}
    build(kernels._gradient_kernel, types, {"WIDTH": 13, **flags, "KIND": 0, "ON_TARGET": False, "BLOCK": 1024}, 4)
    print(count + 1)


if __name__ == "__main__":
    main()
