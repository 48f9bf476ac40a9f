"""Forward KL of an output layer: time and memory of ``linear_divergence`` beside what people write otherwise.

    python benchmarks/kl.py --device cpu --json OUT
    python benchmarks/kl.py --device cuda --json OUT     (the GPU paths have not been run yet: no figure exists)

One row per variant: name, vocab, tokens, hidden sizes, chunk rows, peak_bytes beyond operands and gradients, seconds
and the relative error of the hidden gradient against float64. All variants start from the same hidden states and
weights and end with the gradients of both. Times are minima over interleaved rounds; on a CPU process CPU time with one thread,
on a GPU CUDA events. Peak memory on a CPU is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_s2d.kl.fused import linear_divergence
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.kl.teachers import HiddenStates

Gradients = tuple[torch.Tensor, torch.Tensor]  # of hidden [N, d] and weight [V, d]


@dataclass
class Operands:
    """Student and teacher: hidden states [N, d] and output layers [V, d], standard normal and scaled to logits of 1."""

    hidden: torch.Tensor
    weight: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor

    @classmethod
    def random(cls, tokens: int, vocab: int, sizes: tuple[int, int], device: str, dtype: torch.dtype) -> Operands:
        generator = torch.Generator(device=device).manual_seed(0)

        def normal(rows: int, width: int, scale: float) -> torch.Tensor:
            return torch.randn(rows, width, generator=generator, device=device).mul_(scale).to(dtype)

        student, teacher = sizes
        return cls(
            normal(tokens, student, 1.0), normal(vocab, student, student**-0.5), normal(tokens, teacher, 1.0),
            normal(vocab, teacher, teacher**-0.5),
        )  # fmt: skip

    def first(self, tokens: int) -> Operands:
        """The same with fewer tokens."""
        return Operands(self.hidden[:tokens], self.weight, self.teacher_hidden[:tokens], self.teacher_weight)


def ours(operands: Operands, chunk: int, name: str = "forward_kl") -> Gradients:
    """``linear_divergence`` with chunks of ``chunk`` tokens."""
    hidden, weight = (tensor.detach().requires_grad_() for tensor in (operands.hidden, operands.weight))
    loss, _ = linear_divergence(
        hidden,
        weight,
        shard=VocabShard.whole(len(weight)),
        outputs=(name,),
        teacher=HiddenStates(operands.teacher_hidden, operands.teacher_weight),
        beta=0.5 if name == "jsd" else None,
        token_loss=lambda outputs, rows: getattr(outputs, name) / len(hidden),
        chunk_bytes=chunk * len(weight) * 8,
    )
    loss.backward()
    return hidden.grad, weight.grad


def naive(operands: Operands, chunk: int) -> Gradients:
    """Both logits whole in float32, ``log_softmax`` and ``kl_div``."""
    hidden, weight = (tensor.detach().requires_grad_() for tensor in (operands.hidden, operands.weight))
    student = torch.log_softmax((hidden @ weight.T).float(), -1)
    with torch.no_grad():
        teacher = torch.log_softmax((operands.teacher_hidden @ operands.teacher_weight.T).float(), -1)
    torch.nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True).backward()
    return hidden.grad, weight.grad


def kept_logits(operands: Operands, chunk: int) -> Gradients:
    """Both logits kept whole in the dtype of the operands; ``log_softmax`` and the gradient chunk by chunk."""
    student = operands.hidden @ operands.weight.T
    teacher = operands.teacher_hidden @ operands.teacher_weight.T
    loss = student.new_zeros((), dtype=torch.float32)
    for start in range(0, len(student), chunk):
        rows = slice(start, start + chunk)
        log_p = torch.log_softmax(student[rows].float(), -1)
        log_q = torch.log_softmax(teacher[rows].float(), -1)
        loss += (log_q.exp() * (log_q - log_p)).sum()
    for start in range(0, len(student), chunk):
        rows = slice(start, start + chunk)
        difference = torch.softmax(student[rows].float(), -1).sub_(torch.softmax(teacher[rows].float(), -1))
        student[rows] = difference.div_(len(student))
    return student @ operands.weight, student.T @ operands.hidden


def products(operands: Operands, chunk: int) -> Gradients:
    """The four matrix products alone, whole: the floor."""
    student = operands.hidden @ operands.weight.T
    del_teacher = operands.teacher_hidden @ operands.teacher_weight.T
    del del_teacher
    return student @ operands.weight, student.T @ operands.hidden


def liger_jsd(operands: Operands, chunk: int) -> Gradients:
    """Liger-Kernel's fused linear JSD, beta 0.5, float32 accumulation; it chooses its own chunk."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    hidden, weight = (tensor.detach().requires_grad_() for tensor in (operands.hidden, operands.weight))
    LigerFusedLinearJSD(jsd_beta=0.5)(hidden, weight, operands.teacher_hidden, operands.teacher_weight).backward()
    return hidden.grad, weight.grad


VARIANTS: dict[str, Callable[[Operands, int], Gradients]] = {
    "linear_divergence": ours,
    "naive": naive,
    "kept_logits_chunked": kept_logits,
    "matrix_products": products,
    "linear_divergence_jsd": lambda operands, chunk: ours(operands, chunk, "jsd"),
    "liger_fused_linear_jsd": liger_jsd,
}
_NOT_FORWARD_KL = ("matrix_products", "linear_divergence_jsd", "liger_fused_linear_jsd")


