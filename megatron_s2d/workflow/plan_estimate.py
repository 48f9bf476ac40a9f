"""What a plan costs, as tables for a terminal: memory by role and phase, time, traffic, a proposed layout.

Everything is printed with what it assumes; nothing here was measured on the GPU that is named. No torch
here.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megatron_s2d.config.base import apply_overrides, parse
from megatron_s2d.config.hardware import AssumptionsConfig, gpu_of
from megatron_s2d.config.precision import check_chip
from megatron_s2d.errors import UserError
from megatron_s2d.estimate.roofline import Machine
from megatron_s2d.estimate.stage_time import StageTime, stage_time
from megatron_s2d.formatting import format_bytes, format_seconds
from megatron_s2d.workflow.layout_search import Proposal, propose
from megatron_s2d.workflow.preflight import Preflight

_SHOWN_PROPOSALS = 5


def machine_from_options(gpu: str | None, num_gpus: int | None, assume: Sequence[str]) -> Machine | None:
    """What ``--gpu`` and ``--assume`` describe; None without ``--gpu``."""
    if gpu is None:
        for option, given in (("--num-gpus", num_gpus is not None), ("--assume", bool(assume))):
            if given:
                raise UserError(f"{option} needs --gpu: name the GPU, for example --gpu h200")
        return None
    if num_gpus is not None and num_gpus < 1:
        raise UserError(f"--num-gpus {num_gpus}: give at least 1")
    return Machine(gpu_of(gpu), parse(AssumptionsConfig, apply_overrides({}, list(assume)), "--assume"))


def print_estimate(checked: Preflight, machine: Machine | None, num_gpus: int | None, console: Console) -> None:
    """Memory of every stage; on a named GPU also time, traffic, and with ``num_gpus`` a proposal."""
    console.print(memory_table(checked, machine))
    if machine is None:
        console.print("a CPU's layers and copies are counted; --gpu h200 gives the figures of a GPU", highlight=False)
        return
    if checked.config.fp8 is not None:
        check_chip(checked.config.fp8, machine.gpu.capability, machine.gpu.name)
    times = {
        name: stage_time(checked.config, name, checked.specs, checked.shapes[name], machine) for name in checked.stages
    }
    console.print(_time_table(checked, times, machine))
    console.print(_traffic_table(times))
    if num_gpus is not None:
        found = propose(checked, machine, num_gpus)
        console.print(_proposal_table(found, num_gpus, machine))
        console.print(f"fastest: {found[0].as_yaml()}", markup=False, highlight=False, soft_wrap=True)
    lengths = "lengths: every response runs into its limit; evaluations are left out of the times"
    notes = assumptions(machine, checked.config.precision)
    if checked.config.fp8 is not None:
        notes.append(
            "fp8: times are those of bf16 products, and activations are counted in bf16: both are upper bounds"
        )
    for line in [*notes, lengths]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def memory_table(checked: Preflight, machine: Machine | None) -> Table:
    """One row a stage: what models hold by role, what the fullest phase adds by purpose."""
    where = "a CPU rank" if machine is None else f"one {machine.gpu.name}"
    columns = ["stage", "models hold", "of that: weights, gradients, optimizer", "each phase adds", "peak"]
    if machine is not None:
        columns.append("fits")
    table = Table(*columns, title=f"Estimated memory of {where} (docs/preflight.md)", show_lines=True)
    for name, memory in checked.memory(on_gpu=machine is not None).items():
        held, parts = [], []
        for item in memory.held:
            held.append(f"{item.role} {format_bytes(item.total)}")
            trained = f", {format_bytes(item.gradients)}, {format_bytes(item.optimizer)}" if item.gradients else ""
            parts.append(f"{item.role} {format_bytes(item.weights)}{trained}")
        sums = {phase: sum(values.values()) for phase, values in memory.phases.items()}
        adds = []
        for phase in sorted((phase for phase in sums if sums[phase]), key=lambda phase: -sums[phase]):
            purposes = [f"{what} {format_bytes(value)}" for what, value in memory.phases[phase].items() if value]
            adds.append(f"{phase} {format_bytes(sums[phase])}: {', '.join(purposes)}")
        row = [name, "\n".join(held), "\n".join(parts), "\n".join(adds), format_bytes(memory.total)]
        if machine is not None:
            row.append(_fits(memory.total, machine))
        table.add_row(*row)
    return table


def _fits(needed: int, machine: Machine) -> str:
    usable = machine.usable_memory
    word = "yes" if needed <= usable else "NO"
    return f"{word}, {100 * needed / usable:.0f} % of {format_bytes(usable)}"


def _time_table(checked: Preflight, times: dict[str, StageTime], machine: Machine) -> Table:
    ranks = checked.config.parallel.world_size
    table = Table("stage", "seconds of a step", "where", "tokens/s", "MFU", title=f"Estimated time, {ranks} ranks")
    for name, time in times.items():
        if not time.total:
            continue
        parts = sorted(time.seconds.items(), key=lambda item: -item[1])
        shown = [(phase, value / time.total) for phase, value in parts if value >= 0.01 * time.total]
        where = ", ".join(f"{phase} {100 * share:.0f} %" for phase, share in shown)
        mfu = f"{100 * time.mfu(machine, ranks):.1f} %" if time.flops else "-"
        table.add_row(name, f"{time.total:.3g}", where, f"{time.tokens / time.total:,.0f}", mfu)
    return table


def _traffic_table(times: dict[str, StageTime]) -> Table:
    kinds = list(dict.fromkeys(kind for time in times.values() for kind in time.traffic))
    table = Table("stage", *(kinds or ["none"]), title="Bytes that one rank sends in a step")
    for name, time in times.items():
        cells = [format_bytes(time.traffic[kind].bytes_sent) if kind in time.traffic else "-" for kind in kinds]
        table.add_row(name, *(cells or ["-"]))
    return table


def _proposal_table(found: list[Proposal], num_gpus: int, machine: Machine) -> Table:
    title = f"Layouts of {num_gpus} x {machine.gpu.name} that fit: {len(found)}; the fastest by this model"
    table = Table("TP", "PP", "CP", "EP", "DP", "recompute", "micro-batch", "run", "peak", "in stage", title=title)
    for item in found[:_SHOWN_PROPOSALS]:
        parallel = item.parallel
        sizes = (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.context_parallel_size,
            parallel.expert_model_parallel_size,
            parallel.data_parallel_size,
        )
        table.add_row(
            *map(str, sizes),
            item.recompute,
            f"{item.max_tokens} tokens",
            format_seconds(item.seconds),
            format_bytes(item.memory),
            item.fullest,
        )
    return table


def assumptions(machine: Machine, precision: str = "bfloat16") -> list[str]:
    """What the figures rest on, in words."""
    gpu, taken = machine.gpu, machine.assumptions
    fp8 = f"{gpu.fp8_flops / 1e12:.0f}" if gpu.fp8_flops else "no"
    lines = [
        f"data sheet: {gpu.name}: {gpu.memory / 1e9:.0f} GB, {gpu.bf16_flops / 1e12:.0f} bf16 and {fp8} fp8 TFLOP/s "
        f"dense, {gpu.memory_bandwidth / 1e12:.2f} TB/s memory, "
        f"{gpu.link_bandwidth / 1e9:.0f} GB/s one way in the node",
        f"assumed: {100 * taken.matmul_efficiency:.0f} % of the peak in products, "
        f"{100 * taken.memory_efficiency:.0f} % of the memory's rate in decoding, "
        f"{100 * taken.link_efficiency:.0f} % of links, "
        f"{taken.network_bandwidth / 1e9:.0f} GB/s a GPU between nodes of {taken.gpus_per_node}, "
        f"{1e6 * taken.latency:.0f} us a collective, {format_bytes(taken.reserved_memory)} reserved; nothing overlaps",
        "memory: layers are Transformer Engine's, counted as described, not measured on a GPU",
    ]
    if precision == "float32":
        lines.append("precision is float32: its products are slower than the bf16 peak that is used here")
    return lines
