"""Prints what was measured of a rank: ``s2d plan CONFIG --measure``. No torch here."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from megatron_s2d.config.hardware import GPUS
from megatron_s2d.config.weights import ExpoConfig, LoadCheckpointConfig
from megatron_s2d.errors import UserError
from megatron_s2d.estimate.layers import Build, ModelShard
from megatron_s2d.estimate.memory import Workload, workload
from megatron_s2d.estimate.roofline import Machine
from megatron_s2d.estimate.stage_memory import frozen_models
from megatron_s2d.formatting import format_bytes
from megatron_s2d.measure.comparison import compare_memory
from megatron_s2d.measure.limits import Limits
from megatron_s2d.measure.measure import RankLauncher, measure_stage
from megatron_s2d.measure.measurement import Measurement, PhaseCall
from megatron_s2d.measure.time_by_part import Model, phase_time
from megatron_s2d.workflow.nearest_fit import TOO_SMALL, nearest_fit
from megatron_s2d.workflow.preflight import Preflight

_SHOWN_WAITS = 12


def print_measurements(
    preflight: Preflight, stage: str | None, rank: int, machine: Machine | None, console: Console
) -> int:
    """Measure ``rank`` of one stage, or of every stage that computes; return how many did not fit."""
    stages = [name for name in preflight.stages if _is_measured(preflight, name)]
    if stage is not None:
        if stage not in preflight.stages:
            raise UserError(f"--stage {stage}: no arm needs a stage of this name ({', '.join(preflight.stages)})")
        if stage not in stages:
            raise UserError(f"--stage {stage}: it only reads or averages weights: there is nothing to measure")
        stages = [stage]
    limits = Limits()
    machine = machine or Machine(GPUS["h100"])
    gib = (
        machine.usable_memory / 2**30
    )  # so that a rank runs out of memory where ``plan --gpu`` says that it does not fit
    num_failed = 0
    with RankLauncher() as launcher:
        for name in stages:
            console.print(f"measuring rank {rank} of stage {name} ...", highlight=False)
            shape = preflight.shapes[name]
            measurement = measure_stage(
                preflight.config, name, shape, rank, limits=limits, device_gib=gib, launcher=launcher
            )
            _print(preflight, measurement, limits, machine, console)
            num_failed += measurement.out_of_memory is not None
    return num_failed


def _is_measured(preflight: Preflight, name: str) -> bool:
    return not isinstance(preflight.config.stages[name], ExpoConfig | LoadCheckpointConfig)


def _print(preflight: Preflight, measurement: Measurement, limits: Limits, machine: Machine, console: Console) -> None:
    where = ", ".join(f"{name} {value}" for name, value in measurement.coordinates.items())
    console.print(
        _phase_table(preflight, measurement, limits, f"rank {measurement.rank} of {measurement.world_size} ({where})")
    )
    console.print(_traffic_table(measurement))
    console.print(_wait_table(measurement))
    console.print(_product_table(measurement))
    if measurement.out_of_memory is None and preflight.shapes[measurement.stage].responses:
        console.print(_time_table(preflight, measurement, machine))
    lines = [
        f"micro-batches of an update: at most {limits.micro_batches}; decoded tokens of a response: at most "
        f"{limits.decoded_tokens}; weights are not loaded, responses have the longest length",
        f"device: {format_bytes(measurement.device_bytes)} ({format_bytes(machine.gpu.memory)} less "
        f"{format_bytes(machine.assumptions.reserved_memory)}, --assume reserved_memory=...), peak "
        f"{format_bytes(measurement.peak_bytes)}",
    ]
    if not measurement.transformer_engine:
        lines.append(
            "Transformer Engine is not installed: `s2d plan --gpu` alone estimates its layers, unless --assume "
            "transformer_engine=false"
        )
    if measurement.out_of_memory is not None:
        error = measurement.out_of_memory
        lines.append(
            f"OUT OF MEMORY on rank {measurement.rank} in {error.phase}, for {error.tensor}, at {error.line}: "
            f"{error.message}"
        )
        fit = nearest_fit(
            preflight.config,
            measurement.stage,
            preflight.specs,
            preflight.shapes[measurement.stage],
            measurement.device_bytes,
            pp_rank=measurement.coordinates["pp"],
            transformer_engine=measurement.transformer_engine,
        )
        lines.append(TOO_SMALL if fit is None else f"estimated to fit: {fit}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _phases(measurement: Measurement) -> dict[str, PhaseCall]:
    """Return the last call of every phase, in order of first use."""
    return {call.phase: measurement.call(call.phase) for call in measurement.calls}


def _phase_table(preflight: Preflight, measurement: Measurement, limits: Limits, rank: str) -> Table:
    shape = preflight.shapes[measurement.stage]
    estimates = {}
    if measurement.out_of_memory is None:
        compared = compare_memory(preflight.config, preflight.specs, shape, measurement, limits)
        estimates = {item.phase: item.estimated for item in compared}
    columns = ("phase", "held", "peak", "allocator", "s2d plan", "micro-batches", "launches", "waits", "TFLOP")
    table = Table(*columns, title=f"Measured: stage {measurement.stage}, {rank}")
    for phase, call in _phases(measurement).items():
        per = max(1, call.micro_batches)
        estimate = format_bytes(estimates[phase]) if phase in estimates else "-"
        sizes = (call.held_bytes, measurement.peaks[phase], call.reserved_bytes)
        counts = (f"{call.num_launches / per:,.0f}", f"{call.num_waits / per:,.1f}", f"{call.flops / per / 1e12:,.2f}")
        table.add_row(phase, *map(format_bytes, sizes), estimate, str(call.micro_batches or "-"), *counts)
    table.caption = "launches, waits of the host for the device and TFLOP are per micro-batch where there are any"
    return table


def _traffic_table(measurement: Measurement) -> Table:
    columns = ("phase", "collective", "ranks", "type", "calls", "bytes", "overlapped")
    table = Table(*columns, title="Collectives of one call")
    for phase, call in _phases(measurement).items():
        overlapped = {(item.kind, item.ranks, item.dtype): item.bytes for item in measurement.overlapped(phase)}
        for item in sorted(call.collectives, key=lambda item: -item.bytes):
            if item.bytes >= 2**20:
                hidden = overlapped.get((item.kind, item.ranks, item.dtype), 0)
                sizes = (format_bytes(item.bytes), format_bytes(hidden) if hidden else "-")
                table.add_row(phase, item.kind, str(item.ranks), item.dtype, str(item.count), *sizes)
    table.caption = (
        "bytes of the larger side; those below 1 MiB are left out; overlapped: with matrix products queued between the "
        "collective and the wait for it"
    )
    return table


def _wait_table(measurement: Measurement) -> Table:
    table = Table("phase", "waits", "line", title="Waits of the host for the device, in one call")
    rows = [(count, phase, line) for phase, call in _phases(measurement).items() for line, count in call.waits.items()]
    for count, phase, line in sorted(rows, reverse=True)[:_SHOWN_WAITS]:
        table.add_row(phase, str(count), line)
    return table


def _product_table(measurement: Measurement) -> Table:
    table = Table("phase", "operands", "result", "calls", "TFLOP", "largest: m x n x k", title="Matrix products")
    for phase, call in _phases(measurement).items():
        for (a, b, c), products in _by_types(call.products).items():
            largest = max(products, key=lambda item: item.m * item.n * item.k)
            flops = sum(item.flops for item in products)
            count = sum(item.count for item in products)
            size = f"{largest.m} x {largest.n} x {largest.k}"
            table.add_row(phase, f"{a} x {b}", c, str(count), f"{flops / 1e12:,.3f}", size)
    return table


_PASSES = ("score", "reference", "teacher", "train", "update")


def _time_table(preflight: Preflight, measurement: Measurement, machine: Machine) -> Table:
    """Return the least time of an update by part, largest first within a phase."""
    phases = [
        phase_time(call, measurement.overlapped(name), *_model_of(preflight, measurement, name), machine)
        for name, call in _phases(measurement).items()
        if name in _PASSES
    ]
    total = sum(phase.seconds for phase in phases)
    table = Table("phase", "part", "counted", "ms", "share", title=f"Least time of an update, {machine.gpu.name}")
    for phase in phases:
        rows = [(part.name, part.counted, part.seconds, not part.overlapped) for part in phase.parts]
        rows.append(("pipeline idle", "", phase.idle_seconds, True))
        is_slower = phase.host_seconds > phase.device_seconds
        launches = "launches" + ("" if is_slower else ", beside the device")
        rows.append((launches, f"{phase.launches:,}", phase.host_seconds, is_slower))
        for name, counted, seconds, counts in sorted(rows, key=lambda row: -row[2]):
            if seconds >= 1e-4:
                share = f"{seconds / total:.1%}" if counts else "-"
                table.add_row(phase.phase, name, counted, f"{1e3 * seconds:,.1f}", share)
        table.add_row(phase.phase, "all", "", f"{1e3 * phase.seconds:,.1f}", f"{phase.seconds / total:.1%}")
    network, launch = machine.assumptions.network_bandwidth / 1e9, machine.assumptions.launch_seconds * 1e6
    table.caption = (
        f"at data-sheet peaks, a network of {network:g} GB/s a GPU and {launch:g} us a launch; all micro-batches of an "
        "update; generation is not in it (docs/roofline.md)"
    )
    return table


def _model_of(preflight: Preflight, measurement: Measurement, phase: str) -> tuple[Model, Workload]:
    """Return the model of a phase and its work in an update."""
    config, stage_name, shape = preflight.config, measurement.stage, preflight.shapes[measurement.stage]
    stage, model_name, parallel = config.stages[stage_name], config.model_of(stage_name), config.parallel
    recomputed, pp_rank = 0.0, measurement.coordinates["pp"]
    for role, other, layout in frozen_models(config, stage_name):
        if role == phase:
            model_name, parallel = config.model_of(other), layout
            same = layout.pipeline_model_parallel_size == config.parallel.pipeline_model_parallel_size
            pp_rank = pp_rank if same else layout.pipeline_model_parallel_size - 1
    if phase == "train":
        build = Build(2, False, config.models[model_name].recomputation)
        recomputed = ModelShard(preflight.specs[model_name], parallel, pp_rank).recomputed_share(build)
    work = workload(
        shape.responses,
        shape.length,
        shape.response_length,
        max_tokens=stage.micro_batch.max_tokens_per_gpu,
        parallel=parallel,
        equal_lengths=True,  # as they were measured
    )
    return Model(preflight.specs[model_name], parallel, pp_rank, recomputed), work


def _by_types(products: Iterable) -> dict[tuple[str, str, str], Sequence]:
    groups = collections.defaultdict(list)
    for item in products:
        groups[item.a, item.b, item.c].append(item)
    return dict(sorted(groups.items(), key=lambda entry: -sum(item.flops for item in entry[1])))