def exact_hidden_gradient(operands: Operands, tokens: int) -> torch.Tensor:
    """Of the first 32 tokens, in float64 from the same operands; the mean is over ``tokens``."""
    few = operands.first(32)
    z = few.hidden.double() @ few.weight.double().T
    y = few.teacher_hidden.double() @ few.teacher_weight.double().T
    return (torch.softmax(z, -1) - torch.softmax(y, -1)) @ few.weight.double() / tokens


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Process CPU seconds, or seconds between CUDA events."""
    if device == "cpu":
        begin = time.process_time()
        run()
        return time.process_time() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved_minima(runs: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, float]:
    """Least seconds of each run over ``repeats`` rounds, the runs taking turns; the first round is warm-up."""
    best = dict.fromkeys(runs, float("inf"))
    for number in range(repeats + 1):
        for name, run in runs.items():
            seconds = seconds_of(run, device)
            if number:
                best[name] = min(best[name], seconds)
    return best


def peak_resident_bytes() -> int:
    """High-water mark of this process's memory (``ru_maxrss`` would begin with the parent's)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def extra_bytes(variant: str, operands: Operands, chunk: int, device: str) -> int:
    """Peak memory of one run beyond the operands and the two gradients."""
    gradients = operands.hidden.nbytes + operands.weight.nbytes
    if device == "cpu":
        before = peak_resident_bytes()
        VARIANTS[variant](operands, chunk)
        return peak_resident_bytes() - before - gradients
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    VARIANTS[variant](operands, chunk)
    return torch.cuda.max_memory_allocated() - before - gradients


def extra_bytes_in_own_process(arguments: argparse.Namespace, variant: str, tokens: int) -> int:
    """``extra_bytes`` on a CPU, where a process only ever grows."""
    command = [sys.executable, __file__, "--device", "cpu", "--peak-of", variant, "--tokens", str(tokens)]
    sizes = {"--vocab": [arguments.vocab], "--hidden": arguments.hidden, "--chunk": [arguments.chunk]}
    command += [str(word) for option, values in sizes.items() for word in (option, *values)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """The rows of one vocabulary."""
    device, dtype = arguments.device, torch.float32 if arguments.device == "cpu" else torch.bfloat16
    operands = Operands.random(arguments.tokens, arguments.vocab, tuple(arguments.hidden), device, dtype)
    runs = {name: (lambda run=VARIANTS[name]: run(operands, arguments.chunk)) for name in arguments.variants}
    exact = exact_hidden_gradient(operands, arguments.tokens)
    errors = {}
    for name in arguments.variants:
        if name not in _NOT_FORWARD_KL:
            found = runs[name]()[0][: len(exact)].double()
            errors[name] = float((found - exact).norm() / exact.norm())
    best = interleaved_minima(runs, device, arguments.repeats)
    rows = []
    for name in arguments.variants:
        peaks = {}
        for tokens in arguments.peak_tokens:
            if device == "cpu":
                peaks[tokens] = extra_bytes_in_own_process(arguments, name, tokens)
            else:
                many = Operands.random(tokens, arguments.vocab, tuple(arguments.hidden), device, dtype)
                peaks[tokens] = extra_bytes(name, many, arguments.chunk, device)
        rows.append(
            {
                "name": name, "device": device, "vocab": arguments.vocab, "tokens": arguments.tokens,
                "hidden": arguments.hidden[0], "teacher_hidden": arguments.hidden[1], "chunk": arguments.chunk,
                "seconds": best[name], "peak_bytes": peaks, "hidden_gradient_error": errors.get(name),
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--vocab", type=int, nargs="+", default=[128_256, 151_936])
    parser.add_argument("--tokens", type=int, help="default: 512 on a CPU, 8192 on a GPU")
    parser.add_argument("--hidden", type=int, nargs=2, help="student and teacher; default 256 512, on a GPU 4096 8192")
    parser.add_argument("--chunk", type=int, help="tokens per chunk; default 256 on a CPU, 2048 on a GPU")
    parser.add_argument("--peak-tokens", type=int, nargs="*", help="token counts whose peak memory is measured")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="default: all that the device has")
    parser.add_argument("--peak-of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    torch.set_num_threads(1 if on_cpu else torch.get_num_threads())
    arguments.tokens = arguments.tokens or (512 if on_cpu else 8192)
    arguments.hidden = arguments.hidden or ([256, 512] if on_cpu else [4096, 8192])
    arguments.chunk = arguments.chunk or (256 if on_cpu else 2048)
    vocabularies, arguments.vocab = arguments.vocab, arguments.vocab[0]
    if arguments.peak_of:
        operands = Operands.random(
            arguments.tokens, arguments.vocab, tuple(arguments.hidden), arguments.device, torch.float32
        )
        print(extra_bytes(arguments.peak_of, operands, arguments.chunk, arguments.device))
        return
    if arguments.peak_tokens is None:
        arguments.peak_tokens = [4096]
    arguments.variants = arguments.variants or [name for name in VARIANTS if not on_cpu or "liger" not in name]
    rows = []
    for arguments.vocab in vocabularies:
        rows += measure(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
