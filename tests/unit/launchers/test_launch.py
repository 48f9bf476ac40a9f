"""Files that ``s2d launch`` writes, and the behaviour of its scripts with stubs for the programs that they call."""

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_s2d.cli import main
from megatron_s2d.config.base import apply_overrides
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.errors import UserError
from megatron_s2d.launchers.config import LaunchConfig, load_launch, resolve

ROOT = Path(__file__).resolve().parents[3]
SMOKE = ROOT / "configs" / "smoke.yaml"
TWO_RANKS = ["--set", "parallel.data_parallel_size=2"]


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """A working directory whose name needs quoting."""
    directory = tmp_path / "it's $HOME a 100% place"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


def dry_run(launcher: str, *arguments: str) -> Path:
    """Run with --dry-run and return the directory that it writes."""
    assert main(["launch", launcher, str(SMOKE), "--out", "my run", "--dry-run", *arguments]) == 0
    (directory,) = Path("my run/launch").iterdir()
    return directory.absolute()


def log_calls(path: Path) -> str:
    """Bash that appends its arguments, each followed by a bar, to ``path``: one write a line (parallel calls)."""
    return f'line=$(printf "%s|" "$@"); echo "$line" >>{shlex.quote(str(path))}'


def wait_for_calls(path: Path, word: str, count: int) -> str:
    """Bash that waits (10 s at most) until ``count`` lines of ``path`` contain ``word``."""
    enough = f"$(grep -c {word} {shlex.quote(str(path))}) -ge {count}"
    return f"for _ in $(seq 200); do [ {enough} ] && break; sleep 0.05; done"


