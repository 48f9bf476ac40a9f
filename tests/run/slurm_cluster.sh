#!/bin/bash
# A SLURM of some nodes on one machine, to try launchers on: slurmctld, a slurmd for each node, munged. Needs root and
# the packages (on Debian: apt-get install slurm-wlm munge). No accounting, no cgroups: jobs get CPUs by count only.
#
#   slurm_cluster.sh up DIR [PORT [NODES]]               # 2 nodes by default; state, logs and slurm.conf lie in DIR
#   export SLURM_CONF=DIR/slurm.conf
#   slurm_cluster.sh start DIR NODE | kill DIR NODE      # one node's daemon: kill loses its jobs, as a power cut does
#   slurm_cluster.sh down DIR
#
# The partition `main` runs jobs of up to an hour; those of `urgent` requeue main's when they need the nodes.
set -euo pipefail

usage() { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
action=$1 directory=$(mkdir -p "$2" && cd "$2" && pwd)
config=$directory/slurm.conf
hosts_mark="# slurm_cluster.sh"
export SLURM_CONF=$config

need() {
    for program in slurmctld slurmd munged munge scontrol sbatch; do
        PATH=$PATH:/usr/sbin command -v "$program" >/dev/null || { echo "$program is not installed" >&2; exit 3; }
    done
    [ "$(id -u)" = 0 ] || { echo "root is needed to start SLURM's daemons" >&2; exit 3; }
}

pid_of() { cat "$directory/$1.pid" 2>/dev/null || true; }
runs() { [ -n "$(pid_of "$1")" ] && kill -0 "$(pid_of "$1")" 2>/dev/null; }

start_node() {
    mkdir -p "$directory/spool/$1"
    PATH=$PATH:/usr/sbin slurmd -N "$1" -f "$config"
}

# The daemon, the step daemons, so that they report nothing, and all processes of the node's jobs.
kill_node() {
    local pid parent processes
    pid=$(pid_of "slurmd.$1")
    [ -z "$pid" ] || kill -9 "$pid" 2>/dev/null || true
    processes=$(processes_of "$1")
    for pid in $processes; do
        parent=$(ps -o ppid= -p "$pid" || true)
        if [ -n "$parent" ] && [ "$(ps -o comm= -p "$parent")" = slurmstepd ]; then kill -9 "$parent" || true; fi
    done
    for pid in $processes; do kill -9 "$pid" 2>/dev/null || true; done
}

processes_of() {
    local found
    found=$(grep -lzx "SLURMD_NODENAME=$1" /proc/[0-9]*/environ 2>/dev/null || true)
    [ -z "$found" ] || grep -lzxF "SLURM_CONF=$config" $found 2>/dev/null | cut -d / -f 3 || true
}

# The names of the nodes, from the file of the cluster.
nodes() { sed -n 's/^NodeName=\(node[0-9]*\) .*/\1/p' "$config"; }

munge_up() {
    munge -n >/dev/null 2>&1 && return
    mkdir -p /run/munge /var/log/munge /var/lib/munge
    chown munge: /run/munge /var/log/munge /var/lib/munge
    chmod 755 /run/munge
    if [ ! -s /etc/munge/munge.key ]; then
        dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 status=none
        chown munge: /etc/munge/munge.key
        chmod 400 /etc/munge/munge.key
    fi
    runuser -u munge -- /usr/sbin/munged
    touch "$directory/munged"
}

write_config() {
    local host port=$1 count=$2 number node
    host=$(hostname -s)
    mkdir -p "$directory/state" "$directory/log"
    cat >"$config" <<END
ClusterName=s2d
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=15
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EnforcePartLimits=ALL
ReturnToService=2
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd.%n.pid
SlurmdSpoolDir=$directory/spool/%n
StateSaveLocation=$directory/state
SlurmctldLogFile=$directory/log/slurmctld.log
SlurmdLogFile=$directory/log/slurmd.%n.log
SlurmctldTimeout=30
SlurmdTimeout=10
HealthCheckInterval=0
KillWait=30
MinJobAge=3600
Waittime=0
SlurmdParameters=config_overrides
END
    for number in $(seq "$count"); do
        node=node$number
        echo "NodeName=$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + number)) CPUs=4 RealMemory=4000" >>"$config"
        # `scontrol show hostnames` gives names that ranks must be able to look up.
        grep -q "^127.0.0.1 $node " /etc/hosts || echo "127.0.0.1 $node $hosts_mark" >>/etc/hosts
    done
    cat >>"$config" <<END
PartitionName=main Nodes=node[1-$count] Default=YES MaxTime=60 State=UP PriorityTier=1
PartitionName=urgent Nodes=node[1-$count] MaxTime=60 State=UP PriorityTier=2
END
}

up() {
    need
    munge_up
    write_config "$1" "$2"
    PATH=$PATH:/usr/sbin slurmctld -c -f "$config"
    for node in $(nodes); do start_node "$node"; done
    for _ in $(seq 240); do
        [ "$(sinfo --noheader --format %T 2>/dev/null | sort -u)" = idle ] && { sinfo; return; }
        sleep 0.5
    done
    echo "the nodes did not come up; see $directory/log" >&2
    exit 1
}

down() {
    scancel --user=root 2>/dev/null || true
    for _ in $(seq 20); do  # step daemons end with their jobs
        [ -n "$(squeue --noheader 2>/dev/null)" ] || break
        sleep 0.5
    done
    for node in $(nodes); do kill_node "$node"; done
    if runs slurmctld; then kill "$(pid_of slurmctld)"; fi
    for _ in $(seq 60); do
        runs slurmctld || break
        sleep 0.5
    done
    if runs slurmctld; then kill -9 "$(pid_of slurmctld)"; fi
    if [ -e "$directory/munged" ]; then kill "$(cat /run/munge/munged.pid)" && rm "$directory/munged"; fi
    # Written in place: in a container the file is a mount that cannot be replaced.
    others=$(grep -v "$hosts_mark\$" /etc/hosts || true)
    echo "$others" >/etc/hosts
}

case $action in
    up) up "${3:-16817}" "${4:-2}" ;;
    down) down ;;
    start) start_node "${3:?a node}" ;;
    kill) kill_node "${3:?a node}" ;;
    *) usage ;;
esac
