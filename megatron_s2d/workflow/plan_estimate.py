"""Prints the estimated cost of a plan: memory by role and phase, time, traffic and proposed layouts. No torch here.

The assumptions are printed with the figures; nothing was measured on the named GPU.
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
from megatron_s2d.estimate.server_memory import served_models, server_memory, sets_fraction
from megatron_s2d.estimate.stage_time import StageTime, stage_time
from megatron_s2d.estimate.weight_push import stage_push
from megatron_s2d.formatting import format_bytes, format_seconds
from megatron_s2d.rollout.sglang.memory_fraction import OPTION
from megatron_s2d.workflow.layout_search import Proposal, propose
from megatron_s2d.workflow.likely_mistakes import memory_warnings
from megatron_s2d.workflow.nearest_fit import TOO_SMALL, nearest_fit, what_is_largest
from megatron_s2d.workflow.preflight import Preflight

_SHOWN_PROPOSALS = 5


def machine_from_options(gpu: str | None, num_gpus: int | None, assume: Sequence[str]) -> Machine | None:
    """Return the machine of ``--gpu`` and ``--assume``; None without ``--gpu``."""
    if gpu is None:
        for option, is_used in (("--num-gpus", num_gpus is not None), ("--assume", bool(assume))):
            if is_used:
                raise UserError(f"{option} needs --gpu, for example --gpu h200")
        return None
    if num_gpus is not None and num_gpus < 1:
        raise UserError(f"--num-gpus {num_gpus}: must be at least 1")
    return Machine(gpu_of(gpu), parse(AssumptionsConfig, apply_overrides({}, list(assume)), "--assume"))


def print_estimate(preflight: Preflight, machine: Machine | None, num_gpus: int | None, console: Console) -> None:
    """Print the memory of every stage; for a named GPU also time, traffic and, with ``num_gpus``, layouts that fit."""
    console.print(memory_table(preflight, machine))
    if machine is None:
        console.print("figures are for CPU ranks; --gpu h200 estimates a GPU", highlight=False)
        for warning in memory_warnings(preflight.config, preflight.memory(on_gpu=False)):
            console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
        return
    if preflight.config.fp8 is not None:
        check_chip(preflight.config.fp8, machine.gpu.capability, machine.gpu.name)
    times = {
        name: stage_time(preflight.config, name, preflight.specs, preflight.shapes[name], machine)
        for name in preflight.stages
    }
    for line in [
        *_unfitting_lines(preflight, machine), *_server_lines(preflight, machine), *_push_lines(preflight, machine)
    ]:  # fmt: skip
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(_time_table(preflight, times, machine))
    console.print(_traffic_table(times))
    if num_gpus is not None:
        proposals = propose(preflight, machine, num_gpus)
        console.print(_proposal_table(proposals, num_gpus, machine))
        console.print(f"fastest: {proposals[0].as_yaml()}", markup=False, highlight=False, soft_wrap=True)
    lengths = "lengths: every response has the maximum length; times exclude evaluations"
    notes = assumptions(machine, preflight.config.precision)
    if preflight.config.fp8 is not None:
        notes.append("fp8: times of products and bytes between ranks are those of bf16, so both are upper bounds")
    for line in [*notes, lengths]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def memory_table(preflight: Preflight, machine: Machine | None) -> Table:
    """Return one row for each stage: memory of its models by role, and what each phase adds by purpose."""
    where = "a CPU rank" if machine is None else f"one {machine.gpu.name}"
    columns = ["stage", "models", "weights, gradients, optimizer", "each phase adds", "peak"]
    if machine is not None:
        columns.append("fits")
    table = Table(*columns, title=f"Estimated memory of {where} (docs/preflight.md)", show_lines=True)
    engine = machine is not None and machine.assumptions.transformer_engine
    for name, memory in preflight.memory(on_gpu=machine is not None, transformer_engine=engine).items():
        models, parts = [], []
        for item in memory.models:
            models.append(f"{item.role} {format_bytes(item.total)}")
            trained = f", {format_bytes(item.gradients)}, {format_bytes(item.optimizer)}" if item.gradients else ""
            parts.append(f"{item.role} {format_bytes(item.weights + item.fp8_copies)}{trained}")
        sums = {phase: sum(values.values()) for phase, values in memory.phases.items()}
        adds = []
        for phase in sorted((phase for phase in sums if sums[phase]), key=lambda phase: -sums[phase]):
            purposes = [f"{what} {format_bytes(value)}" for what, value in memory.phases[phase].items() if value]
            adds.append(f"{phase} {format_bytes(sums[phase])}: {', '.join(purposes)}")
        if memory.peak_phase == "build":
            adds.append(f"in all {format_bytes(memory.build)} while the optimizer is made: weights are there twice")
        adds += [f"outside of PyTorch: {what} {format_bytes(value)}" for what, value in memory.outside.items()]
        adds += [f"pinned host memory: {what} {format_bytes(value)}" for what, value in memory.pinned.items()]
        row = [name, "\n".join(models), "\n".join(parts), "\n".join(adds), format_bytes(memory.total)]
        if machine is not None:
            row.append(_fits(memory.total, machine))
        table.add_row(*row)
    return table


def _unfitting_lines(preflight: Preflight, machine: Machine) -> list[str]:
    """Return a line for each stage that does not fit: where its peak is, of what, and the nearest settings that fit."""
    engine, lines = machine.assumptions.transformer_engine, []
    for name, memory in preflight.memory(on_gpu=True, transformer_engine=engine).items():
        if memory.total > machine.usable_memory:
            inputs = (preflight.config, name, preflight.specs, preflight.shapes[name], machine.usable_memory)
            fit = nearest_fit(*inputs, transformer_engine=engine)
            remedy = TOO_SMALL if fit is None else f"estimated to fit: {fit}"
            lines.append(f"stage {name} does not fit: {what_is_largest(memory)}; {remedy}")
    return lines


def _server_lines(preflight: Preflight, machine: Machine) -> list[str]:
    """Return a line for the servers that each stage starts: what they may take of their GPUs, or why they may not."""
    lines, config, assumed = [], preflight.config, machine.assumptions
    for name, memory in preflight.memory(on_gpu=True, transformer_engine=assumed.transformer_engine).items():
        if not served_models(config, name):
            continue
        if sets_fraction(config):
            lines.append(f"servers of {name}: {OPTION} of rollout.sglang.extra_args")
            continue
        sizes = {"device_memory": machine.gpu.memory, "reserved": assumed.reserved_memory}
        sizes["gpus_per_node"] = assumed.gpus_per_node
        try:
            planned = server_memory(config, name, preflight.specs, preflight.shapes[name], memory, **sizes)
        except UserError as error:
            lines.append(f"NO ROOM for servers: {error}")
            continue
        for item in planned:
            free = machine.gpu.memory - (item.beside and assumed.reserved_memory + memory.models_total)
            beside = f", beside {format_bytes(item.beside)} of the trainer" if item.beside else ""
            lines.append(
                f"servers of {name}: '{item.model}' takes {format_bytes(item.static)} of each GPU{beside} "
                f"({OPTION} {item.fraction(free):.3f})"
            )
    return lines


def _push_lines(preflight: Preflight, machine: Machine) -> list[str]:
    """Return a line for each stage that pushes weights to servers: how many ranks send how much, and how long."""
    lines, config = [], preflight.config
    for name in preflight.stages:
        if config.rollout.engine == "sglang" and preflight.shapes[name].updates and preflight.shapes[name].requests:
            sync = config.rollout.sglang.transport_of(getattr(config.stages[name], "lora", None) is not None)
            push = stage_push(config, name, preflight.specs[config.model_of(name)], machine)
            is_file = sync in ("disk", "adapter")
            verb, size = ("writes", push.bytes_written) if is_file else ("sends", push.sent.bytes_sent)
            lines.append(
                f"weights of {name} to servers, {sync}: {push.num_senders} rank(s) on as many machines, each "
                f"{verb} {format_bytes(size)}; {format_seconds(push.seconds(machine))} an update"
            )
    return lines


def _fits(peak: int, machine: Machine) -> str:
    usable = machine.usable_memory
    answer = "yes" if peak <= usable else "NO"
    return f"{answer}, {100 * peak / usable:.0f} % of {format_bytes(usable)}"


def _time_table(preflight: Preflight, times: dict[str, StageTime], machine: Machine) -> Table:
    ranks = preflight.config.parallel.world_size
    table = Table(
        "stage", "seconds per step", "share of phases", "tokens/s", "MFU", title=f"Estimated time, {ranks} ranks"
    )
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
    table = Table("stage", *(kinds or ["none"]), title="Bytes sent by one rank per step")
    for name, time in times.items():
        cells = [format_bytes(time.traffic[kind].bytes_sent) if kind in time.traffic else "-" for kind in kinds]
        table.add_row(name, *(cells or ["-"]))
    return table


def _proposal_table(proposals: list[Proposal], num_gpus: int, machine: Machine) -> Table:
    title = f"Layouts of {num_gpus} x {machine.gpu.name} that fit: {len(proposals)}; the fastest first"
    table = Table("TP", "PP", "CP", "EP", "DP", "recompute", "micro-batch", "time", "peak", "in stage", title=title)
    for item in proposals[:_SHOWN_PROPOSALS]:
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
            item.largest_stage,
        )
    return table


def assumptions(machine: Machine, precision: str = "bfloat16") -> list[str]:
    """Return the assumptions of the estimate as sentences."""
    gpu, assumed = machine.gpu, machine.assumptions
    layers = "Transformer Engine layers" if assumed.transformer_engine else "layers without Transformer Engine"
    fp8 = f"{gpu.fp8_flops / 1e12:.0f}" if gpu.fp8_flops else "no"
    lines = [
        f"data sheet: {gpu.name}: {format_bytes(gpu.memory)}, {gpu.bf16_flops / 1e12:.0f} bf16 and {fp8} fp8 TFLOP/s "
        f"dense, {gpu.memory_bandwidth / 1e12:.2f} TB/s memory, "
        f"{gpu.link_bandwidth / 1e9:.0f} GB/s one way in the node",
        f"assumed: {100 * assumed.matmul_efficiency:.0f} % of peak in GEMMs, "
        f"{100 * assumed.memory_efficiency:.0f} % of memory bandwidth in decoding, "
        f"{100 * assumed.link_efficiency:.0f} % of link bandwidth, "
        f"{assumed.network_bandwidth / 1e9:.0f} GB/s per GPU between nodes of {assumed.gpus_per_node}, "
        f"{1e6 * assumed.latency:.0f} us per collective, {format_bytes(assumed.reserved_memory)} reserved; no overlap",
        f"memory: counted for {layers} (docs/preflight.md), not measured on a GPU",
    ]
    if precision == "float32":
        lines.append("precision: float32 GEMMs are slower than the bf16 peak that is used here")
    return lines