def program(folder: Path, name: str, body: str) -> Path:
    """Write an executable bash script."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def run_script(path: Path, *arguments: str, bin_dir: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {"PATH": f"{bin_dir}:{os.environ['PATH']}", **variables}
    return subprocess.run(["bash", str(path), *arguments], env=environment, capture_output=True, text=True, timeout=60)


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_elastic_job_continues_on_the_remaining_nodes(workdir):
    directory = dry_run("slurm", "--nodes", "2", *TWO_RANKS, "--cluster-set", "min_nodes=1")
    text = (directory / "01-run.sbatch").read_text()
    assert "#SBATCH --nodes=2\n" in text and "#SBATCH --no-kill\n" in text and "--elastic" in text
    calls = shlex.quote(str(workdir / "calls"))
    program(workdir / "bin", "scontrol", "printf 'a\\nb\\n'")
    # The first start of the ranks fails, and node b no longer responds.
    cases = f"*rank.sh*) [ $(wc -l <{calls}) -gt 1 ] || exit 3 ;; *nodelist=b*) exit 1 ;;"
    body = f'echo "$@" >>{calls}; case "$*" in {cases} esac'
    program(workdir / "bin", "srun", body)
    done = run_script(
        directory / "01-run.sbatch", bin_dir=workdir / "bin", SLURM_JOB_NODELIST="n[1-2]", SLURM_JOB_ID="7"
    )
    assert done.returncode == 0 and "nodes left: a\n" in done.stderr, done.stderr
    starts = [line for line in (workdir / "calls").read_text().splitlines() if "rank.sh" in line]
    assert "--nodes=2 --ntasks=2 --nodelist=a,b " in starts[0] and "--nodes=1 --ntasks=1 --nodelist=a " in starts[1]
    workflow = load_workflow(SMOKE, ["parallel={tensor_model_parallel_size: 2, data_parallel_size: 2}"])
    with pytest.raises(UserError, match="1 ranks are not a multiple of the"):
        resolve(LaunchConfig(nodes=4, min_nodes=1), workflow)
    with pytest.raises(UserError, match="min_nodes 5 is above the 4 nodes"):
        resolve(LaunchConfig(nodes=4, min_nodes=5), workflow)


def test_dry_run_writes_scripts_and_configuration_only(workdir):
    directory = dry_run("slurm", "--nodes", "2", *TWO_RANKS, "--per-stage")
    assert all(name.startswith("my run/launch/") for name in files(workdir))
    for script in [*directory.glob("*.sh"), *directory.glob("*.sbatch")]:
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0, script
    # What a rank reads is the resolved workflow, overrides included.
    assert load_workflow(directory / "workflow.json") == load_workflow(SMOKE, ["parallel.data_parallel_size=2"])
    settings = json.loads((directory / "launch.json").read_text())
    assert (settings["nodes"], settings["processes_per_node"], settings["gpus_per_node"]) == (2, 1, 1)
    stages = {
        name.removeprefix("resolved/stages/").removesuffix(".json") for name in files(directory) if "/stages/" in name
    }
    processes = {task["name"]: task for task in json.loads((directory / "processes.json").read_text())}
    assert set(processes) == {*stages, "report"}
    assert processes["opd"]["after"] == ["forward_kl", "rl_teacher"] and processes["opd"]["command"][-1] == "opd"
    assert [rank["node"] for rank in processes["opd"]["ranks"]] == [0, 1]
    assert [rank["node"] for rank in processes["report"]["ranks"]] == [0]
    assert json.loads((directory / "resolved/stages/opd.json").read_text())["config"]["stage"]["steps"] == 6


def test_launch_directory_is_named_by_content(workdir):
    first = dry_run("slurm", "--nodes", "2", *TWO_RANKS)
    before = {name: (first / name).read_bytes() for name in files(first)}
    assert dry_run("slurm", "--nodes", "2", *TWO_RANKS) == first
    assert main(["launch", "slurm", str(SMOKE), "--out", "my run", "--dry-run", "--set", "seed=5"]) == 0
    assert len(list(Path("my run/launch").iterdir())) == 2
    assert {name: (first / name).read_bytes() for name in files(first)} == before


def options_of(script: Path) -> dict[str, str]:
    lines = re.findall(r"^#SBATCH (.*)$", script.read_text(), re.MULTILINE)
    pairs = [shlex.split(line)[0].partition("=") for line in lines]
    return {name: value for name, _, value in pairs}


def test_job_requests_the_options_of_the_cluster_file(workdir):
    (workdir / "cluster.yaml").write_text(
        "{time_limit_minutes: 90, partition: batch, account: a1, qos: high, constraint: h200, cpus_per_process: 8, "
        "signal_seconds: 600, sbatch: [--mem=0], container: {image: 'registry#image:1', mounts: ['/data:/data:ro']}}"
    )
    directory = dry_run("slurm", "--cluster", "cluster.yaml", *TWO_RANKS, "--cluster-set", "partition=main")
    options = options_of(directory / "01-run.sbatch")
    expected = {"--time": "90", "--partition": "main", "--account": "a1", "--qos": "high", "--constraint": "h200"}
    expected |= {"--nodes": "1", "--ntasks-per-node": "2", "--gpus-per-node": "2", "--cpus-per-task": "8"}
    expected |= {"--signal": "USR1@600", "--mem": "0", "--requeue": "", "--chdir": str(workdir)}
    assert options.items() >= expected.items()
    assert options["--output"] == str(directory).replace("%", "%%") + "/run-%j.log"
    bin_dir = workdir / "bin"
    program(bin_dir, "scontrol", "echo head; echo other")
    program(bin_dir, "srun", 'printf "%s\\n" "$MASTER_ADDR" "$MASTER_PORT" "$@"')
    done = run_script(directory / "01-run.sbatch", bin_dir=bin_dir, SLURM_JOB_ID="7", SLURM_JOB_NODELIST="x")
    run_dir = workdir / "my run"
    assert done.stdout.splitlines() == [
        "head", "20007", "--wait=60", "--cpus-per-task=8", "--container-image=registry#image:1",
        f"--container-mounts={workdir}:{workdir},{run_dir}:{run_dir},/data:/data:ro", f"--container-workdir={workdir}",
        "bash", f"{directory}/rank.sh", "run", f"{directory}/workflow.json", "--out", str(run_dir),
    ]  # fmt: skip


def test_unmountable_path_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    container = ["--cluster-set", "container={image: x}"]
    assert main(["launch", "slurm", str(SMOKE), "--out", "a:b", "--dry-run", *container]) == 1
    assert "cannot be mounted" in capsys.readouterr().err


def test_rank_gets_its_directory_variables_and_arguments(workdir):
    python = program(
        workdir / "bin", "my python", 'printf "%s\\n" "$PWD" "$RANK/$WORLD_SIZE/$LOCAL_RANK" "$A" "$B" "$@"'
    )
    settings = {"python": str(python), "environment": {"A": "it's"}, "setup": ["export B='$HOME'"]}
    (workdir / "cluster.yaml").write_text(json.dumps(settings))
    directory = dry_run("slurm", "--cluster", "cluster.yaml")
    variables = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
    done = run_script(directory / "rank.sh", "run", "a b", bin_dir=workdir / "bin", **variables)
    assert done.stdout.splitlines() == [str(workdir), "3/4/1", "it's", "$HOME", "-m", "megatron_s2d.cli", "run", "a b"]


@pytest.mark.parametrize(
    ("codes", "restarted", "expected", "starts", "requeued"),
    [
        ("0", 0, 0, 1, False),
        ("1", 0, 1, 1, False),  # an error of the user
        ("3 0", 0, 0, 2, False),  # a crash, then success
        ("137 3 139", 0, 139, 3, False),
        ("130", 0, 130, 1, True),
        ("137 138", 4, 138, 2, True),
        ("130", 5, 130, 1, False),  # max_requeues
    ],
)
def test_exit_codes_decide_restart_and_requeue(workdir, codes, restarted, expected, starts, requeued):
    directory = dry_run("slurm", "--cluster-set", "max_requeues=5")
    bin_dir = workdir / "bin"
    (workdir / "codes").write_text(codes.replace(" ", "\n") + "\n")
    program(
        bin_dir,
        "srun",
        f"cd {shlex.quote(str(workdir))}; echo start; code=$(head -1 codes); sed -i 1d codes; exit $code",
    )
    program(bin_dir, "scontrol", '[ "$1" = show ] && echo head || echo "$@"')
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x", "SLURM_RESTART_COUNT": str(restarted)}
    done = run_script(directory / "01-run.sbatch", bin_dir=bin_dir, **variables)
    assert done.returncode == expected
    assert done.stdout.splitlines() == ["start"] * starts + ["requeue 7"] * requeued


def test_cancelled_job_is_not_requeued(workdir):
    directory = dry_run("slurm")
    program(workdir / "bin", "srun", "kill -TERM $PPID; exit 130")
    program(workdir / "bin", "scontrol", '[ "$1" = show ] && echo head || echo "$@"')
    done = run_script(directory / "01-run.sbatch", bin_dir=workdir / "bin", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="x")
    assert done.returncode == 130 and "requeue" not in done.stdout


def test_stages_are_submitted_after_their_inputs(workdir, monkeypatch, capsys):
    counter = shlex.quote(str(workdir / "count"))
    body = f'echo "$@" >>{counter}; echo "$((100 + $(wc -l <{counter})));cluster"'
    program(workdir / "bin", "sbatch", body)
    monkeypatch.setenv("PATH", f"{workdir / 'bin'}:{os.environ['PATH']}")
    assert main(["launch", "slurm", str(SMOKE), "--out", "my run", "--per-stage"]) == 0
    shown = capsys.readouterr().out
    numbers = dict(re.findall(r"^(\S+): job (\d+)$", shown, re.MULTILINE))
    assert list(numbers) == [
        "teacher_base", "student_base", "rl_teacher", "cache", "forward_kl", "opd", "stage3", "student_grpo",
        "tool_grpo", "report",
    ]  # fmt: skip
    calls = {
        line.split()[-1].partition("-")[2].removesuffix(".sbatch"): line
        for line in (workdir / "count").read_text().splitlines()
    }
    after = f"afterok:{numbers['forward_kl']}:{numbers['rl_teacher']} "
    assert after in calls["opd"] and "--kill-on-invalid-dep=yes" in calls["opd"]
    assert "dependency" not in calls["teacher_base"]
    assert all(number in calls["report"] for name, number in numbers.items() if name != "report")


@pytest.fixture
def served(workdir) -> Path:
    """A workflow that samples from servers of a model with a checkpoint."""
    write_tiny_checkpoint(workdir / "my model")
    document = {
        "defaults": str(SMOKE),
        "models": {"student": {"path": "my model"}},
        "arms": {"direct": "student_grpo"},
        "contrasts": [],
        "max_parallel_stages": 1,
        "rollout": {
            "engine": "sglang",
            "sglang": {"tensor_parallel_size": 2, "extra_args": ["--mem-fraction-static", "0.8"]},
        },
    }
    path = workdir / "served.yaml"
    path.write_text(json.dumps(document))
    return path


def write_tiny_checkpoint(directory: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from megatron_s2d.config.hf_config import hf_config_from_spec
    from megatron_s2d.config.model import ModelConfig
    from megatron_s2d.models.families import hf_tensor_shapes

    spec = ModelConfig(preset="tiny-student", vocab_size=25).resolve()
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf_config_from_spec(spec, "float32")))
    save_file({name: torch.zeros(shape) for name, shape in hf_tensor_shapes(spec)}, directory / "model.safetensors")


def test_servers_run_on_separate_nodes(workdir, served):
    """The job's script with stubs for srun and scontrol: what starts on which node, and the addresses for the run."""
    arguments = ["--cluster-set", "server_nodes={student: 2}", "--cluster-set", "gpus_per_node=4"]
    assert main(["launch", "slurm", str(served), "--out", "run", "--dry-run", *arguments]) == 0
    (directory,) = Path("run/launch").iterdir()
    script = directory.absolute() / "01-run.sbatch"
    assert "#SBATCH --nodes=3\n" in script.read_text()
    program(workdir / "bin", "scontrol", "printf 'a\\nb\\nc\\n'")
    started = wait_for_calls(workdir / "calls", "server.sh", 2)  # as servers answer only then
    program(workdir / "bin", "srun", log_calls(workdir / "calls"))
    program(workdir / "bin", "curl", f'{started}; echo "curl ${{@: -1}}" >>{shlex.quote(str(workdir / "calls"))}')
    done = run_script(script, bin_dir=workdir / "bin", SLURM_JOB_NODELIST="n[1-3]", SLURM_JOB_ID="7")
    assert done.returncode == 0, done.stderr
    calls = (workdir / "calls").read_text().splitlines()
    serving = [line for line in calls if "server.sh" in line]
    (training,) = [line for line in calls if "rank.sh" in line]
    for line, node in zip(sorted(serving), "bc", strict=True):
        assert f"--nodes=1|--ntasks=2|--ntasks-per-node=2|--nodelist={node}|" in line
        assert f"{workdir / 'my model'}|520|{node}|{directory.absolute()}/api-key-7|" in line
    assert "--nodes=1 --ntasks=1".replace(" ", "|") in training and "--nodelist=a|" in training
    (key_file,) = [word for word in training.split("|") if word.startswith("rollout.sglang.api_key_file=")]
    read = apply_overrides({}, [key_file])["rollout"]["sglang"]
    assert read == {"api_key_file": f"{directory.absolute()}/api-key-7"}
    addresses = ",".join(f"http://{host}:{port}" for host in "bc" for port in (30000, 30001))
    assert f"--set|rollout.sglang.urls.student=[{addresses}]|" in training
    waited = [line for line in calls if line.startswith("curl ")]
    assert waited == [f"curl {address}/health" for address in addresses.split(",")]
    assert calls.index(training) > calls.index(waited[-1])
    program(workdir / "bin", "my python", 'printf "%s\n" "$@"')
    text = (directory / "server.sh").read_text()
    assert '--host "$SLURMD_NODENAME"' in text and "--mem-fraction-static 0.8" in text and "trap '' USR1" in text
    assert subprocess.run(["bash", "-n", directory / "server.sh"]).returncode == 0


