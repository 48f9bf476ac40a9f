"""A whole step of on-policy distillation on a real model, on one CPU thread: ``s2d run`` against TRL's GKD trainer.

    python benchmarks/real_model.py real-model
    pip install --no-deps trl==1.16.0          # in an environment with the extra `real`; only this benchmark needs it
    python benchmarks/peer_opd_step.py real-model [--prompts 8] [--response-tokens 256] [--steps 3] [--json OUT]

Student: the first 27 layers of SmolLM2-135M; teacher: the whole. Both sides train in float32 on responses of the same
prompts, all of the same length (the end token is one that never comes), with the reverse KL over all 49,152 tokens, at
the same learning rate. Each side runs by itself: a process tree whose CPU seconds and peak memory are read from outside
at every step. The first step is not counted. Before the table is printed, the loss of TRL's first step is compared with
ours for its tokens and the starting weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

TRL = "trl==1.16.0"
END_TOKEN, END_TOKEN_ID = "<empty_output>", 16  # a special token that the model does not write
LEARNING_RATE = 2e-5
LARGEST_DIFFERENCE = 1e-3  # of the losses, relative
POLL_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Setting:
    """What both sides do, and where."""

    folder: str  # with student, teacher and train.jsonl
    prompts: int
    response_tokens: int
    steps: int
    max_tokens: int  # of a micro-batch of ours


# ---------------------------------------------------------------------- inputs


def write_inputs(source: Path, folder: Path, num_prompts: int) -> None:
    """Write the models with an end token that never comes (their weights are links), and the problems."""
    for name in ("student", "teacher"):
        (folder / name).mkdir()
        for path in (source / name).resolve().iterdir():
            (folder / name / path.name).symlink_to(path)
        for file, key, value in (
            ("tokenizer_config.json", "eos_token", END_TOKEN),
            ("generation_config.json", "eos_token_id", END_TOKEN_ID),
            ("config.json", "eos_token_id", END_TOKEN_ID),
        ):
            path = folder / name / file
            content = json.loads(path.read_text(encoding="utf-8")) | {key: value}
            path.unlink()
            path.write_text(json.dumps(content), encoding="utf-8")
    lines = (source / "train.jsonl").read_text(encoding="utf-8").splitlines()[:num_prompts]
    if len(lines) < num_prompts:
        sys.exit(f"{source / 'train.jsonl'} has {len(lines)} problems: --prompts {num_prompts} needs as many")
    (folder / "problems.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def workflow(setting: Setting) -> dict[str, Any]:
    """Return our side's workflow: one stage of ``opd``."""
    folder = Path(setting.folder)
    return {
        "name": "peer",
        "tokenizer": str(folder / "student"),
        "precision": "float32",
        "threads_per_rank": 1,
        "lengths": {"max_prompt_length": 128},
        "models": {name: {"path": str(folder / name)} for name in ("student", "teacher")},
        "data": {
            "train": {
                "type": "file",
                "path": str(folder / "problems.jsonl"),
                "schema": "columns",
                "columns": {"id": "id", "question": "question", "answer": "answer"},
                "template": "plain",
            }
        },
        "stages": {
            "student_base": {"type": "load_checkpoint", "model": "student"},
            "teacher_base": {"type": "load_checkpoint", "model": "teacher"},
            "opd": {
                "type": "opd",
                "init": "student_base",
                "teacher": "teacher_base",
                "prompts": "train",
                "steps": setting.steps,
                "train_batch_size": setting.prompts,
                "num_generations": 1,
                "sampling": {"temperature": 1.0, "max_response_length": setting.response_tokens},
                "optimizer": {"lr": LEARNING_RATE, "weight_decay": 0.0},
                "micro_batch": {"max_tokens_per_gpu": setting.max_tokens},
            },
        },
        "arms": {"opd": "opd"},
        "evaluation": {  # every workflow has one; this one is as short as can be
            "prompts": "train",
            "samples_per_prompt": 1,
            "sampling": {"temperature": 0.0, "max_response_length": 1},
        },
    }


# ---------------------------------------------------------------------- measuring from outside


@dataclasses.dataclass
class Measured:
    """CPU seconds of the whole tree when each step ended, and the most memory that the training process had."""

    cpu_seconds: list[float]
    peak_gb: float  # of the largest process (VmHWM)
    others_gb: float  # of the other processes together (proportional set size)

    @property
    def per_step(self) -> list[float]:
        """CPU seconds of each step but the first."""
        return [after - before for before, after in zip(self.cpu_seconds, self.cpu_seconds[1:], strict=False)]


