"""Fixtures of this folder: an uninterrupted smoke run to compare with, and a real SGLang server per test file.

Imports are inside the fixtures, because most tests here need neither torch nor sglang in their own process.
"""

import shutil
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory, worker_id) -> Path:
    """The process's own copy of a run that all test processes share."""
    from filelock import FileLock
    from s2d import SMOKE, s2d

    session = tmp_path_factory.getbasetemp()
    shared = (session if worker_id == "master" else session.parent) / "shared"
    with FileLock(f"{shared}.lock"):
        if not (shared / "results.json").exists():
            finished = s2d("run", SMOKE, "--out", shared)
            assert finished.returncode == 0, finished.stderr
    return Path(shutil.copytree(shared, tmp_path_factory.mktemp("runs") / "unbroken"))


@pytest.fixture(scope="module")
def policy():
    from sglang_model import make_policy

    from megatron_s2d.config.parallel import ParallelConfig
    from megatron_s2d.parallel.layout import build_layout, initialize_distributed

    initialize_distributed()
    return make_policy(build_layout(ParallelConfig()))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from megatron_s2d.data.tokenizer import load_tokenizer

    return load_tokenizer("task:modular_arithmetic", tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def server_engine(policy, tokenizer, tmp_path_factory):
    """An engine with an SGLang server of its own, to which other engines can attach."""
    from sglang_model import make_engine

    start_time = time.perf_counter()
    engine = make_engine(policy, tokenizer, tmp_path_factory.mktemp("sglang"))
    print(f"the server was ready after {time.perf_counter() - start_time:.0f} s")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def url(server_engine) -> str:
    return server_engine.urls[0]


@pytest.fixture(scope="module")
def key_file(server_engine) -> Path:
    """The file with the API key of the running server."""
    return server_engine._server_group.directory / "api-key"


@pytest.fixture
def attach(policy, tokenizer, url, key_file, tmp_path):
    """attach(weight_sync, **settings): another engine on the running server."""
    from sglang_model import make_engine

    engines = []

    def make(weight_sync="disk", requirements=None, other_tokenizer=None, **settings):
        directory = tmp_path / str(len(engines))
        engine = make_engine(
            policy,
            other_tokenizer or tokenizer,
            directory,
            weight_sync,
            urls=[url],
            requirements=requirements,
            **{"api_key_file": key_file, **settings},
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()
