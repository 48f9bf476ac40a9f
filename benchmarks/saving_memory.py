"""Peak memory of the training process in steps and while it saves: SmolLM2-135M, on-policy distillation, ``s2d run``.

    python benchmarks/real_model.py real-model
    python benchmarks/saving_memory.py real-model

A checkpoint with the optimizer state is written after each step but the last, then the final weights alone. The
resident memory of the largest process is read every 20 ms. Bar: 1.15 times the peak in steps.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import yaml
from peer_opd_step import Setting, workflow, write_inputs

POLL_SECONDS = 0.02
POLLS_PER_LISTING = 25  # of the processes


def activity(stage: Path) -> str:
    """Return what the stage does now, by its files."""
    if (stage / "model.partial").exists():
        return "final weights"
    if any((stage / "checkpoints").glob("*.partial")):
        return "checkpoints"
    return "steps" if stage.exists() and not (stage / "model").exists() else "other"


def largest_resident(processes: Sequence[psutil.Process]) -> int:
    """Return the resident bytes of the largest of ``processes``; some of them may have ended."""
    largest = 0
    for process in processes:
        try:
            largest = max(largest, process.memory_info().rss)
        except psutil.NoSuchProcess:
            continue
    return largest


def peaks(command: Sequence[str], stage: Path, log: Path) -> dict[str, int]:
    """Run ``command`` and return the peak of each activity in bytes."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"})
    root, largest, tree, polls = psutil.Process(process.pid), {}, [], 0
    while process.poll() is None:
        if polls % POLLS_PER_LISTING == 0:
            try:
                tree = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                break
        polls += 1
        name = activity(stage)
        largest[name] = max(largest.get(name, 0), largest_resident(tree))
        time.sleep(POLL_SECONDS)
    if process.wait():
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text(errors='replace')[-3000:]}")
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="that benchmarks/real_model.py wrote")
    parser.add_argument("--response-tokens", type=int, default=48)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(arguments.directory, folder, 8)
        document = workflow(Setting(name, 8, arguments.response_tokens, 3, 1024))
        document["stages"]["opd"]["checkpoint"] = {"interval_steps": 1}
        (folder / "saving.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
        command = [sys.executable, "-m", "megatron_s2d.cli", "run", str(folder / "saving.yaml")]
        largest = peaks([*command, "--out", str(folder / "run")], folder / "run" / "stages" / "opd", folder / "log")
    print("| activity | peak, GB | against steps |")
    print("|---|--:|--:|")
    for activity_name in ("steps", "checkpoints", "final weights"):
        peak = largest.get(activity_name, 0)
        print(f"| {activity_name} | {peak / 1e9:.2f} | {peak / largest['steps']:.2f} |")


if __name__ == "__main__":
    main()
