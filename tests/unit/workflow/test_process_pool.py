"""Ranks of a job meet in a directory that is removed when the last of them has ended."""

import multiprocessing
import os
from pathlib import Path

import pytest

from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.parallel import cuda_variables
from megatron_s2d.parallel.cuda_variables import set_device_variables
from megatron_s2d.workflow import process_pool
from megatron_s2d.workflow.process_pool import ProcessServer, RankProcess, Scratch, num_gpus

SMOKE = Path(__file__).resolve().parents[3] / "configs" / "smoke.yaml"


class EndedProcess:
    exitcode = 0

    def join(self):
        pass


def test_the_directory_of_a_job_is_removed_with_its_last_rank(tmp_path):
    scratch = Scratch(2)
    folder = scratch.rendezvous.parent
    scratch.rendezvous.write_text("store")
    ranks = [RankProcess(EndedProcess(), None, tmp_path / "heartbeat", scratch) for _ in range(2)]
    ranks[0].join()
    assert scratch.rendezvous.exists()
    ranks[1].join()
    assert not folder.exists()


def test_directories_of_killed_runners_are_removed_and_those_in_use_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(process_pool.tempfile, "tempdir", str(tmp_path))
    used = Scratch(1)
    folders = [tmp_path / f"megatron_s2d_{name}" for name in ("killed", "new")]
    for folder in folders:
        folder.mkdir()
        (folder / "rendezvous").touch()
    (tmp_path / "megatron_s2d_link").symlink_to(tmp_path / "others")
    (tmp_path / "others").mkdir()
    for folder in (folders[0], used.rendezvous.parent, tmp_path / "others"):
        os.utime(folder, (0, 0))
    other = Scratch(1)
    assert not folders[0].exists() and folders[1].exists() and (tmp_path / "others").exists()
    assert used.rendezvous.parent.exists() and other.rendezvous.parent.exists()


@pytest.mark.parametrize(("gpus", "method"), [(0, "forkserver"), (8, "spawn")])
def test_ranks_are_new_processes_where_there_are_gpus(monkeypatch, gpus, method):
    monkeypatch.setattr(process_pool, "num_gpus", lambda: gpus)
    assert ProcessServer()._context.get_start_method() == method


@pytest.mark.parametrize(("result", "count"), [(0, 3), (100, 0)])  # 100: CUDA_ERROR_NO_DEVICE
def test_the_driver_is_asked_for_gpus(monkeypatch, tmp_path, result, count):
    class Driver:
        def cuInit(self, flags):
            return result

        def cuDeviceGetCount(self, pointer):
            pointer._obj.value = 3
            return result

    monkeypatch.setattr(process_pool.ctypes, "CDLL", lambda name: Driver())
    assert num_gpus() == count

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(process_pool.ctypes, "CDLL", missing)
    assert num_gpus() == 0


def test_nccl_is_used_like_sglang_only_in_a_common_group(monkeypatch):
    for name in ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"):
        monkeypatch.setenv(name, "set")  # restored after the test
        monkeypatch.delenv(name)
    config = load_workflow(SMOKE)
    set_device_variables(config)
    assert "NCCL_CUMEM_ENABLE" not in os.environ
    rollout = config.rollout.model_copy(
        update={"engine": "sglang", "sglang": config.rollout.sglang.model_copy(update={"weight_sync": "distributed"})}
    )
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    set_device_variables(config.model_copy(update={"rollout": rollout}))
    assert os.environ["NCCL_CUMEM_ENABLE"] == "0" and os.environ["NCCL_NVLS_ENABLE"] == "1"


@pytest.mark.parametrize(
    ("sizes", "connections"),
    [({}, None), ({"tensor_model_parallel_size": 2}, "1"), ({"context_parallel_size": 2}, "1")],
)
def test_cuda_gets_its_variables_before_it_starts_and_those_of_the_user_stay(monkeypatch, sizes, connections):
    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NCCL_GRAPH_REGISTER")
    for name in names:
        monkeypatch.setenv(name, "set")  # restored after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(cuda_variables, "_compute_capability", lambda: 9)
    config = load_workflow(SMOKE).model_copy(update={"parallel": ParallelConfig(**sizes)})
    set_device_variables(config)
    found = [os.environ.get(name) for name in names]
    assert found == [connections, "expandable_segments:True", None, "0"]

    values = {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    set_device_variables(config)
    assert {name: os.environ[name] for name in values} == values

    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda_variables, "_compute_capability", lambda: 10)
    cuda_variables.set_cuda_variables(config.layouts, shares_memory=True)
    assert not any(name in os.environ for name in names)  # Blackwell, and memory that servers map


@pytest.mark.parametrize(
    ("code", "cause"),
    [(-9, "killed by signal 9 (out of memory?)"), (255, "killed (out of memory?)"), (1, "exited with code 1")],
)
def test_the_cause_of_death_is_named(tmp_path, code, cause):
    process = EndedProcess()
    process.exitcode = code
    ours, theirs = multiprocessing.Pipe(duplex=False)
    theirs.close()
    outcome = RankProcess(process, ours, tmp_path / "heartbeat", Scratch(1)).outcome()
    assert outcome.status == "crash" and cause in outcome.message