def test_servers_of_a_job_have_a_key_that_only_its_user_reads(workdir, served):
    """The key is in a file while the job runs, and on no command line."""
    arguments = ["--cluster-set", "server_nodes={student: 1}", "--cluster-set", "gpus_per_node=2"]
    assert main(["launch", "slurm", str(served), "--out", "run", "--dry-run", *arguments]) == 0
    (directory,) = Path("run/launch").iterdir()
    key = directory / "api-key-7"
    key.write_text("of the job's last start")
    key.chmod(0o644)
    program(workdir / "bin", "scontrol", "printf 'a\\nb\\n'")
    seen = shlex.quote(str(workdir / "seen"))
    line = """printf '%s %s\\n' "$(cat run/launch/*/api-key-7)" "$(stat -c %a run/launch/*/api-key-7)\""""
    program(workdir / "bin", "srun", f"{log_calls(workdir / 'calls')}; {line} >>{seen}")  # one write: two run at once
    program(workdir / "bin", "curl", wait_for_calls(workdir / "calls", "server.sh", 1))
    script = directory.absolute() / "01-run.sbatch"
    done = run_script(script, bin_dir=workdir / "bin", SLURM_JOB_NODELIST="n[1-2]", SLURM_JOB_ID="7")
    assert done.returncode == 0, done.stderr
    (value,) = {line.split()[0] for line in (workdir / "seen").read_text().splitlines()}
    assert re.fullmatch("[0-9a-f]{64}", value)
    assert {line.split()[1] for line in (workdir / "seen").read_text().splitlines()} == {"600"}
    assert value not in (workdir / "calls").read_text() + done.stdout + done.stderr + script.read_text()
    assert not key.exists()
    text = (directory / "server.sh").read_text()
    assert '-m megatron_s2d.rollout.sglang.with_api_key "$4" sglang.launch_server' in text