def high_water_mark(pid: int) -> int:
    """Return the peak resident memory of a process in bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def measure(command: Sequence[str], rows: Path, log: Path) -> Measured:
    """Run ``command``, which appends a line to ``rows`` at the end of every step."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | threads)
    root = psutil.Process(process.pid)
    cpu: dict[int, float] = {}
    marks: dict[int, int] = {}
    measured = Measured([], 0.0, 0.0)
    while process.poll() is None:
        try:
            tree = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        for member in tree:
            try:
                times = member.cpu_times()
            except psutil.NoSuchProcess:
                continue
            cpu[member.pid] = times.user + times.system
            marks[member.pid] = max(marks.get(member.pid, 0), high_water_mark(member.pid))
        if count_lines(rows) > len(measured.cpu_seconds):
            measured.cpu_seconds.append(sum(cpu.values()))
            measured.others_gb = memory_of_others(tree, max(marks, key=marks.__getitem__)) / 1e9
        time.sleep(POLL_SECONDS)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text(errors='replace')[-3000:]}")
    measured.peak_gb = max(marks.values()) / 1e9
    return measured


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def memory_of_others(tree: Sequence[psutil.Process], largest: int) -> int:
    """Return the proportional set size of all processes but ``largest``."""
    total = 0
    for member in tree:
        if member.pid != largest:
            try:
                total += member.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
    return total


# ---------------------------------------------------------------------- TRL, in a process of its own


def train_with_trl(setting: Setting, rows: Path, first_step: Path) -> None:
    """Train with TRL's GKD trainer; append to ``rows`` at every step, write tokens and loss of the first one."""
    import datasets
    import torch
    import transformers
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    torch.set_num_threads(1)
    folder = Path(setting.folder)
    load = transformers.AutoModelForCausalLM.from_pretrained
    student, teacher = (load(folder / name, dtype=torch.float32) for name in ("student", "teacher"))
    problems = [json.loads(line) for line in (folder / "problems.jsonl").read_text(encoding="utf-8").splitlines()]
    messages = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        for row in problems
    ]
    parts = dict.fromkeys(("generate", "train_and_teacher"), 0.0)

    class Trainer(GKDTrainer):
        """The trainer as it is; it notes its CPU seconds, and the tokens and the loss of the first step."""

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            begin, generated = time.process_time(), parts["generate"]
            loss = super().training_step(*args, **kwargs)
            parts["train_and_teacher"] += time.process_time() - begin - (parts["generate"] - generated)
            if not first_step.exists():
                inputs = args[1]
                content = {name: inputs[name].tolist() for name in ("input_ids", "attention_mask", "labels")}
                # It divides by the tokens of the data set's answers, which it has replaced by responses.
                content["loss_sum"] = float(loss) * float(args[2])
                first_step.write_text(json.dumps(content), encoding="utf-8")
            return loss

        @staticmethod
        def generate_on_policy_outputs(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            outputs = GKDTrainer.generate_on_policy_outputs(*args, **kwargs)
            parts["generate"] += time.process_time() - begin
            return outputs

    class Rows(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            with rows.open("a") as file:
                file.write(json.dumps(parts) + "\n")
            parts.update(dict.fromkeys(parts, 0.0))

    arguments = GKDConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,  # faster; its cost is memory
        per_device_train_batch_size=setting.prompts,
        max_steps=setting.steps,
        learning_rate=LEARNING_RATE,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        lmbda=1.0,  # every response is the student's own
        beta=1.0,  # reverse KL
        temperature=1.0,
        max_new_tokens=setting.response_tokens,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(
        model=student,
        teacher_model=teacher,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"messages": messages}),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "student"),
        callbacks=[Rows()],
    ).train()


# ---------------------------------------------------------------------- the same loss for the same tokens


def loss_of_ours(setting: Setting, first_step: Path) -> tuple[float, float, int]:
    """Return (TRL's loss per token, ours, tokens) for the responses of TRL's first step and the starting weights."""
    import numpy as np
    from common import start

    from megatron_s2d.config.model import ModelConfig
    from megatron_s2d.config.training import OptimizerConfig
    from megatron_s2d.data.packing import MiniBatch
    from megatron_s2d.objectives.distill import divergence_objective
    from megatron_s2d.records import Sample
    from megatron_s2d.stages.model_factory import load_weights
    from megatron_s2d.teachers.frozen import FullTeacher, TeacherRouter
    from megatron_s2d.train.megatron_model import MegatronModel

    layout, folder = start(), Path(setting.folder)
    models = []
    for name in ("student", "teacher"):
        spec = ModelConfig(path=folder / name).resolve(None)
        models.append(MegatronModel(spec, layout, precision="float32", max_tokens=setting.max_tokens))
        load_weights(models[-1], folder / name)
    student, teacher = models
    teacher.freeze()
    student.prepare_training(OptimizerConfig(), 1)
    content = json.loads(first_step.read_text(encoding="utf-8"))
    samples = []
    columns = (content["input_ids"], content["attention_mask"], content["labels"])
    for number, row in enumerate(zip(*columns, strict=True)):
        ids, mask, labels = (np.array(values) for values in row)
        read = mask == 1  # without the padding in front
        samples.append(
            Sample(
                id=str(number), prompt_id=str(number), group_id=str(number), domain="math", seed=0,
                token_ids=ids[read], response_mask=(labels != -100)[read], temperature=1.0, finish_reason="length",
            )
        )  # fmt: skip
    num_tokens = sum(sample.response_length for sample in samples)
    weights = {"divergence_weight": [1 / num_tokens] * len(samples)}
    update = MiniBatch(samples, weights)
    batches = student.pack(samples, weights)
    distributions = FullTeacher(student, TeacherRouter({None: teacher})).distributions(update, batches)
    metrics = student.forward_backward(
        batches, divergence_objective("reverse_kl"), distributions, num_tokens=update.num_tokens
    )
    return content["loss_sum"] / num_tokens, metrics["loss"].value(), num_tokens


