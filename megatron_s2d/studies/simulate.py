"""``s2d simulate``: seconds, tokens a second and memory of on-policy distillation on clusters nobody has at hand.

One step of stage 2b with the whole distribution, in the order of ``train/loop.py`` and by the model of ``costs/timing.py``:
prefill and decoding of the responses, the teacher's forward passes, the student's passes with the divergence, update,
and new weights to servers where there are any. Kernel times and bandwidths that were measured go in through the file;
what was not is a data-sheet number times an assumption, and is printed as such. Left out: grading, input, checkpoints,
failures, and anything that runs at the same time as something else. No torch here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from megatron_s2d.arithmetic import ceil_div
from megatron_s2d.config.base import load_yaml, parse
from megatron_s2d.config.hardware import gpu_of
from megatron_s2d.config.migration import SIMULATION_KEYS, refuse_renamed
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.simulation import ShareConfig, SimulationConfig
from megatron_s2d.config.training import RolloutConfig, SamplingConfig
from megatron_s2d.errors import UserError
from megatron_s2d.estimate.layers import Build, model_flops, pipeline_shards
from megatron_s2d.estimate.memory import (
    TeacherInputs,
    frozen_memory,
    generate_phases,
    train_phase,
    trained_memory,
    workload,
)
from megatron_s2d.estimate.roofline import Machine, ModelOnMachine, Traffic, hidden_state_traffic
from megatron_s2d.estimate.stage_time import output_flops
from megatron_s2d.formatting import format_bytes
from megatron_s2d.models.families import check_layout
from megatron_s2d.report.plots import BLUE, GREEN, GREY, INK, ORANGE, as_png, tidy
from megatron_s2d.report.sheets import Sheet, write_sheets
from megatron_s2d.workflow.plan_estimate import assumptions

PHASES = ("prefill", "decode", "teacher forward", "teacher states", "student passes", "KL", "update", "weight sync")
_COLORS = (GREY, BLUE, ORANGE, INK, GREEN, "#CC79A7", "#56B4E9", "#E69F00")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One number of GPUs."""

    num_gpus: int
    seconds: Mapping[str, float]  # phase -> seconds of a step
    tokens: float  # prompt and response tokens of a step
    mfu: float  # of the student's training operations, over the whole step
    memory: int  # peak bytes of the fullest rank

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.total


def load_simulation(path: Path) -> SimulationConfig:
    """Read and check a simulation file."""
    document = load_yaml(path)
    refuse_renamed(document, str(path), SIMULATION_KEYS)
    return parse(SimulationConfig, document, str(path))


def machine_from_config(config: SimulationConfig) -> Machine:
    """The data sheet with what was measured in place of what would be assumed."""
    gpu, taken, measured = gpu_of(config.gpu), config.assumptions, config.measured
    changes: dict[str, float] = {}
    if measured.matmuls:
        rate = sum(2 * item.m * item.n * item.k for item in measured.matmuls)
        rate /= sum(item.seconds for item in measured.matmuls)
        changes["matmul_efficiency"] = _share(rate, gpu.bf16_flops, "measured.matmuls", "FLOP/s")
    if measured.memory_bandwidth is not None:
        changes["memory_efficiency"] = _share(
            measured.memory_bandwidth, gpu.memory_bandwidth, "measured.memory_bandwidth", "bytes/s"
        )
    if measured.node_bandwidth is not None:  # the machine multiplies by the efficiency again
        gpu = dataclasses.replace(gpu, link_bandwidth=measured.node_bandwidth / taken.link_efficiency)
    if measured.network_bandwidth is not None:
        changes["network_bandwidth"] = measured.network_bandwidth / taken.link_efficiency
    if measured.latency is not None:
        changes["latency"] = measured.latency
    return Machine(gpu, taken.model_copy(update=changes))


def _share(found: float, peak: float, where: str, unit: str) -> float:
    if found > peak:
        raise UserError(f"{where}: {found:.3g} {unit} is above the data sheet's {peak:.3g}; check it and the `gpu`")
    return found / peak