def test_servers_of_a_job_take_the_key_of_the_workflow(workdir, served):
    (workdir / "own key").write_text("abc")
    arguments = ["--cluster-set", "server_nodes={student: 1}", "--cluster-set", "gpus_per_node=2"]
    arguments += ["--set", "rollout.sglang.api_key_file=own key"]
    assert main(["launch", "slurm", str(served), "--out", "run", "--dry-run", *arguments]) == 0
    (script,) = Path("run/launch").glob("*/01-run.sbatch")
    assert f"key={shlex.quote(f'{workdir}/own key')}\n" in script.read_text()
    assert "urandom" not in script.read_text()


def test_server_spans_nodes(workdir, served):
    """Two servers of two nodes each: every node has its rank; the address is that of the first node."""
    arguments = ["--cluster-set", "server_nodes={student: 4}", "--cluster-set", "gpus_per_node=2"]
    arguments += ["--set", "rollout.sglang.tensor_parallel_size=4"]
    assert main(["launch", "slurm", str(served), "--out", "run", "--dry-run", *arguments]) == 0
    (directory,) = Path("run/launch").iterdir()
    program(workdir / "bin", "scontrol", "printf 'a\\nb\\nc\\nd\\ne\\n'")
    program(workdir / "bin", "srun", log_calls(workdir / "calls"))
    program(workdir / "bin", "curl", wait_for_calls(workdir / "calls", "server.sh", 2))
    script = directory.absolute() / "01-run.sbatch"
    done = run_script(script, bin_dir=workdir / "bin", SLURM_JOB_NODELIST="n[1-5]", SLURM_JOB_ID="7")
    assert done.returncode == 0, done.stderr
    lines = (workdir / "calls").read_text().splitlines()
    serving = sorted(line for line in lines if "server.sh" in line)
    for line, nodes in zip(serving, ("b,c", "d,e"), strict=True):
        assert f"--nodes=2|--ntasks=2|--ntasks-per-node=1|--nodelist={nodes}|" in line
        assert f"|520|{nodes[0]}|" in line and line.endswith("/api-key-7|")
    (training,) = [line for line in lines if "rank.sh" in line]
    assert "--set|rollout.sglang.urls.student=[http://b:30000,http://d:30000]|" in training
    text = (directory / "server.sh").read_text()
    assert "--tensor-parallel-size 4 " in text and '--nnodes 2 --node-rank "$SLURM_NODEID"' in text
    assert '--dist-init-addr "$3:29400"' in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["--cluster-set", "server_nodes={student: 3}", "--cluster-set", "gpus_per_node=1"],
            "a server of 'student' takes 2 nodes (2 GPUs, 1 a node), and 3 is not a multiple",
        ),
        (
            ["--cluster-set", "server_nodes={student: 1}", "--set", "rollout.sglang.weight_sync=tensor"],
            "disk or distributed",
        ),
        (["--cluster-set", "server_nodes={teacher: 1}"], "model 'teacher' has no `path`"),
        (["--cluster-set", "server_nodes={pupil: 1}"], "'pupil' is not among `models`"),
        (["--cluster-set", "server_nodes={student: 1}", "--set", "rollout.engine=megatron"], "samples without servers"),
        (["--cluster-set", "server_nodes={student: 1}", "--per-stage"], "leave per_stage and min_nodes out"),
    ],
)
def test_invalid_server_nodes_are_errors(workdir, served, changes, message, capsys):
    assert main(["launch", "slurm", str(served), "--out", "run", "--dry-run", *changes]) == 1
    assert message in capsys.readouterr().err and not Path("run").exists()


