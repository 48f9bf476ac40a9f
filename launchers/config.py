"""Settings of a cluster and its jobs, read from a small YAML file beside the workflow. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pydantic
from pydantic import Field, PositiveInt

from megatron_s2d.config.base import Config, apply_overrides, parse
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.config.yaml_file import load_yaml
from megatron_s2d.errors import UserError

OneLine = Annotated[str, Field(pattern=r"^[^\n\r]+$")]


class ContainerConfig(Config):
    """A container for every rank, started through pyxis and enroot (``srun --container-image``)."""

    image: OneLine = Field(description="an image of a registry, or a .sqsh file")
    mounts: list[OneLine] = Field(
        default_factory=list,
        description="source:target[:flags], in the form of pyxis; the working and the run directory are always mounted",
    )


class LaunchConfig(Config):
    """Nodes and processes of a launch, options of its jobs, and how they restart."""

    nodes: int | None = Field(None, ge=1, description="by default 1")
    min_nodes: int | None = Field(
        None,
        ge=1,
        description="slurm: after a crash, continue within the job on the remaining nodes, if there are this many; "
        "the number of data-parallel replicas follows",
    )
    server_nodes: dict[str, PositiveInt] = Field(
        default_factory=dict,
        description="slurm: entry of `models` -> additional nodes whose GPUs run SGLang servers for its rollouts",
    )
    processes_per_node: int | None = Field(None, ge=1, description="ranks; by default the layout's ranks / nodes")
    gpus_per_node: int | None = Field(
        None,
        ge=0,
        description="by default one for each process; 0: nodes without GPUs, or a site with other options for them",
    )
    cpus_per_process: int | None = Field(None, ge=1, description="by default the site's")
    time_limit_minutes: int = Field(240, ge=1, description="of one job; a longer run needs several, see `requeue`")
    partition: OneLine | None = None
    account: OneLine | None = None
    qos: OneLine | None = None
    constraint: OneLine | None = None
    sbatch: list[OneLine] = Field(
        default_factory=list, description="additional options of sbatch, such as `--mem=0` or `--reservation=name`"
    )
    container: ContainerConfig | None = None
    python: OneLine | None = Field(None, description="interpreter; by default this one, in a container `python3`")
    setup: list[str] = Field(
        default_factory=list, description="bash lines that every rank runs first, such as module load"
    )
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field(
        default_factory=dict, description="environment variables of every rank"
    )
    signal_seconds: int = Field(
        300,
        ge=1,
        le=65535,
        description="time before the limit at which ranks finish their step, save a checkpoint and exit",
    )
    requeue: bool = Field(True, description="put a job that was stopped at its time limit back into the queue")
    max_requeues: int = Field(100, ge=0, description="limit, so that a run without progress ends")
    restarts: int = Field(2, ge=0, description="how often a job restarts its ranks on its nodes after a crash")
    per_stage: bool = Field(False, description="submit one job a stage, each after the stages that it depends on")

    @pydantic.field_validator("sbatch")
    @classmethod
    def _check_options(cls, lines: list[str]) -> list[str]:
        for line in lines:
            if not line.startswith("-"):
                raise ValueError(f"'{line}' is not an option: write it as on sbatch's command line, such as --mem=0")
        return lines

    @pydantic.model_validator(mode="after")
    def _check_time_to_save(self) -> LaunchConfig:
        if self.signal_seconds >= 60 * self.time_limit_minutes:
            raise ValueError(
                f"signal_seconds {self.signal_seconds} is not below the time limit of {self.time_limit_minutes} minutes"
            )
        return self


def load_launch(path: Path | None, overrides: list[str]) -> LaunchConfig:
    """Return the settings of the file (or the defaults) with overrides ``key=value``; errors are ``UserError``."""
    document = apply_overrides({} if path is None else load_yaml(path), overrides)
    return parse(LaunchConfig, document, "launch settings" if path is None else str(path))


def resolve(launch: LaunchConfig, workflow: WorkflowConfig) -> LaunchConfig:
    """Return ``launch`` with nodes, processes and GPUs filled in; ``UserError`` if they do not match the layout."""
    world_size = workflow.parallel.world_size
    nodes = launch.nodes or 1
    processes = launch.processes_per_node or max(1, world_size // nodes)
    if nodes * processes != world_size:
        raise UserError(
            f"{nodes} nodes x {processes} processes are {nodes * processes} ranks, but the workflow's layout takes "
            f"{world_size}: {_remedy(workflow, nodes * processes)}"
        )
    if launch.min_nodes is not None:
        if launch.min_nodes > nodes:
            raise UserError(f"min_nodes {launch.min_nodes} is above the {nodes} nodes of the job")
        for fewer in range(launch.min_nodes, nodes):
            workflow.with_world_size(fewer * processes)
    gpus = processes if launch.gpus_per_node is None else launch.gpus_per_node
    return launch.model_copy(update={"nodes": nodes, "processes_per_node": processes, "gpus_per_node": gpus})


def _remedy(workflow: WorkflowConfig, ranks: int) -> str:
    replica = workflow.parallel.world_size // workflow.parallel.data_parallel_size
    if ranks % replica == 0 and workflow.teacher_parallel is None:
        return f"add --set parallel.data_parallel_size={ranks // replica}"
    return f"choose nodes and processes whose product is {workflow.parallel.world_size}, or change `parallel`"
