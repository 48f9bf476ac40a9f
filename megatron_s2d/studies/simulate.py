"""``s2d simulate``: predicts time and memory of on-policy distillation on clusters that are not available.

One OPD step with the full-vocabulary divergence, in the order of ``train/loop.py`` and by the models of ``estimate/``:
prefill and decoding of the responses, teacher forward, student passes with the divergence, optimizer step, and the
weight update of the servers if there are any, then the work of the host (``control_plane.py``) and checkpoints.
Measured kernel times and bandwidths come from the simulation file; every other rate is a data-sheet number times an
assumption, and is printed as such. Not modelled: grading, data loading, failures and overlap. No torch here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from megatron_s2d.arithmetic import ceil_div
from megatron_s2d.config.base import parse
from megatron_s2d.config.hardware import gpu_of
from megatron_s2d.config.migration import SIMULATION_KEYS, refuse_renamed
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.simulation import ShareConfig, SimulationConfig
from megatron_s2d.config.training import RolloutConfig, SamplingConfig, SglangConfig
from megatron_s2d.config.yaml_file import load_yaml
from megatron_s2d.errors import UserError
from megatron_s2d.estimate.layers import Build, model_flops, pipeline_shards
from megatron_s2d.estimate.memory import (
    TeacherInputs,
    Workload,
    frozen_memory,
    generate_phases,
    train_phase,
    trained_memory,
    workload,
)
from megatron_s2d.estimate.roofline import Machine, ModelOnMachine, hidden_state_traffic
from megatron_s2d.estimate.stage_time import output_flops
from megatron_s2d.estimate.weight_push import weight_push
from megatron_s2d.formatting import format_bytes
from megatron_s2d.models.families import check_layout
from megatron_s2d.report.plots import BLUE, GREEN, GREY, INK, ORANGE, as_png, tidy
from megatron_s2d.report.sheets import Sheet, write_sheets
from megatron_s2d.studies.control_plane import COMMAND, checkpoint_seconds, growth, host_seconds
from megatron_s2d.workflow.plan_estimate import assumptions

PHASES = ("prefill", "decode", "teacher forward", "teacher states", "student passes", "KL", "update", "weight sync",
          "host", "checkpoint")  # fmt: skip
_BUCKET_BYTES = SglangConfig().bucket_bytes
_CHECKPOINT_BYTES = 14  # of a parameter: bfloat16 weight, float32 master and two moments
_COLORS = (GREY, BLUE, ORANGE, INK, GREEN, "#CC79A7", "#56B4E9", "#E69F00", "#8C564B", "#BCBD22")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction for one number of GPUs."""

    num_gpus: int
    seconds: Mapping[str, float]  # phase -> seconds per step
    tokens: float  # prompt and response tokens per step
    mfu: float  # FLOPs of training the student, over the duration of the step
    memory: int  # largest peak of a rank, in bytes

    @property
    def total(self) -> float:
        """Seconds per step."""
        return sum(self.seconds.values())

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.total


def load_simulation(path: Path) -> SimulationConfig:
    """Read and check a simulation file."""
    document = load_yaml(path)
    refuse_renamed(document, str(path), SIMULATION_KEYS)
    return parse(SimulationConfig, document, str(path))


def machine_from_config(config: SimulationConfig) -> Machine:
    """Return the GPU of the data sheet with measured rates in place of assumed ones."""
    gpu, assumed, measured = gpu_of(config.gpu), config.assumptions, config.measured
    changes: dict[str, float] = {}
    if measured.matmuls:
        rate = sum(2 * item.m * item.n * item.k for item in measured.matmuls)
        rate /= sum(item.seconds for item in measured.matmuls)
        changes["matmul_efficiency"] = _fraction_of_peak(rate, gpu.bf16_flops, "measured.matmuls", "FLOP/s")
    if measured.memory_bandwidth is not None:
        changes["memory_efficiency"] = _fraction_of_peak(
            measured.memory_bandwidth, gpu.memory_bandwidth, "measured.memory_bandwidth", "bytes/s"
        )
    if measured.node_bandwidth is not None:  # Machine multiplies by the efficiency again
        gpu = dataclasses.replace(gpu, link_bandwidth=measured.node_bandwidth / assumed.link_efficiency)
    if measured.network_bandwidth is not None:
        changes["network_bandwidth"] = measured.network_bandwidth / assumed.link_efficiency
    if measured.latency is not None:
        changes["latency"] = measured.latency
    return Machine(gpu, assumed.model_copy(update=changes))


def _fraction_of_peak(rate: float, peak: float, where: str, unit: str) -> float:
    if rate > peak:
        raise UserError(f"{where}: {rate:.3g} {unit} is above the data sheet's {peak:.3g}; check it and the `gpu`")
    return rate / peak