def test_sweep_submits_a_job_for_every_point(workdir, monkeypatch, capsys):
    counter = shlex.quote(str(workdir / "count"))
    program(workdir / "bin", "sbatch", f'echo "$@" >>{counter}; echo "$((100 + $(wc -l <{counter})))"')
    monkeypatch.setenv("PATH", f"{workdir / 'bin'}:{os.environ['PATH']}")
    grid = {"labels": {"key": "data.pool.num_prompts", "values": [64, 128]}}
    Path("sweep.yaml").write_text(json.dumps({"name": "two", "workflow": str(SMOKE), "grid": grid}))
    assert main(["sweep", "sweep.yaml", "--submit", "--cluster-set", "partition=small", "--out", "out"]) == 0
    shown = capsys.readouterr().out
    assert "run: job 101" in shown and "run: job 102" in shown and "--collect" in shown
    scripts = sorted(Path("out").glob("*/launch/*/01-run.sbatch"))
    assert [path.parts[1] for path in scripts] == ["labels-128_seed-1", "labels-64_seed-1"]
    assert all("--partition=small" in path.read_text() for path in scripts)
    assert main(["sweep", "sweep.yaml", "--collect", "--out", "out"]) == 1
    assert "not finished" in capsys.readouterr().out + Path("out/results.md").read_text()


