"""Bash scripts of a launch, as text; settings that a user may edit by hand are near their top. No torch here.

    submit.sh --sbatch--> NN-TASK.sbatch --srun, once a rank--> rank.sh --> s2d run workflow.json --out RUN_DIR
    local.sh --torchrun, once a rank--> s2d run workflow.json --out RUN_DIR

srun starts the ranks directly, without torchrun: torchrun kills ranks 30 seconds after it forwards a signal, which is
too short for a large checkpoint, and hides their exit codes, which say whether a run can resume.
"""

from __future__ import annotations

import shlex

from megatron_s2d.launchers import servers
from megatron_s2d.launchers.config import LaunchConfig
from megatron_s2d.launchers.job import Launch, Task

# 20000 to 31999: below the ephemeral ports of Linux. Jobs that share a head node rarely collide.
MASTER_PORT = "$((20000 + SLURM_JOB_ID % 12000))"


def rank_script(launch: Launch) -> str:
    """Return the script that srun starts for every rank (in the container, if any); its arguments are those of s2d."""
    return f"""#!/bin/bash
# One rank of {launch.workflow.name}: srun starts this once for each process, with the arguments of `s2d`.
{_preamble(launch)}
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
exec {shlex.quote(launch.python)} -m megatron_s2d.cli "$@"
"""


def local_script(launch: Launch) -> str:
    """Return the script that starts a task's ranks here with torchrun; arguments: number of ranks, those of s2d."""
    return f"""#!/bin/bash
# Ranks of {launch.workflow.name} on this machine: their number, then the arguments of `s2d`.
{_preamble(launch)}
processes=$1
shift
exec {shlex.quote(launch.python)} -m torch.distributed.run --standalone --nproc-per-node="$processes" \\
    -m megatron_s2d.cli "$@"
"""


def sbatch_script(launch: Launch, task: Task) -> str:
    """Return the sbatch script of one task."""
    settings = launch.settings
    words = [*srun_words(launch, task), shlex.join(task.arguments)]
    if settings.server_nodes:
        count = task.nodes * task.processes_per_node
        words[1:1] = [f"--nodes={task.nodes} --ntasks={count}", f'--nodelist="$(nodes 0 {task.nodes})"']
        words.append('"${urls[@]}"')
    if settings.min_nodes is not None:
        count = f"$((${{#hosts[@]}} * {task.processes_per_node}))"
        # --overlap: the job step of an attempt that lost a node occupies its slots for a while
        hosts = '--nodelist="$(IFS=,; echo "${hosts[*]}")"'
        words[1:1] = ["--overlap", f'--nodes="${{#hosts[@]}}" --ntasks={count}', hosts]
    command = " \\\n        ".join(words)
    attempts = " ".join(str(number) for number in range(settings.restarts + 1))
    title = f"{launch.workflow.name}, {task.name}: {task.nodes} nodes x {task.processes_per_node} processes"
    return f"""#!/bin/bash
# {title}. Written by `s2d launch slurm`.
{chr(10).join(f"#SBATCH {option}" for option in sbatch_options(launch, task))}

set -uo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT={MASTER_PORT}
export MASTER_ADDR MASTER_PORT

{_servers(launch)}
# Sent by scancel, and by SLURM when it preempts the job, which it then requeues itself.
cancelled=
trap 'cancelled=yes' TERM

# Exit codes of s2d: 0 done, 1 and 2 an error of the user, 130 stopped with a checkpoint on disk (138: by the signal,
# before there was anything to save). Any other code is a crash: the ranks restart from their last checkpoint.
for attempt in {attempts}; do
    {command}
    code=$?
    case $code in 0 | 1 | 2 | 130 | 138) break ;; esac
    [ -z "$cancelled" ] || break
    echo "attempt $attempt: the ranks ended with code $code" >&2
{_survivors(settings)}done
{_requeue(launch)}
exit "$code"
"""


def _survivors(settings: LaunchConfig) -> str:
    """Return the lines between two attempts of an elastic job: keep the nodes that still start a process."""
    if settings.min_nodes is None:
        return ""
    return f"""    survivors=()
    for host in "${{hosts[@]}}"; do
        timeout 60 srun --overlap --nodes=1 --ntasks=1 --nodelist="$host" true && survivors+=("$host")
    done
    hosts=("${{survivors[@]}}")
    echo "nodes left: ${{hosts[*]}}" >&2
    [ "${{#hosts[@]}}" -ge {settings.min_nodes} ] || break
"""


