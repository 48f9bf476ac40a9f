"""SGLang servers on nodes of their own within a SLURM job: the first nodes train, the last ones serve. No torch here.

    NN-TASK.sbatch --srun, once a server--> server.sh --> sglang.launch_server
                   --srun, once a rank----> rank.sh   --> s2d run ... --set rollout.sglang.urls.MODEL=[...]

Servers start with a model's published weights and get the trained ones from the trainer, which checks that they hold
them.
"""

from __future__ import annotations

import shlex

from megatron_s2d.config.base import UserError
from megatron_s2d.config.training import SERVER_SPARE_POSITIONS
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.launchers.config import LaunchConfig

PORT = 30000
_UNKNOWN = "http://set-by-the-job:30000"


def with_servers(workflow: WorkflowConfig, settings: LaunchConfig) -> WorkflowConfig:
    """``workflow`` whose servers are those of the job; ``UserError`` for models that cannot be served so."""
    if not settings.server_nodes:
        return workflow
    if settings.per_stage or settings.min_nodes is not None:
        raise UserError("server_nodes goes with one job of a fixed number of nodes: leave per_stage and min_nodes out")
    for name in settings.server_nodes:
        if name not in workflow.models:
            raise UserError(f"server_nodes: '{name}' is not among `models` ({', '.join(workflow.models)})")
        if workflow.models[name].path is None:
            raise UserError(f"server_nodes: model '{name}' has no `path`; a server starts from a checkpoint")
    if workflow.rollout.engine != "sglang":
        raise UserError("server_nodes: the workflow samples without servers; set rollout.engine: sglang")
    if workflow.rollout.sglang.sync != "disk":
        raise UserError("server_nodes: weights reach other machines with rollout.sglang.sync: disk")
    urls = workflow.rollout.sglang.urls | {name: [_UNKNOWN] for name in settings.server_nodes}
    sglang = workflow.rollout.sglang.model_copy(update={"urls": urls})
    return workflow.model_copy(update={"rollout": workflow.rollout.model_copy(update={"sglang": sglang})})


def servers_per_node(workflow: WorkflowConfig, settings: LaunchConfig) -> int:
    """Servers on one node, each with ``tensor_parallel_size`` of its GPUs."""
    return max(1, (settings.gpus_per_node or 1) // workflow.rollout.sglang.tensor_parallel_size)


def server_script(workflow: WorkflowConfig, python: str, preamble: str) -> str:
    """What srun starts for every server; its arguments are the model's directory and positions."""
    size = workflow.rollout.sglang.tensor_parallel_size
    dtype, further = workflow.precision, shlex.join(workflow.rollout.sglang.arguments)
    return f"""#!/bin/bash
# One SGLang server of {workflow.name}: the directory of its model, then the positions it needs.
{preamble}
trap '' USR1 # the signal before the time limit is for the ranks
export SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1
exec {shlex.quote(python)} -m sglang.launch_server --model-path "$1" --context-length "$2" --dtype {dtype} \\
    --host "$SLURMD_NODENAME" --port $(({PORT} + SLURM_LOCALID)) \\
    --tensor-parallel-size {size} --base-gpu-id $((SLURM_LOCALID * {size})) {further}
"""


def server_lines(workflow: WorkflowConfig, settings: LaunchConfig, script: str, srun: str) -> str:
    """Part of a job's script: which nodes train, servers on the others, and ``urls``, further arguments of s2d."""
    per_node, first = servers_per_node(workflow, settings), settings.nodes
    lines = [
        f"# The first {first} nodes train; servers on the others end with the job.",
        'mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        'nodes() { local IFS=,; echo "${hosts[*]:$1:$2}"; }',
        "urls=() all=()",
        "serve() { # model, directory, positions, first node, number of nodes",
        "    local host list=()",
        f'    {srun} --nodes="$5" --ntasks=$(($5 * {per_node})) --ntasks-per-node={per_node} \\',
        '        --nodelist="$(nodes "$4" "$5")" \\',
        f'        bash {shlex.quote(script)} "$2" "$3" &',
        '    for host in "${hosts[@]:$4:$5}"; do',
        f'        for port in {{{PORT}..{PORT + per_node - 1}}}; do list+=("http://$host:$port"); done',
        "    done",
        '    all+=("${list[@]}")',
        '    urls+=(--set "rollout.sglang.urls.$1=[$(IFS=,; echo "${list[*]}")]")',
        "}",
    ]
    for name, count in settings.server_nodes.items():
        model = workflow.models[name]
        positions = model.resolve().max_position_embeddings + SERVER_SPARE_POSITIONS
        words = [name, str(model.path.absolute()), str(positions), str(first), str(count)]
        lines.append(f"serve {shlex.join(words)}")
        first += count
    seconds = int(workflow.rollout.sglang.start_seconds)
    lines += [
        'for url in "${all[@]}"; do',
        '    until curl --silent --fail --output /dev/null "$url/health"; do',
        f'        [ "$SECONDS" -lt {seconds} ] || {{ echo "no server answers at $url" >&2; exit 1; }}',
        "        sleep 5",
        "    done",
        "done",
    ]
    return "\n".join(lines)