def predict(config: SimulationConfig, machine: Machine | None = None, bytes_per_value: int = 2) -> list[Prediction]:
    """Predict every number of GPUs, in order; raise ``UserError`` for a layout that does not divide the models.

    machine: by default the one of the configuration. bytes_per_value: of weights and activations.
    """
    machine, smallest = machine or machine_from_config(config), min(config.num_gpus)
    student, teacher = config.student.resolve(), config.teacher.resolve()
    if student.vocab_size != teacher.vocab_size:
        raise UserError(
            f"teacher and student have vocabularies of {teacher.vocab_size} and {student.vocab_size} tokens: "
            "they must share one vocabulary"
        )
    predictions = []
    for count in sorted(config.num_gpus):
        prompts = config.train_batch_size
        if config.scaling == "weak":
            prompts = prompts * count // smallest
        step = _Step(config, machine, student, teacher, count, prompts, bytes_per_value)
        predictions.append(step.prediction())
    return predictions


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step on ``count`` GPUs."""

    config: SimulationConfig
    machine: Machine
    student: ModelSpec
    teacher: ModelSpec
    count: int
    prompts: int
    bytes_per_value: int

    def _layout(self, share: ShareConfig, spec: ModelSpec, name: str) -> ParallelConfig:
        sizes = share.model_dump()
        replica = share.tensor_model_parallel_size * share.pipeline_model_parallel_size
        try:
            sharded = share.tensor_model_parallel_size > 1
            parallel = ParallelConfig(**sizes, data_parallel_size=self.count // replica, sequence_parallel=sharded)
            check_layout(spec, parallel)
        except (UserError, ValueError) as error:
            text = str(error).splitlines()[0]
            raise UserError(f"{name}: on {self.count} GPUs: {text}") from None
        responses = self.prompts * self.config.num_generations
        if responses < parallel.data_parallel_size:
            raise UserError(
                f"{self.count} GPUs have {parallel.data_parallel_size} data-parallel ranks but only {responses} "
                "responses per step; increase train_batch_size, or set scaling: weak"
            )
        return parallel

    def prediction(self) -> Prediction:
        config = self.config
        share = config.teacher_parallel or config.parallel
        student_layout = self._layout(config.parallel, self.student, "parallel")
        teacher_layout = self._layout(share, self.teacher, "teacher_parallel")
        size = self.bytes_per_value
        build = Build(size, True, config.student.recomputation)
        trainer = ModelOnMachine(self.student, student_layout, build, self.machine)
        scorer = ModelOnMachine(self.teacher, teacher_layout, Build(size, True), self.machine)
        seconds = self._rollout(trainer) | self._training(trainer, scorer) | self._beside_models(trainer.parallel)
        tokens = self.prompts * config.num_generations * (config.prompt_tokens + config.response_tokens)
        flops = 3 * model_flops(self.student, tokens, (config.prompt_tokens + config.response_tokens) / 2)
        responses = self.prompts * config.num_generations * config.response_tokens
        flops += 3 * responses * output_flops(self.student)
        total = sum(seconds.values())
        mfu = flops / (total * self.count * self.machine.gpu.bf16_flops)
        ordered = {phase: seconds[phase] for phase in PHASES}
        return Prediction(self.count, ordered, tokens, mfu, self._memory(trainer, scorer))

    # ------------------------------------------------------------------------------ time

    def _engine(self, trainer: ModelOnMachine) -> ModelOnMachine:
        size = self.config.engine_tensor_parallel_size
        if size is None:
            return trainer
        parallel = ParallelConfig(tensor_model_parallel_size=size, data_parallel_size=self.count // size)
        return dataclasses.replace(trainer, parallel=parallel)

    def _rollout(self, trainer: ModelOnMachine) -> dict[str, float]:
        """Finished rows are replaced while requests remain, and the step waits for the longest response."""
        config, engine = self.config, self._engine(trainer)
        engines = engine.parallel.data_parallel_size
        requests = self.prompts * config.num_generations / engines
        rows = min(requests, config.max_batch_size)
        longest = config.longest_response_tokens or config.response_tokens
        steps = max(longest, requests * config.response_tokens / rows)
        each = engine.decode_seconds(rows, config.prompt_tokens, config.response_tokens) / config.response_tokens
        sync = 0.0
        if config.engine_tensor_parallel_size is not None:
            push = weight_push(
                self.student, trainer.parallel, "distributed", self.bytes_per_value, _BUCKET_BYTES, self.machine
            )
            sync = push.seconds(self.machine)
        return {
            "prefill": engine.prefill_seconds(max(1.0, self.prompts / engines), config.prompt_tokens),
            "decode": steps * each,
            "weight sync": sync,
        }

    def _workload(self, parallel: ParallelConfig, *, even: bool = False) -> Workload:
        """Return the micro-batches of one data-parallel rank.

        even: of equal size, as many as it takes, for the time of all; else of the full size, for the memory of one.
        """
        config = self.config
        responses, length = self.prompts * config.num_generations, config.prompt_tokens + config.response_tokens
        limit = config.micro_batch_tokens
        if even:
            tokens = ceil_div(responses, parallel.data_parallel_size) * length
            limit = ceil_div(tokens, ceil_div(tokens, limit))
        return workload(responses, length, config.response_tokens, max_tokens=limit, parallel=parallel)

    def _training(self, trainer: ModelOnMachine, scorer: ModelOnMachine) -> dict[str, float]:
        student_work = self._workload(trainer.parallel, even=True)
        teacher_work = self._workload(scorer.parallel, even=True)
        seconds = trainer.train_seconds(student_work, self.teacher)
        loss = seconds["loss"]
        measured = self.config.measured.kl
        if measured is not None:
            measured_size = measured.vocab * (3 * measured.hidden + measured.teacher_hidden)
            size = trainer.shard.local_vocab_size * (3 * self.student.hidden_size + self.teacher.hidden_size)
            num_tokens = student_work.num_micro_batches * student_work.batch.response_tokens
            loss = num_tokens * measured.seconds / measured.tokens * size / measured_size
        transfer = 0.0
        if scorer.parallel != trainer.parallel:
            num_tokens = teacher_work.response_tokens * scorer.parallel.data_parallel_size
            traffic = hidden_state_traffic(
                self.teacher, num_tokens, self.bytes_per_value, scorer.parallel, trainer.parallel
            )
            transfer = traffic.seconds(self.machine)
        passes = ("layers", "tensor, pipeline, context, expert traffic", "pipeline idle")
        return {
            "teacher forward": scorer.score_seconds(teacher_work, outputs=False),
            "teacher states": transfer,
            "student passes": sum(seconds[name] for name in passes),
            "KL": loss,
            "update": seconds["gradients and weights"] + seconds["optimizer"],
        }

    def _beside_models(self, parallel: ParallelConfig) -> dict[str, float]:
        config, ranks = self.config, parallel.data_parallel_size
        tokens = self.prompts * config.num_generations * (config.prompt_tokens + config.response_tokens) / ranks
        fixed, count = config.measured, self._workload(parallel, even=True).num_micro_batches
        host = host_seconds(ranks, tokens) + fixed.step_seconds + count * fixed.micro_batch_seconds
        seconds = {"host": host, "checkpoint": 0.0}
        if config.checkpoint_interval_steps is not None:
            nodes = ceil_div(self.count, self.machine.assumptions.gpus_per_node)
            written = checkpoint_seconds(
                _CHECKPOINT_BYTES * self.student.num_parameters,
                nodes,
                config.node_write_bandwidth,
                config.file_system_bandwidth,
            )
            seconds["checkpoint"] = written / config.checkpoint_interval_steps
        return seconds

    # ------------------------------------------------------------------------------ memory

    def _memory(self, trainer: ModelOnMachine, scorer: ModelOnMachine) -> int:
        config, build = self.config, trainer.build
        same = scorer.parallel == trainer.parallel
        states = TeacherInputs("hidden", self.teacher, copies_output_layer=not same)
        teacher = max(
            frozen_memory(shard, build, "teacher").total for shard in pipeline_shards(self.teacher, scorer.parallel)
        )
        engine = self._engine(trainer)
        server = 0
        if engine is not trainer:
            server = max(
                frozen_memory(shard, build, "engine").total for shard in pipeline_shards(self.student, engine.parallel)
            )
        requests = ceil_div(self.prompts * config.num_generations, engine.parallel.data_parallel_size)
        rows = min(requests, config.max_batch_size)
        longest = config.longest_response_tokens or config.response_tokens
        sampling = SamplingConfig(max_response_length=longest)
        rollout = RolloutConfig(max_batch_size=rows, max_batch_tokens=rows * (config.prompt_tokens + longest))
        decode = max(
            sum(phase.values())
            for shard in pipeline_shards(self.student, engine.parallel)
            for phase in generate_phases(
                shard, build, requests=rows, prompts=rows, prompt_length=config.prompt_tokens, sampling=sampling,
                rollout=rollout,
            ).values()
        )  # fmt: skip
        peak = 0
        for shard in pipeline_shards(self.student, trainer.parallel):
            train = train_phase(shard, build, self._workload(trainer.parallel), on_gpu=True, teacher=states)
            peak = max(peak, trained_memory(shard, build).total + max(sum(train.values()), decode))
        return peak + teacher + server


# ---------------------------------------------------------------------------------- output


def print_simulation(config: SimulationConfig, out: Path | None, console: Console) -> None:
    """Print tables; with ``out`` also write Markdown, a page, CSV and plots."""
    predictions, machine = predict(config), machine_from_config(config)
    sheets = [_main(config, predictions, machine), _phases(predictions)]
    for sheet in sheets:
        sheet.print(console)
    if out is not None:
        plots = {"phases": _plot_phases(predictions), "efficiency": _plot_efficiency(config, predictions)}
        page = write_sheets(out, "simulation", config.name, config.description, sheets, plots)
        (out / "simulation.csv").write_text(_phases(predictions).as_csv(), encoding="utf-8")
        console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)


def _efficiency(predictions: Sequence[Prediction]) -> list[float]:
    base = predictions[0].rate / predictions[0].num_gpus
    return [item.rate / item.num_gpus / base for item in predictions]


def _main(config: SimulationConfig, predictions: Sequence[Prediction], machine: Machine) -> Sheet:
    rows = []
    for item, efficiency in zip(predictions, _efficiency(predictions), strict=True):
        fits = "yes" if item.memory <= machine.usable_memory else "NO"
        rows.append([
            str(item.num_gpus), f"{item.total:.2f}", f"{item.rate:,.0f}", f"{item.rate / item.num_gpus:,.0f}",
            f"{100 * item.mfu:.1f} %", f"{100 * efficiency:.0f} %", format_bytes(item.memory), fits,
        ])  # fmt: skip
    columns = [
        "GPUs",
        "seconds per step",
        "tokens/s",
        "tokens/s per GPU",
        "MFU of training",
        f"{config.scaling} scaling",
    ]
    title = f"{config.name}: predicted, not measured"
    return Sheet(title, [*columns, "peak of a rank", "fits"], rows, [*_basis(config), *assumptions(machine)])


def _basis(config: SimulationConfig) -> list[str]:
    """Return which rates were measured and which are assumed."""
    measured = config.measured
    names = {
        "matmuls": bool(measured.matmuls),
        "divergence": measured.kl is not None,
        "memory bandwidth": measured.memory_bandwidth is not None,
        "bandwidth in a node": measured.node_bandwidth is not None,
        "bandwidth between nodes": measured.network_bandwidth is not None,
        "latency": measured.latency is not None,
    }
    measured_rates = [name for name, is_measured in names.items() if is_measured]
    assumed_rates = [name for name, is_measured in names.items() if not is_measured]
    return [
        f"measured, from the file: {', '.join(measured_rates) or 'nothing'}",
        f"ASSUMED, data sheet times efficiency: {', '.join(assumed_rates) or 'nothing'}",
        f"host: measured by {COMMAND} on 2 to 32 ranks, grows with data-parallel ranks^{growth():.2f}; with "
        f"{measured.step_seconds:g} s a step and {measured.micro_batch_seconds:g} s a micro-batch, from the file",
    ]


def _phases(predictions: Sequence[Prediction]) -> Sheet:
    rows = [[str(item.num_gpus), *(f"{item.seconds[phase]:.3f}" for phase in PHASES)] for item in predictions]
    return Sheet("Seconds per step by phase", ["GPUs", *PHASES], rows)


def _plot_phases(predictions: Sequence[Prediction]) -> bytes:
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    positions, bottom = np.arange(len(predictions)), np.zeros(len(predictions))
    for phase, color in zip(PHASES, _COLORS, strict=True):
        values = np.array([item.seconds[phase] for item in predictions])
        if values.any():
            axes.bar(positions, values, bottom=bottom, color=color, label=phase, width=0.65)
            bottom += values
    axes.set_xticks(positions, [str(item.num_gpus) for item in predictions])
    axes.set_xlabel("GPUs")
    axes.set_ylabel("seconds per step, predicted")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    tidy(axes, "y")
    return as_png(figure)


def _plot_efficiency(config: SimulationConfig, predictions: Sequence[Prediction]) -> bytes:
    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = figure.add_subplot()
    counts = [item.num_gpus for item in predictions]
    axes.plot(counts, [100 * value for value in _efficiency(predictions)], "o-", color=BLUE)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_ylim(0, 110)
    axes.set_xlabel("GPUs")
    axes.set_ylabel(f"{config.scaling} scaling, %, predicted")
    tidy(axes, "both")
    return as_png(figure)