def test_sbatch_rejection_is_a_one_line_error(workdir, monkeypatch, capsys):
    program(workdir / "bin", "sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{workdir / 'bin'}:{os.environ['PATH']}")
    assert main(["launch", "slurm", str(SMOKE), "--out", "my run"]) == 1
    assert capsys.readouterr().err == "error: sbatch rejected a job: sbatch: error: invalid partition\n"


def test_local_script_starts_torchrun(workdir):
    python = program(workdir / "bin", "python", 'printf "%s\\n" "$@"')
    overrides = ["--cluster-set", f"python={json.dumps(str(python))}"]
    (workdir / "cluster.yaml").write_text("{nodes: 4, per_stage: true, partition: batch}")  # not used by local
    directory = dry_run("local", "--cluster", "cluster.yaml", "--processes-per-node", "2", *TWO_RANKS, *overrides)
    assert [task["name"] for task in json.loads((directory / "processes.json").read_text())] == ["run"]
    done = run_script(directory / "local.sh", "2", "run", "x y", bin_dir=workdir / "bin")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert done.stdout.splitlines() == [*torchrun, "-m", "megatron_s2d.cli", "run", "x y"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slurm", "--nodes", "3"], "3 nodes x 1 processes are 3 ranks, but the workflow's layout takes 1: add "
         "--set parallel.data_parallel_size=3"),
        (["slurm", "--nodes", "0"], "nodes: "),
        (["local", "--nodes", "2", *TWO_RANKS], "local means one node"),
        (["slurm", "--cluster", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["slurm", "--cluster-set", "partitoin=x"], "did you mean 'partition'"),
        (["slurm", "--cluster-set", "time_limit_minutes=5"], "signal_seconds 300 is not below the time limit"),
        (["slurm", "--cluster-set", "sbatch=[mem=0]"], "not an option"),
        (["slurm", "--cluster-set", "environment={A-B: x}"], "environment"),
        (["slurm", "--set", "stages.opd.stpes=3"], "did you mean 'steps'"),
    ],
)  # fmt: skip
def test_errors_are_raised_before_anything_is_written(workdir, capsys, arguments, message):
    launcher, *others = arguments
    assert main(["launch", launcher, str(SMOKE), "--out", "my run", *others]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not Path("my run").exists()


def test_processes_and_gpus_default_to_the_layout():
    workflow = load_workflow(SMOKE, ["parallel.data_parallel_size=4"])
    resolved = resolve(LaunchConfig(nodes=2), workflow)
    assert (resolved.nodes, resolved.processes_per_node, resolved.gpus_per_node) == (2, 2, 2)
    assert resolve(LaunchConfig(processes_per_node=4, gpus_per_node=0), workflow).gpus_per_node == 0
    shared = load_workflow(SMOKE, ["parallel.data_parallel_size=4", "teacher_parallel={data_parallel_size: 4}"])
    with pytest.raises(UserError, match="whose product is 4"):
        resolve(LaunchConfig(nodes=3), shared)


def test_documented_cluster_file_is_valid(tmp_path):
    block = re.search(r"```yaml cluster\n(# cluster.yaml.*?)```", (ROOT / "docs" / "launch.md").read_text(), re.DOTALL)
    (tmp_path / "cluster.yaml").write_text(block[1])
    documented = load_launch(tmp_path / "cluster.yaml", [])
    assert documented.model_fields_set == set(LaunchConfig.model_fields), "every key is shown"


def test_nemo_run_jobs_run_the_same_ranks(tmp_path, monkeypatch):
    pytest.importorskip("nemo_run", reason="NeMo-Run is not installed (the extra `launch`)")
    monkeypatch.chdir(tmp_path)
    arguments = ["--nodes", "2", *TWO_RANKS, "--cluster-set", "partition=main", "--cluster-set", "sbatch=[--mem=0]"]
    # A process of its own: NeMo-Run reads the home directory when it is imported, and standard input.
    command = [sys.executable, "-m", "megatron_s2d.cli", "launch", "nemo-run", str(SMOKE), "--out", "run", "--dry-run"]
    done = subprocess.run(
        [*command, *arguments],
        env={**os.environ, "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"run"} and {path.name for path in Path("run").iterdir()} == {
        "launch"
    }
    (directory,) = Path("run/launch").iterdir()
    (job,) = directory.glob("nemo/experiments/smoke/*/opd_sbatch.sh")
    text = job.read_text()
    for line in ("--signal=USR1@300", "--nodes=2", "--partition=main", "--ntasks-per-node=1", "--mem=0"):
        assert f"#SBATCH {line}\n" in text
    assert "export MASTER_ADDR=$head_node\n" in text
    assert subprocess.run(["bash", "-n", str(job)]).returncode == 0
    (script,) = directory.glob("nemo/experiments/smoke/*/opd/scripts/opd.sh")
    assert f"exec bash {tmp_path}/{directory}/rank.sh run {tmp_path}/{directory}/workflow.json " in script.read_text()
    assert len(list(directory.glob("nemo/experiments/smoke/*/*_sbatch.sh"))) == 10
