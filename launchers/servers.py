"""SGLang servers on separate nodes of a SLURM job: the first nodes train, the last ones serve. No torch here.

    NN-TASK.sbatch --srun, once a server--> server.sh --> sglang.launch_server
                   --srun, once a rank----> rank.sh   --> s2d run ... --set rollout.sglang.urls.MODEL=[...]

Servers start with a model's published weights and receive the trained ones from the trainer, which verifies them.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from megatron_s2d.config.lora import server_arguments
from megatron_s2d.config.training import SERVER_SPARE_POSITIONS
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError
from megatron_s2d.launchers.config import LaunchConfig

PORT = 30000
_RENDEZVOUS_PORT = 29400  # of the nodes of one server
_UNKNOWN = "http://set-by-the-job:30000"


def with_servers(workflow: WorkflowConfig, settings: LaunchConfig) -> WorkflowConfig:
    """Return ``workflow`` with the job's servers as its servers; ``UserError`` for models that cannot be served."""
    if not settings.server_nodes:
        return workflow
    if settings.per_stage or settings.min_nodes is not None:
        raise UserError("server_nodes needs one job with a fixed number of nodes: leave per_stage and min_nodes out")
    for name in settings.server_nodes:
        if name not in workflow.models:
            raise UserError(f"server_nodes: '{name}' is not among `models` ({', '.join(workflow.models)})")
        if workflow.models[name].path is None:
            raise UserError(f"server_nodes: model '{name}' has no `path`; a server starts from a checkpoint")
    if workflow.rollout.engine != "sglang":
        raise UserError("server_nodes: the workflow samples without servers; set rollout.engine: sglang")
    if workflow.rollout.sglang.weight_sync == "tensor":
        raise UserError(
            "server_nodes: weights reach other machines with rollout.sglang.weight_sync: disk or distributed"
        )
    span = nodes_per_server(workflow, settings)
    for name, count in settings.server_nodes.items():
        if count % span:
            raise UserError(
                f"server_nodes: a server of '{name}' takes {span} nodes "
                f"({workflow.rollout.sglang.tensor_parallel_size} GPUs, {settings.gpus_per_node} a node), "
                f"and {count} is not a multiple of that"
            )
    urls = workflow.rollout.sglang.urls | {name: [_UNKNOWN] for name in settings.server_nodes}
    sglang = workflow.rollout.sglang.model_copy(update={"urls": urls})
    return workflow.model_copy(update={"rollout": workflow.rollout.model_copy(update={"sglang": sglang})})


def servers_per_node(workflow: WorkflowConfig, settings: LaunchConfig) -> int:
    """Return the number of servers on one node, each with ``tensor_parallel_size`` of its GPUs."""
    return max(1, (settings.gpus_per_node or 1) // workflow.rollout.sglang.tensor_parallel_size)


def nodes_per_server(workflow: WorkflowConfig, settings: LaunchConfig) -> int:
    """Return the nodes of one server: more than one if its ``tensor_parallel_size`` exceeds the GPUs of a node.

    Raises ``UserError`` if the ranks of a server do not fill its nodes.
    """
    size, gpus = workflow.rollout.sglang.tensor_parallel_size, settings.gpus_per_node or 1
    if size > gpus and size % gpus:
        raise UserError(
            f"server_nodes: rollout.sglang.tensor_parallel_size {size} is not a multiple of the {gpus} GPUs of a node"
        )
    return max(1, size // gpus)


def server_script(workflow: WorkflowConfig, settings: LaunchConfig, python: str, preamble: str) -> str:
    """Return the script that srun starts on each node of a server: model, positions, first node, file of the key."""
    size, span = workflow.rollout.sglang.tensor_parallel_size, nodes_per_server(workflow, settings)
    nodes = f'--nnodes {span} --node-rank "$SLURM_NODEID" --dist-init-addr "$3:{_RENDEZVOUS_PORT}"' if span > 1 else ""
    dtype, further = workflow.precision, shlex.join([*_lora_arguments(workflow), *workflow.rollout.sglang.extra_args])
    return f"""#!/bin/bash
# An SGLang server of {workflow.name}; arguments: model directory, context length, first node, file with its API key.
{preamble}
trap '' USR1 # the signal before the time limit is meant for the ranks
export SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1
exec {shlex.quote(python)} -m megatron_s2d.rollout.sglang.with_api_key "$4" sglang.launch_server \\
    --model-path "$1" --context-length "$2" --dtype {dtype} \\
    --host "$SLURMD_NODENAME" --port $(({PORT} + SLURM_LOCALID)) \\
    --tensor-parallel-size {size} --base-gpu-id $((SLURM_LOCALID * {size})) {nodes} {further}
"""


def _lora_arguments(workflow: WorkflowConfig) -> list[str]:
    """Return the arguments of servers that load the adapters of the workflow's stages; none if they get merged ones."""
    loras = [stage.lora for stage in workflow.stages.values() if getattr(stage, "lora", None) is not None]
    return server_arguments(loras) if loras and workflow.rollout.sglang.lora_sync == "adapter" else []


def server_lines(workflow: WorkflowConfig, settings: LaunchConfig, script: str, srun: str) -> str:
    """Return the part of a job's script that starts servers on the last nodes and sets ``urls``, arguments of s2d."""
    per_node, first, span = servers_per_node(workflow, settings), settings.nodes, nodes_per_server(workflow, settings)
    lines = [
        f"# The first {first} nodes train; servers on the others end with the job.",
        'mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        'nodes() { local IFS=,; echo "${hosts[*]:$1:$2}"; }',
        *_api_key_lines(workflow, script),
        "all=()",
        """quoted=${key//"'"/"''"} # as YAML writes it""",
        """urls=(--set "rollout.sglang.api_key_file='$quoted'")""",
        "serve() { # model, directory, positions, first node, number of nodes",
        "    local node port list=()",
        f"    for ((node = $4; node < $4 + $5; node += {span})); do",
        f"        {srun} --nodes={span} --ntasks={span * per_node} --ntasks-per-node={per_node} \\",
        f'            --nodelist="$(nodes "$node" {span})" \\',
        f'            bash {shlex.quote(script)} "$2" "$3" "${{hosts[node]}}" "$key" &',
        f'        for port in {{{PORT}..{PORT + per_node - 1}}}; do list+=("http://${{hosts[node]}}:$port"); done',
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
    seconds = int(workflow.rollout.sglang.startup_timeout_seconds)
    lines += [
        'for url in "${all[@]}"; do',
        '    until curl --silent --fail --output /dev/null "$url/health"; do',
        f'        [ "$SECONDS" -lt {seconds} ] || {{ echo "no server answers at $url" >&2; exit 1; }}',
        "        sleep 5",
        "    done",
        "done",
    ]
    return "\n".join(lines)


def _api_key_lines(workflow: WorkflowConfig, script: str) -> list[str]:
    """Return lines that set ``key``: the file with the API key of the job's servers, by default one of its own."""
    own = workflow.rollout.sglang.api_key_file
    if own is not None:
        return [f"key={shlex.quote(str(own.absolute()))}"]
    return [
        "# The servers listen on the network: they answer requests with the key in this file only.",
        f'key={shlex.quote(str(Path(script).parent))}/api-key-"$SLURM_JOB_ID"',
        'rm -f "$key"',
        "(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \\n' >\"$key\")",
        "trap 'rm -f \"$key\"' EXIT",
    ]
