"""No module of the package initialises CUDA when it is imported.

An initialised process has taken memory of a GPU, perhaps not its own, and cannot fork processes that use CUDA.
"""

import subprocess
import sys
from pathlib import Path

import pytest

SMOKE = Path(__file__).resolve().parents[3] / "configs" / "smoke.yaml"

SCRIPT = """
import importlib, pkgutil, sys, torch
import megatron_s2d

def initialize():
    frame = sys._getframe()
    while frame.f_globals["__name__"].partition(".")[0] in ("torch", "__main__"):
        frame = frame.f_back
    if frame.f_globals["__name__"].startswith("megatron_s2d"):
        raise SystemExit(f"{frame.f_globals['__name__']} initialises CUDA")
    raise ImportError("no device")  # an optional library that needs one when it is imported: left out

torch.cuda.is_available = lambda: True
torch.cuda._lazy_init = initialize
import megatron_s2d.workflow.preload
imported = {name.partition(".")[0] for name in sys.modules}
import datetime
from pathlib import Path
from megatron_s2d.config.data import TaskSource
from megatron_s2d.data.prompts import load_prompts
from megatron_s2d.data.tokenizer import load_tokenizer
source = TaskSource(type="task", split="eval", num_prompts=4)
tokenizer = load_tokenizer("task:modular_arithmetic", Path(sys.argv[1]))
assert len(load_prompts(source, tokenizer, max_prompt_length=None, date=datetime.date(2026, 1, 1)).prompts) == 4
print("imported by a job:", sorted({"transformers", "tokenizers", "pyarrow", "pandas"} - imported))
names = [module.name for module in pkgutil.walk_packages(megatron_s2d.__path__, "megatron_s2d.")]
for name in names:
    if name.rpartition(".")[2] != "__main__":
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:  # a package of an extra
            assert not error.name.startswith("megatron_s2d"), error
from megatron.core.activations import quick_gelu
assert hasattr(quick_gelu, "_torchdynamo_orig_callable")  # fused functions are compiled where there is a GPU
assert {"megatron_s2d.workflow.worker", "megatron_s2d.train.megatron_model"} <= sys.modules.keys()
"""


def test_imports_do_not_initialize_cuda_and_jobs_import_nothing_again(tmp_path):
    """Ranks are forked from a process that has imported ``preload``; imports of a job would cost every job seconds."""
    result = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == "imported by a job: []\n"


FIRST_IMPORT = """
import os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, Finder())
"""
FORKED = """
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.workflow.process_pool import _run_worker
_run_worker(load_workflow({config!r}), None, None, None, None)
"""
LAUNCHED = """
from megatron_s2d.cli import main
os.environ |= dict(RANK="0", WORLD_SIZE="2")
main(["run", {config!r}, "--set", "parallel.tensor_model_parallel_size=2"])
"""


@pytest.mark.parametrize(("script", "connections"), [(FORKED, None), (LAUNCHED, "1")])
def test_a_rank_sets_the_variables_of_cuda_before_libraries_start_it(monkeypatch, script, connections):
    """Flashinfer and quack do when imported, and PyTorch reads the settings of its allocator at that moment."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS"):
        monkeypatch.delenv(name, raising=False)
    code = FIRST_IMPORT + script.format(config=str(SMOKE))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == f"expandable_segments:True {connections}\n", result.stderr[-2000:]