# ---------------------------------------------------------------------- both


def child(side: str, setting: Setting, *paths: Path) -> list[str]:
    """Return the command of this script as one side."""
    return [sys.executable, __file__, "--side", side, json.dumps(dataclasses.asdict(setting)), *map(str, paths)]


def check_losses(setting: Setting, folder: Path) -> str:
    """Compare the losses of TRL's first step; end the benchmark if they differ."""
    result = subprocess.run(
        child("check", setting, folder / "first_step.json"), capture_output=True, text=True, check=False
    )
    if result.returncode:
        sys.exit(result.stderr[-3000:])
    theirs, ours, num_tokens = json.loads(result.stdout.splitlines()[-1])
    if num_tokens != setting.prompts * setting.response_tokens:
        sys.exit(f"TRL's responses have {num_tokens} tokens together: the end token came, run it again")
    if abs(theirs - ours) > LARGEST_DIFFERENCE * abs(theirs):
        sys.exit(f"the losses of the same tokens differ: {theirs} with TRL, {ours} here")
    return f"reverse KL a token of TRL's first responses: {theirs:.5f} with TRL, {ours:.5f} here"


def compare(setting: Setting, folder: Path) -> dict[str, Any]:
    """Run both sides one after the other and return the figures."""
    yaml_path, run = folder / "peer.yaml", folder / "run"
    yaml_path.write_text(yaml.safe_dump(workflow(setting)), encoding="utf-8")
    command = [sys.executable, "-m", "megatron_s2d.cli", "run", str(yaml_path), "--out", str(run)]
    metrics = run / "stages" / "opd" / "metrics.jsonl"
    ours = measure(command, metrics, folder / "ours.log")
    rows, first_step = folder / "trl.jsonl", folder / "first_step.json"
    theirs = measure(child("trl", setting, rows, first_step), rows, folder / "trl.log")
    print(check_losses(setting, folder), file=sys.stderr)
    last = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])
    if last["response_length"] != setting.response_tokens:
        sys.exit(f"our responses have {last['response_length']} tokens on average: the end token came, run it again")
    return {
        "ours": {
            "cpu_seconds": ours.per_step,
            "peak_gb": ours.peak_gb,
            "others_gb": ours.others_gb,
            "wall_seconds": {key: value for key, value in last.items() if key.startswith("timing_s/")},
        },
        "trl": {
            "cpu_seconds": theirs.per_step,
            "peak_gb": theirs.peak_gb,
            "others_gb": theirs.others_gb,
            "parts": [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()[1:]],
        },
    }


def print_table(setting: Setting, result: dict[str, Any]) -> None:
    ours, theirs = result["ours"], result["trl"]
    print(f"{setting.prompts} responses of {setting.response_tokens} tokens a step, one thread")
    print("| | CPU seconds a step (fastest) | peak memory, GB | other processes, GB |")
    print("|---|--:|--:|--:|")
    for name, side in (("ours, `s2d run`", ours), (f"GKD trainer, {TRL.replace('==', ' ')}", theirs)):
        print(f"| {name} | {min(side['cpu_seconds']):.1f} | {side['peak_gb']:.2f} | {side['others_gb']:.2f} |")
    time_ratio = min(ours["cpu_seconds"]) / min(theirs["cpu_seconds"])
    memory = (ours["peak_gb"] + ours["others_gb"]) / (theirs["peak_gb"] + theirs["others_gb"])
    print(f"| ratio | {time_ratio:.2f} | {ours['peak_gb'] / theirs['peak_gb']:.2f} ({memory:.2f} with all) | |")
    seconds = {key.removeprefix("timing_s/"): value for key, value in ours["wall_seconds"].items()}
    whole = seconds.pop("step")
    print("ours, share of the last step: " + ", ".join(f"{key} {value / whole:.0%}" for key, value in seconds.items()))
    print(
        "TRL, CPU seconds of a step: " + ", ".join(f"{key} {value:.1f}" for key, value in theirs["parts"][-1].items())
    )


def main() -> None:
    if sys.argv[1:2] == ["--side"]:
        side, setting, paths = sys.argv[2], Setting(**json.loads(sys.argv[3])), [Path(path) for path in sys.argv[4:]]
        if side == "trl":
            train_with_trl(setting, *paths)
        else:
            print(json.dumps(loss_of_ours(setting, *paths)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="that benchmarks/real_model.py wrote")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--response-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=1024, help="of our micro-batches")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        sys.exit(f"this benchmark compares with TRL, which is not installed: pip install --no-deps {TRL}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(arguments.directory, folder, arguments.prompts)
        setting = Setting(
            name, arguments.prompts, arguments.response_tokens, max(2, arguments.steps), arguments.max_tokens
        )
        result = compare(setting, folder)
    print_table(setting, result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(dataclasses.asdict(setting) | result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