def predict(config: SimulationConfig) -> list[Prediction]:
    """Every number of GPUs, in order; ``UserError`` for a layout that does not divide."""
    machine, smallest = machine_from_config(config), min(config.num_gpus)
    student, teacher = config.student.resolve(), config.teacher.resolve()
    if student.vocab_size != teacher.vocab_size:
        raise UserError(
            f"teacher and student have {teacher.vocab_size} and {student.vocab_size} tokens: "
            "they must share one vocabulary"
        )
    found = []
    for count in sorted(config.num_gpus):
        prompts = config.train_batch_size
        if config.scaling == "weak":
            prompts = prompts * count // smallest
        found.append(_Step(config, machine, student, teacher, count, prompts).prediction())
    return found


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step on ``count`` GPUs."""

    config: SimulationConfig
    machine: Machine
    student: ModelSpec
    teacher: ModelSpec
    count: int
    prompts: int

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
                f"{self.count} GPUs leave {parallel.data_parallel_size} data ranks for {responses} responses a step; "
                "raise train_batch_size, or set scaling: weak"
            )
        return parallel

    def prediction(self) -> Prediction:
        config = self.config
        share = config.teacher_parallel or config.parallel
        own = self._layout(config.parallel, self.student, "parallel")
        its = self._layout(share, self.teacher, "teacher_parallel")
        trainer = ModelOnMachine(self.student, own, Build(2, True, config.student.recompute), self.machine)
        scorer = ModelOnMachine(self.teacher, its, Build(2, True), self.machine)
        seconds = self._rollout(trainer) | self._training(trainer, scorer)
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
        """Rows that end are replaced until none is left, and the longest response is waited for."""
        config, engine = self.config, self._engine(trainer)
        engines = engine.parallel.data_parallel_size
        requests = self.prompts * config.num_generations / engines
        rows = min(requests, config.max_batch_size)
        longest = config.longest_response_tokens or config.response_tokens
        steps = max(longest, requests * config.response_tokens / rows)
        each = engine.decode_seconds(rows, config.prompt_tokens, config.response_tokens) / config.response_tokens
        sync = 0.0
        if config.engine_tensor_parallel_size is not None:
            received = 2 * self.student.num_parameters / config.engine_tensor_parallel_size
            sync = Traffic(received, 1, self.count).seconds(self.machine)
        return {
            "prefill": engine.prefill_seconds(max(1.0, self.prompts / engines), config.prompt_tokens),
            "decode": steps * each,
            "weight sync": sync,
        }

    def _work(self, parallel: ParallelConfig):
        config = self.config
        return workload(
            self.prompts * config.num_generations,
            config.prompt_tokens + config.response_tokens,
            config.response_tokens,
            max_tokens=config.micro_batch_tokens,
            parallel=parallel,
        )

    def _training(self, trainer: ModelOnMachine, scorer: ModelOnMachine) -> dict[str, float]:
        work, at = self._work(trainer.parallel), self._work(scorer.parallel)
        found = trainer.train_seconds(work, self.teacher)
        loss = found["loss"]
        measured = self.config.measured.kl
        if measured is not None:
            done = measured.vocab * (3 * measured.hidden + measured.teacher_hidden)
            wanted = trainer.shard.local_vocab_size * (3 * self.student.hidden_size + self.teacher.hidden_size)
            responses = work.num_micro_batches * work.batch.response_tokens
            loss = responses * measured.seconds / measured.tokens * wanted / done
        travel = 0.0
        if scorer.parallel != trainer.parallel:
            places = (scorer.parallel, trainer.parallel)
            responses = at.response_tokens * scorer.parallel.data_parallel_size
            travel = hidden_state_traffic(self.teacher, responses, 2, *places).seconds(self.machine)
        passes = ("layers", "tensor, pipeline, expert traffic", "pipeline idle")
        return {
            "teacher forward": scorer.score_seconds(at, outputs=False),
            "teacher states": travel,
            "student passes": sum(found[name] for name in passes),
            "KL": loss,
            "update": found["gradients and weights"] + found["optimizer"],
        }

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
        found = 0
        for shard in pipeline_shards(self.student, trainer.parallel):
            train = train_phase(shard, build, self._work(trainer.parallel), on_gpu=True, teacher=states)
            found = max(found, trained_memory(shard, build).total + max(sum(train.values()), decode))
        return found + teacher + server


# ---------------------------------------------------------------------------------- output


def print_simulation(config: SimulationConfig, out: Path | None, console: Console) -> None:
    """Tables on the terminal; with ``out`` also Markdown, a page, CSV and plots."""
    found, machine = predict(config), machine_from_config(config)
    sheets = [_main(config, found, machine), _phases(found)]
    for sheet in sheets:
        sheet.print(console)
    if out is not None:
        plots = {"phases": _plot_phases(found), "efficiency": _plot_efficiency(config, found)}
        page = write_sheets(out, "simulation", config.name, config.description, sheets, plots)
        (out / "simulation.csv").write_text(_phases(found).as_csv(), encoding="utf-8")
        console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)


def _efficiency(found: Sequence[Prediction]) -> list[float]:
    base = found[0].rate / found[0].num_gpus
    return [item.rate / item.num_gpus / base for item in found]


def _main(config: SimulationConfig, found: Sequence[Prediction], machine: Machine) -> Sheet:
    rows = []
    for item, efficiency in zip(found, _efficiency(found), strict=True):
        fits = "yes" if item.memory <= machine.usable_memory else "NO"
        rows.append([
            str(item.num_gpus), f"{item.total:.2f}", f"{item.rate:,.0f}", f"{item.rate / item.num_gpus:,.0f}",
            f"{100 * item.mfu:.1f} %", f"{100 * efficiency:.0f} %", format_bytes(item.memory), fits,
        ])  # fmt: skip
    columns = ["GPUs", "seconds a step", "tokens/s", "tokens/s a GPU", "MFU of training", f"{config.scaling} scaling"]
    title = f"{config.name}: predicted, not measured"
    return Sheet(title, [*columns, "peak of a rank", "fits"], rows, [*_basis(config), *assumptions(machine)])


def _basis(config: SimulationConfig) -> list[str]:
    """Which rates were measured and which are assumed."""
    measured = config.measured
    names = {
        "products": bool(measured.matmuls),
        "divergence": measured.kl is not None,
        "memory bandwidth": measured.memory_bandwidth is not None,
        "bandwidth in a node": measured.node_bandwidth is not None,
        "bandwidth between nodes": measured.network_bandwidth is not None,
        "latency": measured.latency is not None,
    }
    given = [name for name, known in names.items() if known]
    taken = [name for name, known in names.items() if not known]
    return [
        f"measured, from the file: {', '.join(given) or 'nothing'}",
        f"ASSUMED, data sheet times efficiency: {', '.join(taken) or 'nothing'}",
    ]


def _phases(found: Sequence[Prediction]) -> Sheet:
    rows = [[str(item.num_gpus), *(f"{item.seconds[phase]:.3f}" for phase in PHASES)] for item in found]
    return Sheet("Seconds of a step by phase", ["GPUs", *PHASES], rows)


def _plot_phases(found: Sequence[Prediction]) -> bytes:
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    place, bottom = np.arange(len(found)), np.zeros(len(found))
    for phase, color in zip(PHASES, _COLORS, strict=True):
        values = np.array([item.seconds[phase] for item in found])
        if values.any():
            axes.bar(place, values, bottom=bottom, color=color, label=phase, width=0.65)
            bottom += values
    axes.set_xticks(place, [str(item.num_gpus) for item in found])
    axes.set_xlabel("GPUs")
    axes.set_ylabel("seconds a step, predicted")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    tidy(axes, "y")
    return as_png(figure)


def _plot_efficiency(config: SimulationConfig, found: Sequence[Prediction]) -> bytes:
    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = figure.add_subplot()
    counts = [item.num_gpus for item in found]
    axes.plot(counts, [100 * value for value in _efficiency(found)], "o-", color=BLUE)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_ylim(0, 110)
    axes.set_xlabel("GPUs")
    axes.set_ylabel(f"{config.scaling} scaling, %, predicted")
    tidy(axes, "both")
    return as_png(figure)