def _servers(launch: Launch) -> str:
    settings = launch.settings
    if settings.min_nodes is not None:
        return 'mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")\n'
    if not settings.server_nodes:
        return ""
    script = str(launch.directory / "server.sh")
    return servers.server_lines(launch.workflow, settings, script, " ".join(["srun", *container_words(launch)])) + "\n"


def server_script(launch: Launch) -> str:
    """Return the script that srun starts for every SGLang server on its separate nodes."""
    return servers.server_script(launch.workflow, launch.settings, launch.python, _preamble(launch))


def _requeue(launch: Launch) -> str:
    if not launch.settings.requeue:
        return ""
    return f"""
case $code in 130 | 138)
    if [ -z "$cancelled" ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {launch.settings.max_requeues} ]; then
        echo "stopped before the time limit: back into the queue" >&2
        scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
"""


def sbatch_options(launch: Launch, task: Task) -> list[str]:
    """Return options of sbatch, quoted for its script lines; those of the user come last and override."""
    settings = launch.settings
    logs = str(launch.directory).replace("%", "%%") + f"/{_file_name(task.name).replace('%', '%%')}-%j.log"
    nodes = task.nodes + sum(settings.server_nodes.values())
    requeue = ["--requeue" if settings.requeue else "--no-requeue"]
    if settings.min_nodes is not None:
        requeue.append("--no-kill")
    values = {
        "job-name": f"{launch.workflow.name}-{task.name}",
        "nodes": nodes,
        "ntasks-per-node": task.processes_per_node,
        "gpus-per-node": task.gpus_per_node or None,
        "cpus-per-task": settings.cpus_per_process,
        "time": settings.time_limit_minutes,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "signal": signal_option(launch),
        "chdir": launch.working_dir,
        "output": logs,
    }
    options = [f"--{name}={shlex.quote(str(value))}" for name, value in values.items() if value is not None]
    return [*options, "--open-mode=append", *requeue, *settings.sbatch]


def signal_option(launch: Launch) -> str:
    """Return the signal that tells ranks to save, and its time: USR1 is sent to job steps, not to the script."""
    return f"USR1@{launch.settings.signal_seconds}"


def srun_words(launch: Launch, task: Task) -> list[str]:
    """Return srun with its options, one quoted word an item, up to the arguments of s2d."""
    settings = launch.settings
    # If one rank is lost the others cannot continue; they get a minute to log the reason.
    words = ["srun", "--wait=60"]
    if settings.cpus_per_process:  # srun does not inherit it from sbatch
        words.append(f"--cpus-per-task={settings.cpus_per_process}")
    words += container_words(launch)
    return [*words, f"bash {shlex.quote(str(launch.directory / 'rank.sh'))}"]


def container_words(launch: Launch) -> list[str]:
    """Return srun's options for the container, if any."""
    container = launch.settings.container
    if container is None:
        return []
    return [
        f"--container-image={shlex.quote(container.image)}",
        f"--container-mounts={shlex.quote(','.join(launch.mounts))}",
        f"--container-workdir={shlex.quote(str(launch.working_dir))}",
    ]


def sbatch_name(number: int, task: Task) -> str:
    """Return the file name of a task's sbatch script."""
    return f"{number:02d}-{_file_name(task.name)}.sbatch"


def submit_script(launch: Launch) -> str:
    """Return the script that submits every task after its dependencies and prints names and job ids."""
    lines, variables = [], {}
    for number, task in enumerate(launch.tasks(), 1):
        variables[task.name] = f"job_{number}"
        depends = ":".join(f"${variables[name]}" for name in task.after)
        options = f'--dependency="afterok:{depends}" --kill-on-invalid-dep=yes ' if depends else ""
        lines.append(f"job_{number}=$(submit {options}{shlex.quote(sbatch_name(number, task))})")
        lines.append(f'echo {shlex.quote(task.name)} "$job_{number}"')
    return f"""#!/bin/bash
# Submits the jobs of {launch.workflow.name} and prints the name and id of each.
set -euo pipefail
cd {shlex.quote(str(launch.directory))}
submit() {{ sbatch --parsable "$@" | cut -d ';' -f 1; }}

{chr(10).join(lines)}
"""


def _preamble(launch: Launch) -> str:
    """Return working directory, environment variables and set-up lines of a rank."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in launch.settings.environment.items()]
    lines = ["set -eo pipefail", f"cd {shlex.quote(str(launch.working_dir))}", *exports, *launch.settings.setup]
    return "\n".join(lines)


def _file_name(task: str) -> str:
    return task.replace("/", "_")
